"""tinyjax itself: the train step that `tinyjax train` compiles."""

import dataclasses

import jax

from experiments.bench.contenders import workload
from experiments.bench.contenders.serve import serve
from experiments.bench.contenders.workload import Workload
from tinyjax import config, sharding, tree
from tinyjax.models import layers
from tinyjax.models.model import Model, compute_dtype
from tinyjax.train import state, step
from tinyjax.train.run_config import Config

# 1024 tokens a part: with all 16 rows at once the activations do not fit in the cache.
ROWS_AT_ONCE = 4


def run_config(work: Workload, assignments: list[str]) -> Config:
    """Return the config of a run of this workload, `assignments` ("path=value") applied last."""
    optimizer = {
        "learning_rate": workload.LEARNING_RATE,
        "b1": workload.BETAS[0],
        "b2": workload.BETAS[1],
        "eps": workload.EPS,
        "weight_decay": workload.WEIGHT_DECAY,
        "clip": workload.CLIP,
    }
    whole = work.rows % ROWS_AT_ONCE == 0
    fixed = [
        f"data.sequence={work.sequence}",
        f"data.batch={work.rows}",
        f"model.width={work.width}",
        f"model.depth={work.depth}",
        f"model.attention.heads={work.heads}",
        f"model.mlp.hidden={work.hidden}",
        f"model.norm.eps={workload.NORM_EPS}",
        f"model.position.base={workload.ROPE_BASE}",
        "model.layers=unroll",
        f"train.microbatches={work.rows // ROWS_AT_ONCE if whole else 1}",
        *(f"optimizer.{name}={value}" for name, value in optimizer.items()),
        "schedule=constant",
        "schedule.warmup=0",
    ]
    return config.override(Config(), [*fixed, *assignments])


def prepare(work: Workload, options: dict):
    """Return a function that takes one step and returns its mean loss; options: packed (bool), set (assignments)."""
    run = run_config(work, options["set"])
    model = Model(run.model, work.vocab, compute_dtype(run.model.compute_dtype, jax.default_backend()))
    transform = run.optimizer.transform(model.abstract(), model.logical_axes())
    mesh = sharding.data_mesh(jax.devices()[:1])  # one device has all cores
    spec = state.spec(model, transform, mesh)
    params = tree.unflatten(workload.parameters(work))
    params = params if run.model.layers == "unroll" else layers.stack(params)
    tree.check_same_structure(spec.params, params, "benchmark")
    current = state.initial(model, transform, mesh, run.train.seed)
    current = dataclasses.replace(
        current, params=jax.device_put(params, jax.tree.map(lambda x: x.sharding, spec.params))
    )
    batch = workload.batch(work, options["packed"])
    batch = jax.device_put(batch, sharding.batch_sharding(mesh, work.rows))
    compiled = step.compile_step(step.make_step(model, transform, run), spec, mesh)

    def one():
        nonlocal current
        current, metrics = compiled(current, batch)
        return float(metrics["loss"] / metrics["count"])

    return one


if __name__ == "__main__":
    serve(prepare)
