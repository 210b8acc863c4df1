"""What each way of keeping the text abilities costs in answers about pictures: `python -m benchmarks.levers`.

    python -m benchmarks.levers [--steps=N] [--seeds=N] [--workdir=DIR] [--output=FILE.json] [--figure=FILE.png]

Short distillations on the built-in world, each with one lever moved and the others off: BART's learning rate, text-only
denoising beside the pairs, a pull of BART to its start, and an early stop on text-only questions. Each is asked about
pictures and, without any, about descriptions. The same command goes on where it was cut off: of runs that are done the
figures stand in FILE.json, others resume from their checkpoints in DIR.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from ml_collections import ConfigDict

from benchmarks import timing
from vlkd_jax.compile_cache import use_cache
from vlkd_jax.configs import shapes_vlkd, suites
from vlkd_jax.evaluate import evaluate, read_items
from vlkd_jax.metrics import read_metrics
from vlkd_jax.storage import locate, write_atomic
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD

OFF = {"optim.lr": 3e-4, "loss.denoise": 0.0, "loss.l2": 0.0, "early_stop.max_drop": 0.0}
"""The demo's learning rate, and every lever off (an early stop of 0 is none here)."""
VALUES = {
    "optim.lr": (3e-5, 1e-4, 3e-4, 1e-3),
    "loss.denoise": (0.1, 0.3, 1.0),
    "loss.l2": (1e-3, 1e-2, 1e-1),
    "early_stop.max_drop": (0.003, 0.01),
}
NAMES = {
    "optim.lr": "BART's learning rate",
    "loss.denoise": "replayed texts, weight",
    "loss.l2": "pull to the start, weight",
    "early_stop.max_drop": "early stop, share lost",
}
TASKS = ("vqa", "text_qa")
QUESTIONS = 1050
"""Of each kind, about pictures and about descriptions; the pictures hold kinds of object that no training scene has."""


def runs() -> list[tuple[str, float]]:
    """(lever, its value), the one with every lever off once and first."""
    off = ("optim.lr", OFF["optim.lr"])
    others = [(lever, value) for lever, values in VALUES.items() for value in values]
    return [off, *(run for run in others if run != off)]


def name_of(lever: str, value: float) -> str:
    """What a run is called in the results, and its folder."""
    return f"{lever}={value:g}"


def config_of(lever: str, value: float, seed: int, steps: int) -> ConfigDict:
    """The demo's configuration, shorter, with one lever moved."""
    config = shapes_vlkd.get_config()
    config.seed, config.steps, config.save_every, config.keep = seed, steps, steps, 1
    config.update_from_flattened_dict({**OFF, lever: value})
    config.eval.every, config.eval.questions = max(steps // 5, 1), 512
    config.early_stop.metric = "retention/text_qa" if lever == "early_stop.max_drop" else ""
    return config


def measure(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains and asks: shares of right answers with their intervals, and what training measured at its last step."""
    step = int(train(config, workdir).step)
    chosen = suites.get_config("shapes")
    chosen.batch_size = 128
    chosen.shapes.update(
        seed=config.seed, questions=QUESTIONS, text_questions=QUESTIONS, captions=1, retrieval=2, baselines=False
    )
    ((_, metrics),) = evaluate(chosen, read_items(chosen), VLKD.from_run(workdir), locate(workdir / "asked"))
    measured = {
        row["step"]: {name: value for name, value in row.items() if name.startswith(("held_out/", "retention/"))}
        for row in read_metrics(workdir / "metrics.jsonl")[0]
        if row["kind"] == "eval"
    }
    asked = {name: {key: metrics[name][key] for key in ("overall", "overall_interval", "n")} for name in TASKS}
    return {"step": step, **asked, "held_out": measured[step], "at_start": measured[0]}


AXES = {
    "text-only questions right, %": lambda run, when: 100 * (run["text_qa"]["overall"] if when == "held_out" else 1),
    "denoising loss of held-out texts, nats a token": lambda run, when: run[when]["retention/denoise_loss"],
}
"""What has to stay: name -> (a run, "held_out" or "at_start") -> its figure; at the start every question is right."""


def draw(result: dict[str, Any], figure: Path) -> None:
    """Text abilities against answers about pictures, one line a lever; each run is a small mark, means are large."""
    _, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    off = list(result["runs"].get(name_of(*runs()[0]), {}).values())
    for axis, (label, figure_of) in zip(axes, AXES.items(), strict=True):
        for lever, name in NAMES.items():
            points = {value: list(result["runs"].get(name_of(lever, value), {}).values()) for value in VALUES[lever]}
            points |= {} if lever == runs()[0][0] else {0.0: off}
            measured = {
                value: [(figure_of(run, "held_out"), 100 * run["vqa"]["overall"]) for run in seeds]
                for value, seeds in points.items()
                if seeds
            }
            means = {value: tuple(map(statistics.mean, zip(*some, strict=True))) for value, some in measured.items()}
            (line,) = axis.plot(*zip(*sorted(means.values()), strict=True), marker="o", label=name)
            for value, place in means.items():
                axis.plot(*zip(*measured[value], strict=True), ".", color=line.get_color(), alpha=0.4)
                if value:
                    axis.annotate(f"{value:g}", place, textcoords="offset points", xytext=(5, 4), fontsize=8)
        start = statistics.mean(figure_of(run, "at_start") for run in off)
        axis.axvline(start, color="0.6", linestyle=":", label="before distillation")
        axis.set_xlabel(label)
        axis.grid(color="0.92")
    axes[1].invert_xaxis()  # to the right is better in both
    axes[0].set_ylabel("questions about pictures right, zero-shot, %")
    axes[0].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(figure, dpi=110)


def table(result: dict[str, Any]) -> str:
    """A row a run, mean over the seeds (and each seed), per cent."""

    def cell(seeds: dict[str, Any], name: str) -> str:
        values = [100 * run[name]["overall"] for run in seeds.values()]
        return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"

    head = "| lever | value | stopped at | about pictures | text-only | denoising loss, before and after |"
    lines = [head, "|---|---|---|---|---|---|"]
    for lever, value in runs():
        if seeds := result["runs"].get(name_of(lever, value)):
            losses = [
                " to ".join(f"{run[when]['retention/denoise_loss']:.3f}" for when in ("at_start", "held_out"))
                for run in seeds.values()
            ]
            steps = ", ".join(str(run["step"]) for run in seeds.values())
            cells = (NAMES[lever], f"{value:g}", steps, cell(seeds, "vqa"), cell(seeds, "text_qa"), ", ".join(losses))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Trains what is not done yet, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of 64 pairs, a run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workdir", type=Path, default=Path("runs/levers"))
    parser.add_argument("--output", type=Path, default=Path("levers.json"))
    parser.add_argument("--figure", type=Path, default=Path("levers.png"))
    options = parser.parse_args()
    use_cache()
    circumstances = timing.circumstances(options)
    for name in ("workdir", "figure"):
        circumstances["settings"].pop(name)
    result = json.loads(options.output.read_text()) if options.output.is_file() else circumstances | {"runs": {}}
    if result["settings"] != circumstances["settings"]:
        parser.error(f"{options.output}: of other settings, {result['settings']}; give another --output and --workdir")
    for seed in range(options.seeds):
        for lever, value in runs():
            of_run = result["runs"].setdefault(name_of(lever, value), {})
            if str(seed) not in of_run:
                config = config_of(lever, value, seed, options.steps)
                of_run[str(seed)] = measure(config, options.workdir / name_of(lever, value) / str(seed))
                write_atomic(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))
    draw(result, options.figure)


if __name__ == "__main__":
    main()
