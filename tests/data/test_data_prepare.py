"""Preparing a corpus: exact bytes, no leaks, work done once, and nothing half done is ever trusted."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data import corpus, readers, survey
from tinyjax.data import prepare as prepare_module
from tinyjax.data.config import DataConfig, Knot, Mixture, TokenizerConfig
from tinyjax.data.corpus import Source
from tinyjax.data.prepare import check_manifest, prepare
from tinyjax.data.progress import Progress
from tinyjax.data.readers import Document
from tinyjax.data.split import digest, is_heldout
from tinyjax.data.tokenizer import SentencePieceTokenizer
from tinyjax.errors import ConfigError, UserError

BYTE = TokenizerConfig(kind="byte", vocab_size=259)
BPE = TokenizerConfig(vocab_size=300)
ODD = ["\u2581", "\0", "\r\n", "\ufeffx", "\U0001f600" * 3, "e\u0301", "a", " ", "\u65e5\u672c", "<s>", "\ud7ff\ue000"]


def texts_for(count):
    return [f"the cat number {i} sat on the mat {ODD[i % len(ODD)]}" * (i % 7 + 1) for i in range(count)]


def data_for(path, heldout=0.3, **fields):
    return DataConfig(corpus=str(path), heldout=heldout, **fields)


def age(*paths):
    """Make files look settled, so that their size and time are trusted."""
    for path in paths:
        os.utime(path, (1_000_000_000, 1_000_000_000))


def stored(split, tokenizer):
    documents = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for i in range(split.documents)]
    assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
    return [tokenizer.decode_bytes(document[1:-1]).decode() for document in documents]


@pytest.fixture
def work(monkeypatch):
    """Count files read and documents encoded."""
    counts = {"read": 0, "encoded": 0}
    read, encode = readers.read, SentencePieceTokenizer.encode_batch

    def counting_read(path, text_field):
        counts["read"] += 1
        return read(path, text_field)

    def counting_encode(self, texts):
        counts["encoded"] += len(texts)
        return encode(self, texts)

    monkeypatch.setattr(readers, "read", counting_read)
    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", counting_encode)
    return counts


@pytest.mark.parametrize("tokenizer", [BYTE, BPE, TokenizerConfig(kind="char", vocab_size=400)], ids=lambda t: t.kind)
def test_every_document_is_stored_exactly_on_its_side(corpus_file, tmp_path, tokenizer):
    texts = texts_for(60)
    prepared = prepare(data_for(corpus_file([*texts, "", ""])), tokenizer, tmp_path / "cache")
    (found,) = prepared.corpora
    assert stored(found.train, prepared.tokenizer) == [text for text in texts if not is_heldout(text, 0.3)]
    heldout = sorted((t for t in texts if is_heldout(t, 0.3)), key=lambda text: digest(text.encode()))
    assert stored(found.heldout, prepared.tokenizer) == heldout
    assert found.heldout.text.read_bytes() == "".join(heldout).encode()
    assert found.train.text is None
    for side, members in ((found.train, [t for t in texts if not is_heldout(t, 0.3)]), (found.heldout, heldout)):
        assert side.byte_counts.tolist() == [len(text.encode()) for text in members]
        assert side.bytes == len("".join(members).encode())
        assert side.positions == sum(len(prepared.tokenizer.encode(text)) + 1 for text in members)
        assert side.positions == side.lengths.sum()
    (entry,) = prepared.manifest["corpora"]
    assert entry["empty"] == 2
    assert entry["train"]["documents"] + entry["heldout"]["documents"] == 60
    assert entry["train"]["tokens"] == len(found.train.tokens)
    assert json.loads(json.dumps(prepared.manifest)) == prepared.manifest


def test_duplicates_stay_together(corpus_file, tmp_path):
    texts = [f"text {i % 20}" for i in range(200)]
    prepared = prepare(data_for(corpus_file(texts)), BYTE, tmp_path / "cache")
    train, heldout = (
        stored(side, prepared.tokenizer) for side in (prepared.corpora[0].train, prepared.corpora[0].heldout)
    )
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 200
    by_row = {text for i, text in enumerate(texts) if i % 3 == 0}, {text for i, text in enumerate(texts) if i % 3}
    assert by_row[0] & by_row[1], "a split by row, the plausible wrong one, leaks"


def test_groups_of_any_size_give_the_same(corpus_file, tmp_path, monkeypatch):
    path = corpus_file(texts_for(50))
    one = prepare(data_for(path), BPE, tmp_path / "a")
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 100)
    other = prepare(data_for(path), BPE, tmp_path / "b")
    np.testing.assert_array_equal(one.corpora[0].train.tokens, other.corpora[0].train.tokens)
    assert one.manifest == other.manifest


# Reuse


def test_the_second_time_nothing_is_read_or_encoded(corpus_file, tmp_path, work):
    path = corpus_file(texts_for(40))
    age(path)
    first = prepare(data_for(path), BPE, tmp_path / "cache")
    assert work["read"] == 2
    assert work["encoded"] > 0
    work.update(read=0, encoded=0)
    second = prepare(data_for(path), BPE, tmp_path / "cache")
    assert work == {"read": 0, "encoded": 0}
    assert second.manifest == first.manifest
    np.testing.assert_array_equal(second.corpora[0].train.tokens, first.corpora[0].train.tokens)


def test_files_too_young_to_trust_are_read_again_but_not_encoded(corpus_file, tmp_path, work):
    path = corpus_file(texts_for(40))
    os.utime(path, (4e9, 4e9))  # a clock ahead of ours
    prepare(data_for(path), BPE, tmp_path / "cache")
    work.update(read=0, encoded=0)
    prepare(data_for(path), BPE, tmp_path / "cache")
    assert work == {"read": 1, "encoded": 0}


def test_another_share_of_the_same_bytes_is_another_entry(corpus_file, tmp_path):
    path = corpus_file(texts_for(60))
    entries = [prepare(data_for(path, heldout=share), BYTE, tmp_path / "cache").corpora[0] for share in (0.2, 0.5)]
    documents = [entry.heldout.documents for entry in entries]
    assert documents == [sum(is_heldout(text, share) for text in texts_for(60)) for share in (0.2, 0.5)]
    assert documents[0] < documents[1]


def test_the_same_text_elsewhere_is_not_encoded_again(corpus_file, tmp_path, work):
    prepare(data_for(corpus_file(texts_for(40))), BPE, tmp_path / "cache")
    work.update(read=0, encoded=0)
    moved = prepare(data_for(corpus_file(texts_for(40), "moved.jsonl")), BPE, tmp_path / "cache")
    assert work["encoded"] == 0
    assert moved.corpora[0].name.endswith("moved.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        lambda data, tokenizer: (dataclasses.replace(data, heldout=0.4), tokenizer),
        lambda data, tokenizer: (data, dataclasses.replace(tokenizer, vocab_size=301)),
        lambda data, tokenizer: (data, dataclasses.replace(tokenizer, kind="unigram", vocab_size=295)),
        lambda data, tokenizer: (dataclasses.replace(data, text_field="other"), tokenizer),
    ],
)
def test_other_settings_are_other_entries(tmp_path, change, work):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t, "other": t[::-1]}) + "\n" for t in texts_for(60)))
    age(path)
    first = prepare(data_for(path), BPE, tmp_path / "cache")
    work.update(read=0, encoded=0)
    second = prepare(*change(data_for(path), BPE), tmp_path / "cache")
    assert work["encoded"] > 0
    assert second.manifest != first.manifest
    fresh = prepare(*change(data_for(path), BPE), tmp_path / "fresh")
    assert second.manifest == fresh.manifest
    np.testing.assert_array_equal(second.corpora[0].train.tokens, fresh.corpora[0].train.tokens)
    assert prepare(data_for(path), BPE, tmp_path / "cache").manifest == first.manifest


def test_a_changed_file_is_noticed(corpus_file, tmp_path):
    texts = texts_for(40)
    path = corpus_file(texts)
    age(path)
    first = prepare(data_for(path), BYTE, tmp_path / "cache")
    texts[3] = texts[3].replace("cat", "dog")  # the same size
    corpus_file(texts)
    second = prepare(data_for(path), BYTE, tmp_path / "cache")
    assert first.manifest["corpora"][0]["fingerprint"] != second.manifest["corpora"][0]["fingerprint"]


def test_a_survey_of_files_that_changed_meanwhile_is_not_kept(corpus_file, tmp_path):
    path = corpus_file(texts_for(40))
    age(path)
    memory = survey.Memory(tmp_path / "surveys", corpus.find(str(path), "text"), "text", 0.3)
    corpus_file(texts_for(41))
    memory.keep(survey.Survey("of one or the other", 1, 1, 0))
    corpus_file(texts_for(40))
    age(path)
    assert survey.Memory(tmp_path / "surveys", corpus.find(str(path), "text"), "text", 0.3).recall() is None


def test_the_fingerprint_sees_borders_and_order():
    def of(*texts):
        fingerprint = survey.Fingerprint()
        for text in texts:
            fingerprint.add(digest(text), len(text))
        return fingerprint.hexdigest()

    assert len({of(b"ab", b"c"), of(b"a", b"bc"), of(b"c", b"ab"), of(b"abc"), of(b"ab", b"c", b"")}) == 5


def test_a_corpus_that_changes_while_it_is_read_is_refused(corpus_file, tmp_path, monkeypatch):
    path = corpus_file(texts_for(40))
    take = survey.take

    def take_then_change(*arguments):
        result = take(*arguments)
        corpus_file(texts_for(41))
        return result

    monkeypatch.setattr(survey, "take", take_then_change)
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(data_for(path), BYTE, tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


# Several processes, and processes that die


def _prepare_and_sum(path, cache_dir):
    prepared = prepare(data_for(path), BPE, cache_dir)
    return prepared.manifest, int(prepared.corpora[0].train.tokens.astype(np.int64).sum())


def test_processes_at_the_same_time_all_end_well(corpus_file, tmp_path):
    path = corpus_file(texts_for(300))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.starmap(_prepare_and_sum, [(path, tmp_path / "cache")] * 3)
    assert results[0] == results[1] == results[2]
    assert not [path for path in (tmp_path / "cache").rglob("*") if ".tmp-" in path.name]


DIES = """
import os, signal, sys
from pathlib import Path
from tinyjax.data import prepare, store
from tinyjax.data.config import DataConfig, TokenizerConfig
sort = store.sort_by_digest
def die(*folders):
    sort(*folders)
    os.kill(os.getpid(), signal.SIGKILL)
