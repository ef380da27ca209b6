"""Does a tiny language model, trained for a few minutes, compress unseen text better than gzip?

Question:  trained on the Python standard library (its own source and documentation, on every machine), does it predict
           held-out files in fewer bits per byte than gzip -9 needs for the same files?
Command:   python -m experiments.run quickstart
Another corpus:  python -m experiments.run quickstart --set data.corpus=PATH
Cost:      3 to 4 minutes of training on 2 CPU cores, about 5 with tokenizer, evaluation and page.
Expected:  gzip -9 takes about 2.1 bits per byte of the held-out documents; the model about 1.7. The comparison leaves
           out the model's own bytes: it is a measure of prediction, not an archiver.
"""

import json

from experiments.describe import derived_tables
from experiments.experiment import Trial
from tinyjax.config import override, to_json
from tinyjax.data.config import DataConfig, TokenizerConfig
from tinyjax.data.heldout import heldout_selection, heldout_text
from tinyjax.evals.compression import compressed_sizes
from tinyjax.models.attention import GroupedQuery
from tinyjax.models.transformer import Transformer
from tinyjax.optim.optimizers import Muon
from tinyjax.optim.schedules import WarmupStableDecay
from tinyjax.report.document import Claim, Plot, Report, Series, Table, Text
from tinyjax.train.loop import Run
from tinyjax.train.run_config import CheckpointConfig, Config, EvaluationConfig, TrainConfig

CPU = Config(
    data=DataConfig(sequence=256, batch=8),
    tokenizer=TokenizerConfig(vocab_size=4096),
    model=Transformer(depth=4, width=192, attention=GroupedQuery(heads=3), layers="unroll"),
    optimizer=Muon(learning_rate=1e-2),
    schedule=WarmupStableDecay(warmup=0.02, decay=0.4),
    train=TrainConfig(steps=320),
    evaluation=EvaluationConfig(every=160, positions=None),
    checkpoint=CheckpointConfig(every=80),
)

PRESETS = {
    "smoke": override(
        CPU,
        (
            "tokenizer.vocab_size=512",
            "tokenizer.train_bytes=1_000_000",
            "model.depth=2",
            "model.width=32",
            "model.attention.heads=2",
            "data.sequence=32",
            "data.batch=4",
            "train.steps=20",
            "train.log_every=5",
            "evaluation.every=10",
            "evaluation.positions=2000",
            "evaluation.sample_tokens=16",
            "checkpoint.every=10",
        ),
    ),
    "cpu": CPU,
    "chip": override(
        CPU,
        (
            "tokenizer.vocab_size=8192",
            "model.depth=12",
            "model.width=512",
            "model.attention.heads=8",
            "model.layers=scan",
            "data.sequence=1024",
            "data.batch=64",
            "train.steps=1000",
        ),
    ),
}


def trials(preset: str) -> list[Config]:
    """Return the one run of this experiment."""
    return [PRESETS[preset]]


def measure(run: Run) -> dict:
    """Return what the classic compressors make of the very documents that the model was evaluated on."""
    sizes = {}
    for corpus in run.prepared.corpora:
        chosen = heldout_selection(corpus.heldout, run.config.data, run.config.evaluation.positions)
        text = heldout_text(corpus.heldout, chosen.documents)
        sizes[corpus.name] = {"hash": chosen.hash, "bytes": len(text), "compressed": compressed_sizes(text)}
    return sizes


def claim(evaluation: dict, baseline: dict) -> Claim:
    """Return the claim about one corpus, decided at two standard errors over documents."""
    gzip = 8 * baseline["compressed"]["gzip -9"] / baseline["bytes"]
    ours, error = evaluation["bits_per_byte"], evaluation["bits_per_byte_error"]
    if error is None:  # of a single document
        verdict, shown = "undecided", f"{ours:.3f} (1 document: no error can be given)"
    else:
        verdict = "holds" if ours + 2 * error < gzip else "fails" if ours - 2 * error > gzip else "undecided"
        shown = f"{ours:.3f} ± {2 * error:.3f} (two standard errors over {evaluation['documents']} documents)"
    return Claim(
        f"On held-out documents of {evaluation['name']} the model needs fewer bits per byte than gzip -9.",
        verdict,
        f"{shown} against {gzip:.3f} for gzip -9, on the same {evaluation['bytes']:,} bytes; 1 seed",
    )


def analyse(trials: list[Trial]) -> Report:
    """Return the page: the comparison, curves, samples and what was trained."""
    (trial,) = trials
    last = trial.result["evaluations"]
    return Report(
        title="Quickstart: a tiny language model from raw text",
        question="Does a tiny model, trained for minutes, predict unseen text in fewer bits per byte than gzip -9?",
        source="Delétang et al., Language Modeling Is Compression (2023); the model's own bytes are left out",
        command="python -m experiments.run quickstart",
        claims=tuple(claim(evaluation, trial.measured[evaluation["name"]]) for evaluation in last),
        items=(
            *(_comparison(evaluation, trial.measured[evaluation["name"]]) for evaluation in last),
            *_curves(trial),
            *_samples(trial),
            *derived_tables(trial.result["derived"]),
            _data(trial.result["manifest"]),
            Text("Config", json.dumps(to_json(trial.config), indent=2), monospace=True),
        ),
    )


def _comparison(evaluation: dict, baseline: dict) -> Table:
    error = evaluation["bits_per_byte_error"]
    rows = [("this model", evaluation["bits_per_byte"], error)]
    rows += [(name, 8 * size / baseline["bytes"], None) for name, size in baseline["compressed"].items()]
    return Table(
        f"Bits per byte on held-out documents: {evaluation['name']}",
        ("method", "bits per byte", "standard error"),
        tuple(sorted(rows, key=lambda row: row[1])),
        caption=f"{evaluation['documents']} documents, {evaluation['bytes']:,} bytes, {evaluation['tokens']:,} tokens, "
        f"evaluation set {evaluation['hash']}. The model: {evaluation['nats_per_token']:.4f} nats per token. "
        "Compressors work on all documents end to end. The error is over documents.",
    )


def _curves(trial: Trial) -> tuple[Plot, ...]:
    step, loss = trial.curve("train", "loss")
    held = [
        Series(f"held out: {e['name']}", *trial.curve("evaluation", "nats_per_token", e["name"]), style="both")
        for e in trial.result["evaluations"]
    ]
    speed = trial.curve("train", "tokens_per_second")
    return (
        Plot("loss", "Loss", "step", "nats per token", (Series("training", step, loss), *held)),
        Plot(
            "learning_rate",
            "Learning rate",
            "step",
            "learning rate",
            (Series("learning rate", *trial.curve("train", "learning_rate")),),
        ),
        Plot("throughput", "Throughput", "step", "tokens per second", (Series("tokens/s", *speed),)),
    )


def _samples(trial: Trial) -> tuple[Text, ...]:
    rows = [row for row in trial.rows if row["kind"] == "sample"]
    last = max((row["step"] for row in rows), default=0)
    prompt = trial.config.evaluation.prompt
    begun = f"begun with {prompt!r}" if prompt else "from the start of a document"
    return tuple(
        Text(f"Sample {row['number'] + 1} after {last} steps, {begun}", row["text"], monospace=True)
        for row in rows
        if row["step"] == last
    )


def _data(manifest: dict) -> Table:
    rows = []
    for corpus in manifest["corpora"]:
        for split in ("train", "heldout"):
            rows.append((corpus["name"], split, *(corpus[split][k] for k in ("documents", "tokens", "bytes"))))
    return Table("Data", ("corpus", "split", "documents", "tokens", "bytes"), tuple(rows))
