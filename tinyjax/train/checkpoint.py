"""Checkpoints: one atomic step holding state, config, manifest and a checksum per array, written in the background."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tinyjax import tree
from tinyjax.errors import UserError
from tinyjax.train.checksum import checksums
from tinyjax.train.state import State

MARGIN = 1 << 20  # bytes beside the arrays: metadata, and the other files of the run


def to_delete(steps: list[int], losses: Mapping[int, float], keep_last: int, keep_best: int) -> list[int]:
    """Return the steps whose checkpoints go: neither among the newest `keep_last` nor the `keep_best` of least loss."""
    newest = sorted(steps)[-keep_last:]
    best = sorted((s for s in steps if s in losses), key=lambda s: (losses[s], s))[:keep_best]
    return sorted(set(steps) - set(newest) - set(best))


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    state: State
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a folder, named by step."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._say = say
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def steps(self) -> list[int]:
        """Return the steps that were written to the end."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, meta: Mapping[str, Any]) -> None:
        """Write the state at its step. Returns when the arrays are copied; the files follow in the background."""
        step = int(state.step)
        free = shutil.disk_usage(self._manager.directory).free
        # Looked at before, because a background write that runs out of room fails late and noisily.
        if free < (need := tree.nbytes(state) + MARGIN):
            raise UserError(
                f"{self._manager.directory}: a checkpoint takes {need >> 20} MiB, {free >> 20} MiB are free; make room "
                "and run the same command to continue"
            )
        # The caller donates the state's buffers to the next step while they are still being written.
        copy = jax.tree.map(lambda x: x.copy(), state)
        meta = dict(meta) | {"step": step, "checksums": checksums(copy)}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_as_dict(copy)), meta=ocp.args.JsonSave(meta)),
        )

    def meta(self, step: int) -> dict[str, Any]:
        """Return what was written beside the state."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore_latest(self, spec: State, accept: Callable[[dict[str, Any]], None]) -> Restored | None:
        """Return the newest checkpoint that is whole, in the shardings of `spec`, or None when there is none at all.

        `accept(meta)` raises UserError to refuse a checkpoint of another run. A damaged one is named, with the array,
        and the one before it is tried; when that is whole, the damaged one is deleted. Raises UserError
        when all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self.meta(step)
            except (ValueError, OSError, KeyError) as error:
                self._damaged(step, f"its metadata cannot be read: {_first_line(error)}")
                continue
            accept(meta)
            if found := self._read(step, meta, spec):
                # The run will come by these steps again, and Orbax does not write over a checkpoint.
                for damaged in [s for s in steps if s > step]:
                    self._manager.delete(damaged)
                return Restored(found, meta)
        if steps:
            raise UserError(f"{self._manager.directory}: every checkpoint is damaged; start in a new --workdir")
        return None

    def _read(self, step: int, meta: dict[str, Any], spec: State) -> State | None:
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_as_dict(spec)))
            state = State(**self._manager.restore(step, args=args).state)
        except Exception as error:  # Orbax 0.12 wraps what TensorStore says of a damaged file in a bare Exception
            self._damaged(step, f"its arrays cannot be read: {_first_line(error.__cause__ or error)}")
            return None
        found = checksums(state)
        wrong = [path for path, value in found.items() if meta["checksums"].get(path) != value]
        if wrong:
            self._damaged(step, f"{wrong[0]} does not match its checksum ({len(wrong)} of {len(found)} arrays)")
            return None
        return state

    def _damaged(self, step: int, why: str) -> None:
        self._say(f"checkpoint {step} is damaged, falling back to an earlier one: {why}")

    def tidy(self, losses: Mapping[int, float], keep_last: int, keep_best: int) -> None:
        """Delete the checkpoints that the policy does not keep."""
        for step in to_delete(self.steps(), losses, keep_last, keep_best):
            self._manager.delete(step)

    def wait(self) -> None:
        """Return when everything saved is on disk; errors of the background write are raised here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and stop the background thread."""
        self._manager.close()


def _as_dict(state: State) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
