import bz2
import gzip
import lzma
import math
import random
import shutil
import subprocess

import pytest

from tinyjax.evals.compression import compressed_sizes, nats_to_bits_per_byte

WORDS = (
    "the",
    "a",
    "little",
    "girl",
    "boy",
    "dog",
    "saw",
    "found",
    "lost",
    "ball",
    "tree",
    "and",
    "but",
    "then",
    "happy",
    "sad",
    "ran",
    "home",
    "said",
    "mother",
)


def story(n_bytes: int) -> bytes:
    choose = random.Random(0)
    words = [choose.choice(WORDS) + choose.choice(("", "", "s", ",", ".\n")) for _ in range(n_bytes // 3)]
    return " ".join(words).encode()[:n_bytes]


CASES = {
    "empty": b"",
    "one byte": b"a",
    "run": b"\x00" * 100_000,
    "story": story(300_000),
    "noise": random.Random(1).randbytes(100_000),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tool", "slack"), [("gzip -9", 0.005), ("bzip2 -9", 0.0), ("xz -9", 0.0)])
def test_sizes_equal_those_of_the_command_line_tools(name, tool, slack):
    if shutil.which(tool.split()[0]) is None:
        pytest.skip(f"{tool.split()[0]} is not installed")
    piped = subprocess.run(tool.split(), input=CASES[name], capture_output=True, check=True).stdout
    # 24 bytes: xz 5.6 and later write the sizes of each block into its header.
    assert abs(compressed_sizes(CASES[name])[tool] - len(piped)) <= slack * len(piped) + 24


def test_the_level_is_the_strongest():
    data = CASES["story"] * 4
    sizes = compressed_sizes(data)
    weaker = {
        "gzip -9": len(gzip.compress(data, 1)),
        "bzip2 -9": len(bz2.compress(data, 1)),
        "xz -9": len(lzma.compress(data, preset=0)),
    }
    assert list(sizes) == list(weaker)
    assert all(sizes[tool] < 0.99 * weaker[tool] for tool in sizes)


def test_bits_per_byte_of_a_uniform_guess_is_eight():
    n = 37
    assert nats_to_bits_per_byte(n * math.log(256), n) == pytest.approx(8, rel=1e-14)
    assert nats_to_bits_per_byte(0.0, 1) == 0


def test_bits_per_byte_divides_by_bytes_not_characters_or_tokens():
    text = "größer 中文"
    n_bytes = len(text.encode())
    assert nats_to_bits_per_byte(math.log(2) * n_bytes, n_bytes) == pytest.approx(1)
    assert nats_to_bits_per_byte(math.log(2) * n_bytes, len(text)) != pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("n_bytes", [0, -1])
def test_bits_per_byte_of_nothing_is_refused(n_bytes):
    with pytest.raises(ValueError, match="empty"):
        nats_to_bits_per_byte(1.0, n_bytes)


def test_a_diverged_model_is_not_hidden():
    assert math.isnan(nats_to_bits_per_byte(float("nan"), 3))
    assert nats_to_bits_per_byte(math.inf, 3) == math.inf
