"""Zero-shot evaluation of a run's newest checkpoint.

`python -m vlkd_jax.evaluate --config=suites:NAME[,NAME] --checkpoint=DIR --workdir=OUT`, DIR being the
workdir of a training run. Writes OUT/NAME/predictions.jsonl as batches are done, and OUT/metrics.json with each suite;
for suites of published benchmarks also OUT/NAME/results.json in their servers' form.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from vlkd_jax import entry, processes
from vlkd_jax.commands import COMMANDS
from vlkd_jax.data.sources import counted, has_lone_surrogate
from vlkd_jax.errors import UserError
from vlkd_jax.evals.suite import Match, Prompt, Row, Suite, predict_rows
from vlkd_jax.evals.suites import SUITES
from vlkd_jax.metrics import peak_memory, say
from vlkd_jax.sharding import make_mesh
from vlkd_jax.storage import AnyPath, Mirror, locate, make_directory, write_atomic
from vlkd_jax.vlkd import VLKD, run_config

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
METRICS = "metrics.json"

TEMPLATES = {
    "question_encoder": {"question": "why?"},
    "question_decoder": {"question": "why?"},
    "caption_encoder": {},
    "caption_decoder": {},
    "image_name": {"image_id": 1},
}
"""Fields of suites that are templates, with an example of what is filled in."""


def check_suites(suites: ConfigDict) -> None:
    """Raises UserError naming fields of the chosen suites that no evaluation can use.

    These are fields that have no value yet, such as the file of questions, templates with a field that is not filled
    in, and numbers that are too small.
    """
    for name in suites.suites:
        if name not in suites or suites[name].get("kind") not in SUITES:
            kinds = ", ".join(SUITES)
            raise UserError(f"config.{name} is no suite; a suite is a group of fields with a kind, one of {kinds}")
    empty = [f"config.{name}.{field}" for name in suites.suites for field, value in suites[name].items() if value == ""]
    if empty:
        raise UserError(f"to be set: {', '.join(f'--{field}=...' for field in empty)}")
    if suites.batch_size < 1:
        raise UserError(f"config.batch_size is {suites.batch_size}; it must be at least 1")
    for name in suites.suites:
        for field, value in suites[name].items():
            if field in TEMPLATES:
                _check_template(f"config.{name}.{field}", value, TEMPLATES[field])
            if field.endswith("_tokens") and value < 1:
                raise UserError(f"config.{name}.{field} is {value}; it must be at least 1")


def _check_template(field: str, template: str, filled: dict[str, Any]) -> None:
    try:
        template.format(**filled)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as e:
        names = f"only {{{next(iter(filled))}}} is filled in there" if filled else "nothing is filled in there"
        raise UserError(f"--{field}={template!r}: {names}; a brace that is meant is written twice") from e


def read_items(suites: ConfigDict) -> dict[str, list[Prompt | Match]]:
    """What each suite asks. All of it is read and checked here, before anything is computed.

    Raises:
      UserError: a suite that has fields without a value, or files that cannot be used.
    """
    check_suites(suites)
    return {name: list(SUITES[suites[name].kind].items(suites[name])) for name in suites.suites}


def evaluate(
    suites: ConfigDict,
    items: dict[str, list[Prompt | Match]],
    model: VLKD,
    workdir: AnyPath,
    start: VLKD | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs every suite of `suites.suites` and gives (name, metrics) when it is done, its predictions on disk.

    Args:
      items: of `read_items`.
      start: the student before distillation; suites with `baselines` set are run for it too, as `before`, with its
        predictions below `workdir/before`.
    """
    for name in suites.suites:
        suite, began = suites[name], time.monotonic()
        kind = SUITES[suite.kind]
        metrics = _run(kind, items[name], model, suites.batch_size, workdir / name)
        if start is not None and suite.get("baselines"):
            plain = suite.copy_and_resolve_references()
            with plain.unlocked():
                plain.baselines = False
            metrics["before"] = _run(kind, kind.items(plain), start, suites.batch_size, workdir / "before" / name)
        metrics |= {"suite": suite.to_dict(), "seconds": round(time.monotonic() - began, 2)}
        say(f"{name}: {metrics['seconds']:.1f} s, {workdir / name / PREDICTIONS}")
        yield name, metrics


