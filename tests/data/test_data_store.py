"""Arrays that are written as a stream, folders that appear in full or not at all."""

import os
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyjax.data import cache
from tinyjax.data.split import digest
from tinyjax.data.store import ArrayWriter, SplitWriter, open_split, sort_by_digest, token_dtype
from tinyjax.errors import UserError


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=5),
    st.sampled_from([np.uint8, np.uint16, np.uint32, np.int64]),
    st.sampled_from([(), (16,)]),
)
def test_a_streamed_array_is_an_ordinary_npy_file(tmp_path_factory, sizes, dtype, row_shape):
    path = tmp_path_factory.mktemp("array") / "a.npy"
    parts = [np.random.RandomState(size).randint(0, 200, (size, *row_shape)).astype(dtype) for size in sizes]
    with ArrayWriter(path, dtype, row_shape) as writer:
        for part in parts:
            writer.append(part)
    loaded = np.load(path, allow_pickle=False)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, np.concatenate([np.zeros((0, *row_shape), dtype), *parts]))


def test_the_header_has_room_for_any_length(tmp_path):
    with ArrayWriter(tmp_path / "a.npy", np.uint16) as writer:
        before = writer._file.tell()
        writer._rows = 10**18
        writer._file.seek(0)
        writer._header()
        assert writer._file.tell() == before
        writer._rows = 0


def test_the_smallest_type_that_holds_every_id():
    assert token_dtype(259) == token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32
    for size in (2**16, 2**16 + 1):
        assert np.array([size - 1], token_dtype(size))[0] == size - 1


def write_split(folder, texts, keep_text=True):
    with SplitWriter(folder, np.uint16, keep_text) as writer:
        for text in texts:
            writer.append(np.array([1, *text.encode(), 2]), text.encode(), digest(text.encode()))


def test_documents_are_sorted_by_content(tmp_path):
    texts = [f"text {i} " * (i % 4 + 1) for i in range(200)] + ["text 7 " * 4]  # the last is there twice
    write_split(tmp_path / "a", texts)
    write_split(tmp_path / "b", texts[::-1])
    sorted_texts = sorted(texts, key=lambda text: digest(text.encode()))
    for name in "ab":
        sort_by_digest(tmp_path / name, tmp_path / f"{name}-sorted")
        split = open_split(tmp_path / f"{name}-sorted", keep_text=True)
        assert [bytes(row) for row in split.digests] == [digest(text.encode()) for text in sorted_texts]
        assert split.text.read_bytes() == "".join(sorted_texts).encode()
        assert split.byte_counts.tolist() == [len(text) for text in sorted_texts]
        for i, text in enumerate(sorted_texts):
            assert split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist() == [1, *text.encode(), 2]
        assert isinstance(split.tokens, np.memmap)
        assert split.positions == sum(len(text) + 1 for text in texts)


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "byte_counts.npy", "digests.npy", "heldout.txt"])
@pytest.mark.parametrize("harm", ["gone", "cut", "empty", "other"])
def test_damaged_entries_are_refused_by_name(tmp_path, name, harm):
    folder = tmp_path / "entry" / "heldout"
    folder.parent.mkdir()
    write_split(folder, ["one", "two", "three"])
    path = folder / name
    if harm == "gone":
        path.unlink()
    elif harm == "other":
        write_split(tmp_path / "more", ["one", "two", "three", "four"])
        path.write_bytes((tmp_path / "more" / name).read_bytes())
    else:
        path.write_bytes(path.read_bytes()[:-2] if harm == "cut" else b"")
    with pytest.raises(UserError, match="damaged cache entry; delete this folder") as caught:
        open_split(folder, keep_text=True)
    assert str(folder.parent) in str(caught.value)


# Publishing


def test_what_failed_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise UserError("bad row")

    with pytest.raises(UserError, match="bad row"):
        cache.publish(tmp_path / "cache" / "entry", build)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_there_is_not_built_again(tmp_path):
    cache.publish(tmp_path / "entry", lambda folder: (folder / "a").write_text("first"))
    cache.publish(tmp_path / "entry", lambda folder: pytest.fail("built again"))
    assert (tmp_path / "entry" / "a").read_text() == "first"


def test_the_first_to_finish_wins_and_both_end_well(tmp_path):
    both_started = threading.Barrier(2, timeout=30)

    def build(folder, who):
        both_started.wait()
        (folder / "a").write_text(who)

    threads = [threading.Thread(target=cache.publish, args=(tmp_path / "e", lambda f, w=w: build(f, w))) for w in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "e" / "a").read_text() in ("x", "y")
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_old_leftovers_are_removed_and_young_ones_left_alone(tmp_path):
    for name, age in (
        (".tmp-old", 2 * cache.STALE_SECONDS),
        (".tmp-young", 60),
        (".tmp-writing", 2 * cache.STALE_SECONDS),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "part").write_text("x")
        then = time.time() - age
        if name != ".tmp-writing":  # an old folder whose file has just grown
            os.utime(folder / "part", (then, then))
        os.utime(folder, (then, then))
    cache.publish(tmp_path / "entry", lambda folder: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-writing", ".tmp-young", "entry"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        cache.publish(tmp_path / "file" / "entry", lambda folder: None)
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        cache.write(tmp_path / "file" / "a", b"x")

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        cache.publish(tmp_path / "entry", full)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_files_are_replaced_whole(tmp_path):
    for data in (b"first", b"second"):
        cache.write(tmp_path / "deep" / "a", data)
        assert (tmp_path / "deep" / "a").read_bytes() == data
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]


def test_keys_tell_settings_apart():
    assert cache.key("a", 1) == cache.key("a", 1)
    assert len({cache.key("a", 1), cache.key("a", 2), cache.key("a1"), cache.key(["a", 1]), cache.key()}) == 5
