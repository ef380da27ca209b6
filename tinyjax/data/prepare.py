"""Corpora and a tokenizer made ready for training, once: later runs with the same text and settings reuse them."""

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from tinyjax.config import to_json
from tinyjax.data import cache, corpus, store, survey
from tinyjax.data.config import DataConfig, TokenizerConfig
from tinyjax.data.corpus import Source
from tinyjax.data.progress import Progress, Ticker, silent
from tinyjax.data.split import digest, digest_is_heldout
from tinyjax.data.store import Split
from tinyjax.data.survey import Survey
from tinyjax.data.tokenizer import ByteTokenizer, Tokenizer, load
from tinyjax.data.train_tokenizer import train
from tinyjax.errors import UserError

Report = Callable[[Progress], None]
GROUP_BYTES = 1 << 20  # documents are encoded in groups of about this size, on all cores


@dataclass(frozen=True)
class Corpus:
    """One corpus, tokenised."""

    name: str  # as the user named it
    train: Split
    heldout: Split


@dataclass(frozen=True)
class Prepared:
    """All that batches are made of."""

    tokenizer: Tokenizer
    corpora: tuple[Corpus, ...]
    manifest: dict[str, Any]  # JSON: what exactly was read and how; see `check_manifest`


def prepare(data: DataConfig, tokenizer: TokenizerConfig, cache_dir: Path, report: Report = silent) -> Prepared:
    """Read, split and tokenise the corpora of `data`, or find them in `cache_dir` where that was done before.

    One tokenizer serves all corpora: it is fitted on an equal number of bytes of each, `train_bytes` in all.
    Raises UserError for text that cannot be read or split, ConfigError for a tokenizer that the text does not allow.
    """
    cache_dir = Path(cache_dir)
    sources = [corpus.find(spec, data.text_field) for spec in data.corpora]
    limit = 0 if tokenizer.kind == "byte" else max(1, tokenizer.train_bytes // len(sources))
    memories = [survey.Memory(cache_dir / "surveys", source, data.text_field, data.heldout) for source in sources]
    surveys = [memory.recall() for memory in memories]
    samples: dict[int, list[str]] = {}
    for i, (source, memory) in enumerate(zip(sources, memories, strict=True)):
        if surveys[i] is None:
            surveys[i], samples[i] = survey.take(source, data.heldout, limit, report)
            memory.keep(surveys[i])

    def sample() -> list[str]:
        for i, source in enumerate(sources):
            if i not in samples:
                again, samples[i] = survey.take(source, data.heldout, limit, report)
                _check_unchanged(source, surveys[i].fingerprint, again.fingerprint)
        return [text for i in range(len(sources)) for text in samples[i]]

    fitted = _tokenizer(tokenizer, surveys, data.heldout, sample, cache_dir / "tokenizers", report)
    corpora, entries = [], []
    for source, found in zip(sources, surveys, strict=True):
        folder = cache_dir / "tokens" / cache.key(found.fingerprint, fitted.fingerprint, data.heldout)
        cache.publish(folder, functools.partial(_tokenise, source, found, fitted, data.heldout, report))
        train_side = store.open_split(folder / "train", keep_text=False)
        split = Corpus(source.name, train_side, store.open_split(folder / "heldout", keep_text=True))
        corpora.append(split)
        entries.append(_entry(split, source, found))
    manifest = {
        "format": cache.FORMAT,
        "tokenizer": {
            "fingerprint": fitted.fingerprint,
            "vocab_size": fitted.vocab_size,
            "settings": to_json(tokenizer),
        },
        "heldout": data.heldout,
        "corpora": entries,
    }
    return Prepared(fitted, tuple(corpora), manifest)


def check_manifest(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError naming what changed between a run's saved manifest and today's, if its batches would change.

    A corpus may have moved: its name is not compared, its content is.
    """
    changes = [
        f"{what} was {before}, is now {after}"
        for what, before, after in zip(*_identity(saved, current), strict=True)
        if before != after
    ]
    if changes:
        raise UserError(
            f"the data is not what this run began with: {'; '.join(changes)}; restore it, or start a new run"
        )


def _identity(saved: dict[str, Any], current: dict[str, Any]) -> tuple[list[str], list[Any], list[Any]]:
    names = [entry["name"] for entry in current["corpora"]]

    def values(manifest: dict[str, Any]) -> list[Any]:
        contents = [entry["fingerprint"] for entry in manifest["corpora"]]
        contents = contents if len(contents) == len(names) else ["different"] * len(names)
        return [
            manifest["format"],
            manifest["heldout"],
            len(manifest["corpora"]),
            *contents,
            manifest["tokenizer"]["fingerprint"],
        ]

    what = ["the format of the data", "the held-out share", "the number of corpora"]
    what += [f"the content of corpus {name}" for name in names] + ["the tokenizer"]
    return what, values(saved), values(current)


def _tokenizer(
    config: TokenizerConfig,
    surveys: list[Survey],
    share: float,
    sample: Callable[[], list[str]],
    folder: Path,
    report: Report,
) -> Tokenizer:
    if config.kind == "byte":
        return ByteTokenizer()
    contents = [found.fingerprint for found in surveys]
    path = folder / f"{cache.key(contents, share, to_json(config), sentencepiece.__version__)}.model"
    if not path.exists():
        texts = sample()
        size = sum(len(text.encode()) for text in texts)
        report(Progress("fit", "all corpora", len(texts), len(texts), size, done=False))
        fitted = train(config, texts)
        report(Progress("fit", "all corpora", len(texts), len(texts), size, done=True))
        cache.write(path, fitted.model)
    try:
        return load(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}; delete the file and run again") from None


def _tokenise(source: Source, found: Survey, tokenizer: Tokenizer, share: float, report: Report, into: Path) -> None:
    dtype = store.token_dtype(tokenizer.vocab_size)
    arrival = into / "heldout-in-order-of-arrival"
    fingerprint = survey.Fingerprint()
    ticker = Ticker("tokenise", source.name, found.train + found.heldout, report)
    with (
        store.SplitWriter(into / "train", dtype, keep_text=False) as train_side,
        store.SplitWriter(arrival, dtype, keep_text=True) as heldout_side,
    ):
        for texts in _groups(document.text for document in source.documents()):
            size = 0
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                raw = text.encode()
                content = digest(raw)
                fingerprint.add(content, len(raw))
                side = heldout_side if digest_is_heldout(content, share) else train_side
                side.append(np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]), raw, content)
                size += len(raw)
            ticker.add(len(texts), size)
    ticker.close()
    _check_unchanged(source, found.fingerprint, fingerprint.hexdigest())
    store.sort_by_digest(arrival, into / "heldout")
    shutil.rmtree(arrival)


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for text in filter(None, texts):
        group.append(text)
        size += len(text)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _check_unchanged(source: Source, before: str, after: str) -> None:
    if before != after:
        raise UserError(f"{source.name}: changed while it was being read; run again when it is complete")


def _entry(split: Corpus, source: Source, found: Survey) -> dict[str, Any]:
    sides = {
        name: {
            "documents": side.documents,
            "tokens": len(side.tokens),
            "positions": side.positions,
            "bytes": side.bytes,
        }
        for name, side in (("train", split.train), ("heldout", split.heldout))
    }
    return {
        "name": source.name,
        "fingerprint": found.fingerprint,
        **sides,
        "empty": found.empty,
        "skipped": dict(source.skipped),
    }
