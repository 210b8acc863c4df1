"""Zero-shot evaluation of a run's newest checkpoint.

`python -m vlkd_jax.evaluate --config=suites:NAME[,NAME] --checkpoint=DIR --workdir=OUT`, DIR being the
workdir of a training run. Writes OUT/metrics.json and OUT/NAME/predictions.jsonl.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.errors import UserError
from vlkd_jax.evals.suite import Row, predict_rows
from vlkd_jax.evals.suites import SUITES
from vlkd_jax.metrics import peak_memory, say
from vlkd_jax.vlkd import VLKD, run_config
from vlkd_jax.workdir import output_directory, write_atomic

PREDICTIONS = "predictions.jsonl"


def check_suites(suites: ConfigDict) -> None:
    """Raises UserError naming the fields of the chosen suites that have no value yet, such as the file of questions."""
    empty = [f"config.{name}.{field}" for name in suites.suites for field, value in suites[name].items() if value == ""]
    if empty:
        raise UserError(f"to be set: {', '.join(f'--{field}=...' for field in empty)}")


def evaluate(suites: ConfigDict, model: VLKD, workdir: Path, start: VLKD | None = None) -> dict[str, Any]:
    """Runs every suite of `suites.suites`; writes each one's predictions and returns the metrics by suite.

    Args:
      start: the student before distillation; suites with `baselines` set are run for it too, as `before`, with its
        predictions below `workdir/before`.
    """
    results: dict[str, Any] = {}
    for name in suites.suites:
        suite, before = suites[name], time.monotonic()
        metrics = _run(suite, model, suites.batch_size, workdir / name)
        if start is not None and suite.get("baselines"):
            plain = suite.copy_and_resolve_references()
            with plain.unlocked():
                plain.baselines = False
            metrics["before"] = _run(plain, start, suites.batch_size, workdir / "before" / name)
        results[name] = {**metrics, "suite": suite.to_dict(), "seconds": round(time.monotonic() - before, 2)}
        say(f"{name}: {results[name]['seconds']:.1f} s, {workdir / name / PREDICTIONS}")
    return results


def _run(suite: ConfigDict, model: VLKD, batch_size: int, directory: Path) -> dict[str, Any]:
    kind = SUITES[suite.kind]
    rows = list(predict_rows(kind, suite, model, batch_size))
    write_rows(directory, rows)
    return kind.score(rows)


def write_rows(directory: Path, rows: list[Row]) -> None:
    """One JSON object a line, to `directory/predictions.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(directory / PREDICTIONS, lines.encode())


def read_rows(directory: Path) -> list[Row]:
    """The rows that `write_rows` wrote there."""
    return [json.loads(line) for line in (directory / PREDICTIONS).read_text(encoding="utf-8").splitlines()]


def circumstances(seed: int) -> dict[str, Any]:
    """What a figure depends on beside the model: versions, devices, seed, date."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "pillow")
    return {
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "machine": platform.machine(),
    }


def main() -> None:
    """Entry point."""
    suites = flags.FLAGS.config
    if "suites" not in suites:
        raise UserError("--config is not one of suites; give --config=suites:NAME[,NAME], such as suites:shapes")
    check_suites(suites)
    checkpoint = flags.FLAGS.checkpoint
    model = VLKD.from_run(checkpoint)
    wants_start = any(suites[name].get("baselines") for name in suites.suites)
    start = VLKD.from_run(checkpoint, at_start=True) if wants_start else None
    workdir, config = output_directory(flags.FLAGS.workdir), run_config(checkpoint)
    results = evaluate(suites, model, workdir, start)
    result = {"suites": results, "checkpoint": model.identity, **circumstances(config.seed)}
    result |= {"dtype": config.dtype, "batch_size": suites.batch_size, "decoding": "greedy"}
    result["peak_memory"] = peak_memory()
    write_atomic(workdir / "metrics.json", (json.dumps(result, indent=1) + "\n").encode())
    say(f"wrote {workdir / 'metrics.json'}")
    for name, metrics in results.items():
        say(f"{name}: " + "  ".join(_headlines(metrics)))


def _headlines(metrics: dict[str, Any], prefix: str = "") -> list[str]:
    names = ("overall", "exact_match", "attribute_f1", "word_f1", "r_at_1", "clip_r_at_1")
    lines = [f"{prefix}{name} {metrics[name]:.3f}" for name in names if name in metrics]
    for name in ("vqa", "vqa_blind", "vqa_majority", "caption", "text_qa", "retrieval"):
        if name in metrics:
            lines += _headlines(metrics[name], f"{name}/")
    return lines


if __name__ == "__main__":
    entry.run(main, COMMANDS["evaluate"])
