"""Zero-shot evaluation of a run's newest checkpoint.

`python -m vlkd_jax.evaluate --config=suites:NAME[,NAME] --checkpoint=DIR --workdir=OUT`, DIR being the
workdir of a training run. Writes OUT/metrics.json and OUT/NAME/predictions.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from vlkd_jax import entry, sharding
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.commands import COMMANDS
from vlkd_jax.config import with_defaults
from vlkd_jax.data.sources import read_json
from vlkd_jax.distill import Objective, make_objective
from vlkd_jax.errors import UserError
from vlkd_jax.evals import pairs_suite
from vlkd_jax.identity import check_inputs, hash_inputs
from vlkd_jax.metrics import peak_memory, say
from vlkd_jax.optim import make_optimizer
from vlkd_jax.predict import Predictor
from vlkd_jax.shapes.suite import ShapesSuite
from vlkd_jax.train import start_state
from vlkd_jax.types import Params
from vlkd_jax.workdir import CONFIG_FILE, output_directory, write_atomic


def load_run(directory: str | Path) -> tuple[ConfigDict, Objective, Params, int]:
    """(config, objective as its training started, trained parameters, step) of a training run's newest checkpoint.

    Raises:
      UserError: no run there, no checkpoint yet, or the models it names have moved or changed.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no {CONFIG_FILE} there; --checkpoint is the --workdir of a training run")
    config = ConfigDict(with_defaults(read_json(path)))
    check_inputs(Path(directory), config, hash_inputs(config))
    objective = make_objective(config)
    mesh = sharding.make_mesh(1)
    optimizer = make_optimizer(config.optim, config.steps)
    empty = jax.eval_shape(lambda: start_state(objective, optimizer, mesh))
    shared = sharding.replicated(mesh)
    empty = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared), empty)
    with Checkpoints(Path(directory) / "checkpoints") as checkpoints:
        step, state, _ = checkpoints.restore(empty)
    set_at_start = {name: value for name, value in state.params.items() if name == "image_whitening"}
    return config, dataclasses.replace(objective, params=objective.params | set_at_start), state.params, step


def check_suites(suites: ConfigDict) -> None:
    """Raises UserError naming the fields of the chosen suites that have no value yet, such as the file of questions."""
    empty = [f"config.{name}.{field}" for name in suites.suites for field, value in suites[name].items() if value == ""]
    if empty:
        raise UserError(f"to be set: {', '.join(f'--{field}=...' for field in empty)}")


def evaluate(suites: ConfigDict, predictor: Predictor, params: Params, start: Params, workdir: Path) -> dict[str, Any]:
    """Runs every suite of `suites.suites`; writes each one's predictions and returns the metrics by suite."""
    results: dict[str, Any] = {}
    for name in suites.suites:
        suite = suites[name]
        before = time.monotonic()
        if suite.kind == "shapes":
            metrics, rows = _shapes(suite, predictor, params, start)
        else:
            run = {"vqa": pairs_suite.vqa, "caption": pairs_suite.captions}[suite.kind]
            metrics, rows = run(suite, predictor, params)
        write_predictions(workdir / name, rows)
        seconds = round(time.monotonic() - before, 2)
        results[name] = {**metrics, "suite": suite.to_dict(), "seconds": seconds}
        say(f"{name}: {len(rows)} predictions in {seconds:.1f} s, {workdir / name / 'predictions.jsonl'}")
    return results


def _shapes(suite: ConfigDict, predictor: Predictor, params: Params, start: Params):
    runner = ShapesSuite(suite, predictor)
    metrics, rows = runner.run(params, blind=suite.baselines)
    if suite.baselines:
        metrics["vqa_majority"] = runner.majority()
        metrics["before"], _ = runner.run(start)
    return metrics, rows


def write_predictions(directory: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line, to `directory/predictions.jsonl`."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(directory / "predictions.jsonl", lines.encode())


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
    config, objective, params, step = load_run(flags.FLAGS.checkpoint)
    if objective.teacher is None:
        raise UserError(
            f"{flags.FLAGS.checkpoint}: a run of objective {config.objective}; suites need one of objective vlkd"
        )
    workdir = output_directory(flags.FLAGS.workdir)
    predictor = Predictor(objective, config.student.image_tokens, suites.batch_size)
    results = evaluate(suites, predictor, params, objective.params, workdir)
    result = {
        "suites": results,
        "checkpoint": {"directory": str(Path(flags.FLAGS.checkpoint).absolute()), "step": step},
        **circumstances(config.seed),
    }
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
