"""Documents of a Hugging Face dataset, by name."""

import re
from collections.abc import Iterator

from tinyjax.data.readers import Document, checked_text
from tinyjax.errors import UserError

SPEC = re.compile(r"hf:(?P<name>[^:@]+)(:(?P<config>[^:@]+))?(@(?P<split>.+))?")


def documents(spec: str, text_field: str) -> Iterator[Document]:
    """Yield the rows of hf:NAME[:CONFIG][@SPLIT]; SPLIT is "train" when not given, and may be a slice as in train[:1%].

    The dataset is downloaded once by the `datasets` library into its own cache. Raises UserError when that fails.
    """
    parts = SPEC.fullmatch(spec)
    if not parts:
        raise UserError(f"{spec}: expected hf:NAME[:CONFIG][@SPLIT], for example hf:roneneldan/TinyStories@train")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{spec}: needs the datasets library; pip install 'tinyjax[hf]'") from None
    try:
        rows = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"] or "train")
    except Exception as error:  # of many kinds: the library's own, its file readers', the network's
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{spec}: cannot be loaded ({detail}); check name, config, split and network") from None
    names = rows.column_names
    if text_field not in names:
        raise UserError(f"{spec}: no column {text_field!r}; it has {', '.join(names)}; set data.text_field")
    for number, row in enumerate(rows.select_columns([text_field]), 1):
        where = f"{spec}:{number}"
        yield Document(checked_text(row[text_field], text_field, where, names), where)
