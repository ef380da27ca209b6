"""Text for tests: small, varied, the same every time."""

import random
from pathlib import Path

TEXT = "the a cat dog tree sees eats finds under over old new red river café 東京 naïve of and then while"


def write_corpus(folder: Path, documents: int = 40, words: int = 60, seed: int = 0) -> Path:
    """Write `documents` text files of about `words` words each and return the folder."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        text = " ".join(chance.choice(TEXT.split()) for _ in range(chance.randint(2, 2 * words)))
        (folder / f"{i:03}.txt").write_text(f"{i}. {text}\n", encoding="utf-8")
    return folder