def _run(
    kind: Suite, items: Iterable[Prompt | Match], model: VLKD, batch_size: int, directory: AnyPath
) -> dict[str, Any]:
    rows = write_rows(directory, predict_rows(kind, items, model, batch_size))
    scored = [row for row in rows if "score" in row]
    metrics = kind.score(scored) if scored else {"n": 0}
    faults = Counter(row["fault"] for row in rows if "fault" in row)
    metrics |= {"left_out": dict(faults)} if faults else {}
    unscored = len(rows) - len(scored) - faults.total()
    metrics |= {"unscored": unscored} if unscored else {}
    escaped = sum(has_lone_surrogate(json.dumps(row, ensure_ascii=False)) for row in rows)
    if escaped:
        say(f"{directory / PREDICTIONS}: {escaped} row(s) hold half an emoji, which stands escaped; the model read ?")
        metrics["escaped"] = escaped
    if kind.results and processes.is_first():
        text = json.dumps(kind.results(rows), indent=1)
        write_atomic(directory / RESULTS, (text + "\n").encode())
    return metrics


def write_rows(directory: AnyPath, rows: Iterable[Row]) -> list[Row]:
    """Writes rows as they come, a JSON object a line, and returns them. Every process calls it, process 0 writes.

    They go to `directory/predictions.jsonl.part`, which becomes predictions.jsonl at the end: what had been computed
    stays there whatever happens, in an object store as far as `storage.Mirror` had copied it. Half an emoji (a lone
    surrogate), which UTF-8 cannot hold, becomes its JSON escape.
    """
    if not processes.is_first():
        return list(rows)
    written = []
    with Mirror(make_directory(directory)) as mirror:
        part = mirror.local / f"{PREDICTIONS}.part"
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
            mirror.copy()  # over the part that a run cut off has left
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
                written.append(row)
                if mirror.due():
                    mirror.copy()
        part.replace(mirror.local / PREDICTIONS)
    return written


def read_rows(directory: AnyPath) -> list[Row]:
    """The rows that `write_rows` wrote there."""
    return [json.loads(line) for line in (directory / PREDICTIONS).read_bytes().decode().split("\n") if line]


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
    checkpoint, moved = flags.FLAGS.checkpoint, {"clip": flags.FLAGS.clip, "bart": flags.FLAGS.bart}
    config, items = run_config(checkpoint), read_items(suites)
    results, workdir, mesh = {}, locate(flags.FLAGS.workdir), make_mesh(suites.mesh)
    processes.on_first(lambda: os.fspath(make_directory(workdir)))
    model = VLKD.from_run(checkpoint, **moved, mesh=mesh)
    wants_start = any(suites[name].get("baselines") for name in suites.suites)
    start = VLKD.from_run(checkpoint, at_start=True, **moved, mesh=mesh) if wants_start else None
    about = {"checkpoint": model.identity, **circumstances(config.seed), "dtype": config.dtype}
    about |= {"batch_size": suites.batch_size, "decoding": "greedy", "mesh": dict(mesh.shape)}
    for name, metrics in evaluate(suites, items, model, workdir, start):
        results[name] = metrics
        unfinished = [other for other in suites.suites if other not in results]
        result = {"suites": results, "unfinished": unfinished, **about, "peak_memory": peak_memory()}
        if processes.is_first():
            write_atomic(workdir / METRICS, (json.dumps(result, indent=1) + "\n").encode())
    say(f"wrote {workdir / METRICS}")
    for name, metrics in results.items():
        say(f"{name}: " + "  ".join(_headlines(metrics)))
    check_left_out(suites, results)


def check_left_out(suites: ConfigDict, results: dict[str, Any]) -> None:
    """Raises UserError when pictures that proved damaged on decoding are more than a suite allows."""
    for name, metrics in results.items():
        left_out = Counter(metrics.get("left_out", {}))
        limit = suites[name].get("max_unusable", 0.0)
        if left_out and left_out.total() > limit * (left_out.total() + metrics["n"] + metrics.get("unscored", 0)):
            raise UserError(
                f"{name}: {left_out.total()} items are left out of the score ({counted(left_out)}), "
                f"config.{name}.max_unusable is {limit:g}; mend their pictures or raise it"
            )


def _headlines(metrics: dict[str, Any], prefix: str = "") -> list[str]:
    names = ("overall", "exact_match", "attribute_f1", "word_f1", "r_at_1", "clip_r_at_1")
    lines = [f"{prefix}{name} {metrics[name]:.3f}" for name in names if name in metrics]
    lines += [f"{prefix}{name} {metrics[name]}" for name in ("unscored", "escaped") if name in metrics]
    for name in ("vqa", "vqa_blind", "vqa_majority", "caption", "text_qa", "retrieval"):
        if name in metrics:
            lines += _headlines(metrics[name], f"{name}/")
    return lines


if __name__ == "__main__":
    entry.run(main, COMMANDS["evaluate"])
