"""The training loop: the same call begins a run, continues one that was killed, and returns one that is finished."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinyjax import sharding
from tinyjax.config import identity, to_json
from tinyjax.data.batches import Batches, batch_hash
from tinyjax.data.prefetch import iterate
from tinyjax.data.prepare import Prepared, check_manifest, prepare
from tinyjax.errors import UserError
from tinyjax.models.model import Model
from tinyjax.train import metrics, state, workdir
from tinyjax.train.checkpoint import Checkpoints
from tinyjax.train.derived import derive, model_of
from tinyjax.train.evaluate import Evaluation, Evaluator
from tinyjax.train.progress import Silent
from tinyjax.train.run_config import Config
from tinyjax.train.step import compile_step, make_step

# Dispatches whose metrics have not been fetched: the device always has work while the host reads older results.
IN_FLIGHT = 2

Sampler = Callable[[Model, Any, Prepared, Config], list[str]]


def due(every: int | None, step: int, steps: int) -> bool:
    """Return whether something that happens every so many steps, and at the end, happens after `step`."""
    return step == steps or (every is not None and step % every == 0)


def next_stop(config: Config, step: int) -> int:
    """Return how far one dispatch may go from `step`: a function of the config and the step alone.

    So a run that was interrupted groups its steps as one that was not, and compiles to the same programs.
    """
    steps, group = config.train.steps, config.train.steps_per_dispatch
    stops = [(step // group + 1) * group, steps]
    stops += [(step // every + 1) * every for every in (config.checkpoint.every, config.evaluation.every) if every]
    return min(stops)


@dataclasses.dataclass
class _Window:
    """Sums over the steps since the last row of the training curve."""

    steps: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    hashes: list[str] = dataclasses.field(default_factory=list)
    last: dict[str, float] = dataclasses.field(default_factory=dict)


class Run:
    """One run in its folder. `train` takes it to its last step, from wherever it is."""

    def __init__(self, config: Config, folder: Path, cache: Path, progress: Silent, devices=None):
        self.config, self.folder, self._progress = config, folder, progress
        # All that can be refused is looked at before the folder is made: bad input leaves nothing behind.
        workdir.inspect(folder, config)
        rows = config.data.batch // config.train.microbatches
        available = list(jax.devices() if devices is None else devices)
        used = sharding.devices_for(rows, available)
        if len(used) < len(available):
            progress.say(f"using {len(used)} of {len(available)} devices: {rows} rows per microbatch divide no further")
        mesh = sharding.data_mesh(used)
        self._rows = sharding.batch_sharding(mesh, rows)
        self.prepared = prepare(config.data, config.tokenizer, cache, progress.data)
        self.model = model_of(config, self.prepared.tokenizer.vocab_size)
        self.derived = derive(config, self.model.vocab_size)
        self._transform = config.optimizer.transform(self.model.abstract(), self.model.logical_axes())
        self._spec = state.spec(self.model, self._transform, mesh)
        step = make_step(self.model, self._transform, config)
        self._several = config.train.steps_per_dispatch > 1
        self.compiled = compile_step(step, self._spec, mesh, self._several)
        self._evaluator = Evaluator(
            self.model,
            self.prepared.corpora,
            config.data,
            config.evaluation.positions,
            mesh,
        )
        self._mesh = mesh
        self._batches = Batches(self.prepared, config.data, config.train.seed, config.train.steps)

    def _accept(self, meta: dict[str, Any]) -> None:
        if meta["identity"] != identity(self.config):
            raise UserError(f"{self.folder}: its checkpoints are of another config; choose another --workdir")
        check_manifest(meta["manifest"], self.prepared.manifest)

    def train(self, sampler: Sampler | None = None) -> dict[str, Any]:
        """Return the result, a JSON object; train first what is not yet trained."""
        if (found := workdir.result(self.folder)) is not None:
            return found
        with workdir.claimed(self.folder, self.config):
            return self._continue(sampler)

    def _continue(self, sampler: Sampler | None) -> dict[str, Any]:
        checkpoints = Checkpoints(self.folder / "checkpoints", self._progress.say)
        try:
            restored = checkpoints.restore_latest(self._spec, self._accept)
            if restored is None:
                current = state.initial(self.model, self._transform, self._mesh, self.config.train.seed)
                seconds = 0.0
            else:
                current, seconds = restored.state, restored.meta["seconds"]
                self._progress.say(f"continuing from step {int(current.step)}")
            del restored
            return self._train(current, seconds, checkpoints, sampler)
        finally:
            checkpoints.close()

    def _train(self, current: state.State, seconds: float, checkpoints: Checkpoints, sampler) -> dict[str, Any]:
        step, steps = int(current.step), self.config.train.steps
        writer = metrics.Writer(self.folder, step)
        window, waiting = _Window(), collections.deque()
        self._clock = _Clock(seconds)
        self._progress.begin(step, steps)
        try:
            with iterate(self._batches, step) as stream:
                # A run killed between its last checkpoint and its result has measurements to make up for.
                if step and due(self.config.evaluation.every, step, steps):
                    self._measure(current, step, writer, checkpoints, sampler)
                while step < steps:
                    stop = next_stop(self.config, step)
                    batches = [next(stream) for _ in range(stop - step)]
                    current, found = self.compiled(current, self._on_device(batches))
                    waiting.append((step, [batch_hash(b) for b in batches], found))
                    step = stop
                    save = due(self.config.checkpoint.every, step, steps)
                    measure = due(self.config.evaluation.every, step, steps)
                    while len(waiting) > (0 if save or measure else IN_FLIGHT):
                        self._account(waiting.popleft(), window, writer, flush_at=step if save or measure else None)
                    if save:
                        with self._clock.stopped():
                            checkpoints.save(current, self._meta())
                    if measure:
                        with self._clock.stopped():
                            self._measure(current, step, writer, checkpoints, sampler)
                    elif save:
                        checkpoints.tidy(_losses(writer.rows), *self._policy())
            checkpoints.wait()
            return self._finish(current, writer)
        finally:
            writer.close()

    def _on_device(self, batches: list[dict[str, np.ndarray]]):
        if not self._several:
            return jax.device_put(batches[0], self._rows)
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        spec = jax.sharding.PartitionSpec(None, *self._rows.spec)
        return jax.device_put(stacked, jax.sharding.NamedSharding(self._mesh, spec))

    def _meta(self) -> dict[str, Any]:
        return {
            "identity": identity(self.config),
            "config": to_json(self.config),
            "manifest": self.prepared.manifest,
            "seconds": self._clock.seconds(),
        }

    def _policy(self) -> tuple[int, int]:
        return self.config.checkpoint.keep_last, self.config.checkpoint.keep_best

    def _account(self, dispatched, window: _Window, writer: metrics.Writer, flush_at: int | None) -> None:
        """Fetch the metrics of one dispatch into the window; write a row where one is due."""
        first, hashes, found = dispatched
        found = {name: np.atleast_1d(np.asarray(value)) for name, value in jax.device_get(found).items()}
        for i, digest in enumerate(hashes):
            one = {name: float(values[i]) for name, values in found.items()}
            step = first + i + 1
            window.steps += 1
            window.hashes.append(digest)
            window.last = one
            for name in ("nll", "z", "count"):
                window.sums[name] += one[name]
            window.sums["withheld"] += 1 - one["finite"]
            if not one["finite"]:
                self._progress.say(
                    f"step {step}: loss {one['loss'] / max(one['count'], 1):g} or gradient norm {one['grad_norm']:g} "
                    f"is not finite; parameters kept, batch {digest}"
                )
            if step % self.config.train.log_every == 0 or step == flush_at:
                self._write_row(step, window, writer)
                window.__init__()

    def _write_row(self, step: int, window: _Window, writer: metrics.Writer) -> None:
        count = max(window.sums["count"], 1.0)
        seconds = self._clock.seconds()
        speed = self._clock.speed(window.steps * self.derived.tokens_per_step)
        row = {
            "loss": window.sums["nll"] / count,
            "log_z_squared": window.sums["z"] / count,
            "learning_rate": window.last["learning_rate"],
            "grad_norm": window.last["grad_norm"],
            "tokens": window.sums["count"],
            "withheld": int(window.sums["withheld"]),
            "batches": batch_hash({"": np.array(window.hashes)}),
            "seconds": seconds,
            "tokens_per_second": speed,
        }
        writer.write("train", step, row)
        self._progress.advance(step, f"loss {row['loss']:.4f}  {speed:,.0f} tokens/s")

    def _measure(self, current, step: int, writer, checkpoints: Checkpoints, sampler) -> None:
        """Evaluate and sample at `step`, except for what rows are there for: a killed run wrote those."""
        there = [row for row in writer.rows if row["step"] == step]
        names = {row["name"] for row in there if row["kind"] == "evaluation"}
        if len(names) < len(self.prepared.corpora):
            for found in self._evaluator.evaluate(current.params):
                if found.name not in names:
                    writer.write("evaluation", step, dataclasses.asdict(found))
                    self._progress.say(f"step {step}: {_line(found)}")
        written = sum(row["kind"] == "sample" for row in there)
        if sampler and written < self.config.evaluation.samples:
            texts = sampler(self.model, current.params, self.prepared, self.config)
            for number, text in enumerate(texts[written:], written):
                writer.write("sample", step, {"number": number, "text": text})
        checkpoints.tidy(_losses(writer.rows), *self._policy())

    def _finish(self, current: state.State, writer: metrics.Writer) -> dict[str, Any]:
        last = [row for row in writer.rows if row["kind"] == "evaluation" and row["step"] == self.config.train.steps]
        result = {
            "identity": identity(self.config),
            "steps": self.config.train.steps,
            "skipped": int(current.skipped),
            "evaluations": last,
            "seconds": self._clock.seconds(),
            "derived": dataclasses.asdict(self.derived),
            "manifest": self.prepared.manifest,
        }
        workdir.write_json(self.folder / workdir.RESULT, result)
        return result


def _losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Return {step: bits per byte over all corpora} of the evaluations so far."""
    bits, size = collections.Counter(), collections.Counter()
    for row in rows:
        if row["kind"] == "evaluation" and row["bits_per_byte"] is not None:
            bits[row["step"]] += row["bits_per_byte"] * row["bytes"]
            size[row["step"]] += row["bytes"]
    return {step: bits[step] / size[step] for step in bits}


def _line(found: Evaluation) -> str:
    error = "" if math.isnan(found.bits_per_byte_error) else f" ± {found.bits_per_byte_error:.4f}"
    return (
        f"{found.name}: {found.nats_per_token:.4f} nats/token, {found.bits_per_byte:.4f}{error} bits/byte held out "
        f"({found.documents} documents, {found.bytes:,} bytes)"
    )


class _Clock:
    """Seconds of training, over all processes that worked on the run; stopped while it saves and evaluates."""

    def __init__(self, before: float):
        self._before, self._since, self._mark = before, time.monotonic(), before

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._since

    def speed(self, tokens: int) -> float:
        """Return tokens per second since the last call."""
        now = self.seconds()
        elapsed, self._mark = now - self._mark, now
        return tokens / max(elapsed, 1e-9)

    def stopped(self) -> "_Clock":
        return self

    def __enter__(self):
        self._before = self.seconds()

    def __exit__(self, *error):
        self._since = time.monotonic()