store.sort_by_digest = die
prepare.prepare(DataConfig(corpus=sys.argv[1], heldout=0.3), TokenizerConfig(vocab_size=300), Path(sys.argv[2]))
"""


def test_what_a_killed_process_left_is_not_trusted(corpus_file, tmp_path):
    path = corpus_file(texts_for(60))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", DIES, path, tmp_path / "cache"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = list((tmp_path / "cache" / "tokens").iterdir())
    assert [folder.name[:5] for folder in left] == [".tmp-"]
    after = prepare(data_for(path), BPE, tmp_path / "cache")
    fresh = prepare(data_for(path), BPE, tmp_path / "fresh")
    assert after.manifest == fresh.manifest
    np.testing.assert_array_equal(after.corpora[0].train.tokens, fresh.corpora[0].train.tokens)


def test_a_damaged_tokenizer_or_survey_is_noticed(corpus_file, tmp_path):
    path = corpus_file(texts_for(40))
    age(path)
    first = prepare(data_for(path), BPE, tmp_path / "cache")
    for entry in (tmp_path / "cache" / "surveys").iterdir():
        entry.write_text("{}")
    assert prepare(data_for(path), BPE, tmp_path / "cache").manifest == first.manifest
    for entry in (tmp_path / "cache" / "tokenizers").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.model: .*delete the file"):
        prepare(data_for(path), BPE, tmp_path / "cache")


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    count, size = 20_000, 1000

    def documents():
        return (Document(f"{i:0{size}d}", str(i)) for i in range(count))

    monkeypatch.setattr(corpus, "find", lambda spec, text_field: Source(spec, (), {}, documents))
    config = TokenizerConfig(kind="char", vocab_size=300, train_bytes=100_000)
    tracemalloc.start()
    prepared = prepare(DataConfig(corpus="stream", heldout=0.05), config, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert prepared.corpora[0].train.bytes + prepared.corpora[0].heldout.bytes == count * size
    assert peak < count * size  # the text alone is 20 MB, its tokens 40


# What cannot be prepared


def refusal(data, tokenizer, cache_dir):
    with pytest.raises(UserError) as caught:
        prepare(data, tokenizer, cache_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_splits_with_an_empty_side_say_what_to_do(corpus_file, tmp_path):
    train_only = corpus_file([t for t in map(str, range(50)) if not is_heldout(t, 0.3)], "a.jsonl")
    assert "none of its" in (message := refusal(data_for(train_only), BYTE, tmp_path / "cache"))
    assert "raise data.heldout" in message
    heldout_only = corpus_file([t for t in map(str, range(50)) if is_heldout(t, 0.3)], "b.jsonl")
    assert "lower data.heldout" in refusal(data_for(heldout_only), BYTE, tmp_path / "cache")
    assert "no text in it (2 empty documents)" in refusal(data_for(corpus_file(["", ""])), BYTE, tmp_path / "cache")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no text in it (1 empty documents)" in refusal(data_for(empty), BYTE, tmp_path / "cache")


def test_vocabularies_that_do_not_fit_leave_nothing_behind(corpus_file, tmp_path):
    path = corpus_file(texts_for(40))
    with pytest.raises(ConfigError, match="at most"):
        prepare(data_for(path), TokenizerConfig(vocab_size=60_000), tmp_path / "cache")
    with pytest.raises(ConfigError, match="at least"):
        prepare(data_for(path), TokenizerConfig(vocab_size=261), tmp_path / "cache")
    assert not (tmp_path / "cache" / "tokenizers").exists()


def test_a_cache_that_cannot_be_written_is_named(corpus_file, tmp_path):
    (tmp_path / "file").write_text("")
    path = corpus_file(texts_for(40))
    age(path)
    for tokenizer in (BYTE, BPE):
        assert "cannot be written" in refusal(data_for(path), tokenizer, tmp_path / "file")


# Manifests


def test_a_manifest_that_fits_is_accepted_wherever_the_corpus_lies(corpus_file, tmp_path):
    one = prepare(data_for(corpus_file(texts_for(40))), BPE, tmp_path / "cache").manifest
    other = prepare(data_for(corpus_file(texts_for(40), "moved.jsonl")), BPE, tmp_path / "cache").manifest
    assert one != other
    check_manifest(json.loads(json.dumps(one)), other)


def test_changes_since_a_run_began_are_named(corpus_file, tmp_path):
    path = corpus_file(texts_for(60))
    saved = prepare(data_for(path), BYTE, tmp_path / "cache").manifest
    other_share = prepare(data_for(path, heldout=0.4), BYTE, tmp_path / "cache").manifest
    other_tokenizer = prepare(data_for(path), BPE, tmp_path / "cache").manifest
    other_content = prepare(data_for(corpus_file(texts_for(61))), BYTE, tmp_path / "cache").manifest
    more = saved | {"corpora": saved["corpora"] * 2}
    for current, says in (
        (other_share, "the held-out share was 0.3, is now 0.4"),
        (other_tokenizer, "the tokenizer was"),
        (other_content, f"the content of corpus {path} was"),
        (more, "the number of corpora was 1, is now 2"),
        (saved | {"format": 99}, "the format of the data was 1, is now 99"),
    ):
        with pytest.raises(UserError, match="not what this run began with") as caught:
            check_manifest(saved, current)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


# Several corpora, and the sample that the tokenizer sees


def test_corpora_share_one_tokenizer_fitted_on_equal_parts(corpus_file, tmp_path, monkeypatch):
    paths = [corpus_file([f"{word} {i}" * 20 for i in range(60)], f"{word}.jsonl") for word in ("zebra", "okapi")]
    mixture = Mixture(tuple(map(str, paths)), (Knot(0, (1.0, 1.0)),))
    seen = []
    train = prepare_module.train
    monkeypatch.setattr(prepare_module, "train", lambda config, texts: seen.extend(texts) or train(config, texts))
    data = DataConfig(corpus=None, mixture=mixture, heldout=0.3)
    prepared = prepare(data, TokenizerConfig(vocab_size=280, train_bytes=2000), tmp_path / "cache")
    assert [c.name for c in prepared.corpora] == [str(path) for path in paths]
    sizes = [sum(len(text) for text in seen if word in text) for word in ("zebra", "okapi")]
    assert sizes == [1000, 1000]
    for found, word in zip(prepared.corpora, ("zebra", "okapi"), strict=True):
        assert all(word in text for text in stored(found.train, prepared.tokenizer))


def test_held_out_text_never_reaches_the_tokenizer(corpus_file, tmp_path, monkeypatch):
    seen = []
    train = prepare_module.train
    monkeypatch.setattr(prepare_module, "train", lambda config, texts: seen.extend(texts) or train(config, texts))
    prepare(data_for(corpus_file(texts_for(100))), BPE, tmp_path / "cache")
    assert seen
    assert not [text for text in seen if is_heldout(text, 0.3)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), max_size=30), st.integers(1, 200), st.integers(0, 9))
def test_a_sample_is_the_first_bytes_in_order_of_hash(texts, limit, seed):
    samples = []
    for order in (texts, texts[::-1], random.Random(seed).sample(texts, len(texts))):
        sample = survey.Sample(limit)
        for text in order:
            sample.add(digest(text.encode()), text.encode())
        samples.append(sample.texts())
    assert samples[0] == samples[1] == samples[2], "whatever order they come in"
    in_order = "".join(sorted(texts, key=lambda text: digest(text.encode())))
    assert "".join(samples[0]) == in_order.encode()[:limit].decode(errors="ignore")


def test_progress_tells_a_bar_all_it_needs(corpus_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tinyjax.data.progress.TICK_BYTES", 500)
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 500)
    events = []
    path = corpus_file(texts_for(60))
    prepare(data_for(path), BPE, tmp_path / "cache", events.append)
    assert all(isinstance(event, Progress) for event in events)
    stages = list(dict.fromkeys(event.stage for event in events))
    assert stages == ["read", "fit", "tokenise"]
    for stage in stages:
        of_stage = [event for event in events if event.stage == stage]
        assert [event.done for event in of_stage] == [False] * (len(of_stage) - 1) + [True]
        assert [event.documents for event in of_stage] == sorted(event.documents for event in of_stage)
        assert len(of_stage) > 3 or stage == "fit"
    assert events[-1].documents == events[-1].total == 60
    assert all("\n" not in str(event) and str(event.documents) in str(event) for event in events)
