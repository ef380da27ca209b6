"""Make the next batches in a thread while the accelerator works on this one."""

from collections.abc import Iterator
from typing import Self

import grain

from tinyjax.data.batches import Batches
from tinyjax.data.packing import Batch

BUFFER = 4  # batches ahead


class Prefetch(Iterator[Batch]):
    """An iterator over batches in order of step; a context manager that stops its thread."""

    def __init__(self, batches: Batches, start: int):
        dataset = grain.MapDataset.source(batches)[start:]
        # One thread keeps the order of work plain; it is grain's reader, so no worker processes and no flags.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=BUFFER)))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; an iterator that is not closed leaves it running to the end of the program."""
        self._iterator.close()


def iterate(batches: Batches, start: int) -> Prefetch:
    """Return the batches from step `start` on, made ahead of time: `with iterate(batches, start) as steps: ...`."""
    return Prefetch(batches, start)
