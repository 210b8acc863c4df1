"""The whole job on the built-in world, on one CPU: `python -m vlkd_jax.shapes.demo --workdir=DIR --seed=N`.

Takes the two models that come with the package, distils, evaluates the student as it started and as it is now, and
writes DIR/demo.json, DIR/report/index.html and DIR/export. `launch/demo.sh` runs it in an environment of its own.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlkd_jax import console, entry
from vlkd_jax.checkpoint import check_directory
from vlkd_jax.commands import COMMANDS
from vlkd_jax.configs import shapes_vlkd, suites
from vlkd_jax.console import say
from vlkd_jax.evals.runner import read_rows
from vlkd_jax.evaluate import circumstances, evaluate, read_items
from vlkd_jax.hf.export import export
from vlkd_jax.hf.student import is_student
from vlkd_jax.runs import run_config
from vlkd_jax.shapes.report import write_report
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD
from vlkd_jax.workdir import output_directory, write_atomic

SUITES = ("shapes", "shapes_seen")
"""Held-out scenes with objects of kinds that no training scene has, and new scenes of kinds that training saw."""
EXPORT = "export"


class Stages:
    """Seconds of each stage, told as they begin."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.monotonic()

    def begin(self, name: str, text: str) -> None:
        """Ends the stage before and begins another; an empty name only ends."""
        now = time.monotonic()
        if self._name:
            self.seconds[self._name] = round(now - self._since, 1)
        self._name, self._since = name, now
        if name:
            say(f"== {text}")


def run_demo(workdir: Path, seed: int, setup_seconds: float) -> dict[str, Any]:
    """Runs every stage; returns what demo.json holds: figures on unseen kinds and, as `seen_kinds`, on the others."""
    started, stages = time.monotonic(), Stages()
    config, chosen = shapes_vlkd.get_config(), suites.get_config(",".join(SUITES))
    config.seed = seed
    for name in SUITES:
        chosen[name].seed = seed
    chosen.batch_size = 128
    stages.begin("distillation", f"1/4 distillation: {config.steps} steps of {config.batch_size} image-caption pairs")
    state = train(config, workdir / "train")
    asked = sum(chosen[name].questions for name in SUITES)
    stages.begin("evaluation", f"2/4 the student before and after, {asked:,} held-out questions, seed {seed}")
    model, start = (VLKD.from_run(workdir / "train", at_start=at_start) for at_start in (False, True))
    metrics = dict(evaluate(chosen, read_items(chosen), model, workdir, start))
    summaries = {name: _summary(metrics[name]["before"], metrics[name]) for name in SUITES}
    stages.begin("report", "3/4 report")
    result = summaries["shapes"] | {"seen_kinds": summaries["shapes_seen"], "steps": int(state.step)}
    result |= circumstances(seed)
    rows, curves = read_rows(workdir / "shapes"), workdir / "train" / "metrics.jsonl"
    write_report(workdir / "report", result, rows, curves, chosen.shapes)
    stages.begin("export", "4/4 export: the student as Hugging Face directories")
    _export(model, workdir, {"suites": metrics} | circumstances(seed))
    stages.begin("", "")
    result |= {
        "stage_seconds": stages.seconds,
        "setup_seconds": setup_seconds,
        "run_seconds": round(time.monotonic() - started, 1),
    }
    write_atomic(workdir / "demo.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def _export(model: VLKD, workdir: Path, evaluation: dict[str, Any]) -> None:
    """Writes DIR/export, in place of the one that a demo before this one wrote there."""
    if is_student(workdir / EXPORT):
        shutil.rmtree(workdir / EXPORT)
    run = json.loads(run_config(workdir / "train").to_json_best_effort())
    command = f"vlkd demo --workdir=DIR --seed={run['seed']}"
    export(model, workdir / EXPORT, run=run, command=command, evaluation=evaluation)


def _summary(before: dict, after: dict) -> dict[str, Any]:
    """The figures of demo.json, fractions between 0 and 1, with their 95% intervals."""

    def change(of: Callable[[dict], dict], name: str) -> dict[str, Any]:
        pair = (("before", of(before)), ("after", of(after)))
        return {f"{when}{end}": metrics[f"{name}{end}"] for when, metrics in pair for end in ("", "_interval")}

    by_type = {
        kind: {
            "before": before["vqa"]["by_type"][kind]["accuracy"],
            "before_interval": before["vqa"]["by_type"][kind]["interval"],
            "after": figures["accuracy"],
            "after_interval": figures["interval"],
            "blind": after["vqa_blind"]["by_type"][kind]["accuracy"],
            "majority": after["vqa_majority"][kind],
            "n": figures["n"],
        }
        for kind, figures in after["vqa"]["by_type"].items()
    }
    return {
        "n": after["vqa"]["n"],
        "vqa": {
            **change(lambda metrics: metrics["vqa"], "overall"),
            "blind": after["vqa_blind"]["overall"],
            "majority": after["vqa_majority"]["overall"],
            "by_type": by_type,
        },
        "caption": {name: change(lambda metrics: metrics["caption"], name) for name in ("attribute_f1", "exact_match")}
        | {"n": after["caption"]["n"], "distinct": after["caption"]["distinct"]},
        "text_qa": {
            **change(lambda metrics: metrics["text_qa"], "overall"),
            "n": after["text_qa"]["n"],
        },
        "retrieval": {**after["retrieval"], "before": before["retrieval"]["r_at_1"]},
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text, per cent: first on kinds of object that no training scene has, then on the others."""

    def cell(value) -> str:
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    lines = []
    for title, figures in (("kinds never seen", result), ("kinds seen in training", result["seen_kinds"])):
        rows = [(row[0], *map(cell, row[1:])) for row in _rows(figures)]
        lines += [console.table(rows, (title, "before", "after", "blind", "majority", "n")), ""]
    return "\n".join(lines[:-1])


def _rows(figures: dict[str, Any]) -> list[tuple]:
    """(name, before, after, blind, majority, n) of every figure; "" where there is none."""
    vqa, caption, text_qa, retrieval = (figures[k] for k in ("vqa", "caption", "text_qa", "retrieval"))
    rows = [("zero-shot VQA", vqa["before"], vqa["after"], vqa["blind"], vqa["majority"], figures["n"])]
    rows += [
        (f"  {kind}", f["before"], f["after"], f["blind"], f["majority"], f["n"]) for kind, f in vqa["by_type"].items()
    ]
    for name in ("attribute_f1", "exact_match"):
        rows.append((f"caption {name}", caption[name]["before"], caption[name]["after"], "", "", caption["n"]))
    rows.append(("text-only QA", text_qa["before"], text_qa["after"], "", "", text_qa["n"]))
    rows.append(("retrieval R@1", retrieval["before"], retrieval["r_at_1"], "", "", retrieval["n"]))
    return [*rows, ("  CLIP's own text tower", "", retrieval["clip_r_at_1"], "", "", retrieval["n"])]


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    check_directory(values.workdir)
    workdir = output_directory(values.workdir)
    result = run_demo(workdir, values.seed, values.setup_seconds)
    say(table(result))
    say(f"set-up {result['setup_seconds']:.0f} s, run {result['run_seconds']:.0f} s")
    say(f"figures: {workdir / 'demo.json'}\nreport:  {workdir / 'report' / 'index.html'}")
    say(f"export:  {workdir / EXPORT}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["demo"])
