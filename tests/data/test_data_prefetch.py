"""Prefetched batches are the batches, in order of step, and the thread ends when told."""

import threading

import pytest

from tinyjax.data.batches import Batches, batch_hash
from tinyjax.data.config import DataConfig
from tinyjax.data.prefetch import iterate


@pytest.fixture
def batches(prepared_of):
    return Batches(prepared_of([5, 40, 9, 3]), DataConfig(corpus="x", sequence=4, batch=2), 0, 30)


@pytest.mark.parametrize("start", [0, 1, 17, 29, 30])
def test_order_is_that_of_the_steps_from_any_start(batches, start):
    with iterate(batches, start) as steps:
        hashes = [batch_hash(batch) for batch in steps]
    assert hashes == [batch_hash(batches[step]) for step in range(start, 30)]


def test_closing_early_stops_the_thread(batches):
    before = set(threading.enumerate())
    with iterate(batches, 3) as steps:
        assert batch_hash(next(steps)) == batch_hash(batches[3])
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_an_error_in_a_batch_reaches_the_reader(batches):
    class Broken(Batches):
        def __getitem__(self, step):
            if step == 5:
                raise OSError("disk gone")
            return super().__getitem__(step)

    broken = Broken.__new__(Broken)
    broken.__dict__ = batches.__dict__
    with iterate(broken, 3) as steps:
        next(steps), next(steps)
        with pytest.raises(OSError, match="disk gone"):
            next(steps)
