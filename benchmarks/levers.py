"""What each way of keeping the text abilities costs in answers about pictures: `python -m benchmarks.levers`.

    python -m benchmarks.levers [--steps=N] [--seeds=N] [--workdir=DIR] [--output=FILE.json] [--figure=FILE.png]

Short distillations on the built-in world: BART's learning rate alone, and at two rates one more lever: texts
restored beside the pairs, a pull of BART to its start, or an early stop on text-only questions. Each is asked about
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
from vlkd_jax.data.streams import held_out, make_source
from vlkd_jax.evals.retention import mean_terms, without_dropout
from vlkd_jax.evaluate import evaluate, read_items
from vlkd_jax.storage import locate, write_atomic
from vlkd_jax.tasks import make_task
from vlkd_jax.train import train
from vlkd_jax.types import Params
from vlkd_jax.vlkd import VLKD

OFF = {"loss.denoise": 0.0, "loss.l2": 0.0, "early_stop.max_drop": 0.0}
"""Every lever off (an early stop of 0 is none here)."""
RATE = "optim.lr"
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""Of BART; 3e-4 is the demo's."""
CAPTIONS = "captions.txt"
CAPTION_COUNT = 20_000
"""Of training scenes, without pictures: what can be replayed where the texts that BART was made of are not there."""
LEVERS: dict[str, tuple[str, tuple[float, ...], dict[str, str]]] = {
    "BART's texts replayed, weight": ("loss.denoise", (0.1, 1.0), {}),
    "captions replayed, weight": ("loss.denoise", (0.1, 1.0), {"data.replay": CAPTIONS}),
    "pull to the start, weight": ("loss.l2", (1e-2, 1e-1), {}),
    "early stop, share lost": ("early_stop.max_drop", (0.01, 0.05), {}),
}
"""Name -> field, its values, and what else is set with it."""
AT_RATES = (3e-4, 1e-3)
"""At which rates the levers are moved: where little of the text abilities is lost, and where much is."""
Setting = dict[str, float | str]
TASKS = ("vqa", "text_qa")
QUESTIONS = 1050
"""Of each kind, about pictures and about descriptions; the pictures hold kinds of object that no training scene has."""


def with_lever(rate: float, name: str, value: float) -> Setting:
    """What a run with this lever sets."""
    field, _, others = LEVERS[name]
    return {RATE: rate, field: value, **others}


def runs() -> list[tuple[str, Setting]]:
    """Name of the lever and its value ("none"), and what the run sets."""
    rates = [("none", {RATE: rate}) for rate in RATES]
    levers = [(rate, name, value) for rate in AT_RATES for name in LEVERS for value in LEVERS[name][1]]
    return rates + [(f"{name} {value:g}", with_lever(rate, name, value)) for rate, name, value in levers]


def name_of(setting: Setting) -> str:
    """What a run is called in the results, and its folder."""
    return ",".join(f"{name}={value}" for name, value in setting.items())


def config_of(setting: Setting, seed: int, steps: int, workdir: Path) -> ConfigDict:
    """The demo's configuration, shorter, with what a run sets; captions to replay are written into the workdir."""
    config = shapes_vlkd.get_config()
    config.seed, config.steps, config.save_every, config.keep = seed, steps, steps, 1
    config.update_from_flattened_dict({**OFF, **setting})
    config.eval.every, config.eval.questions = max(steps // 5, 1), 512
    config.early_stop.metric = "retention/text_qa" if "early_stop.max_drop" in setting else ""
    if config.data.replay == CAPTIONS:
        config.data.replay = str(workdir / f"{seed}_{CAPTIONS}")
        pairs = make_source(config, "train")
        texts = "".join(f"{pairs[index].text}\n" for index in range(CAPTION_COUNT))
        write_atomic(locate(config.data.replay), texts.encode())
    return config


def denoise_loss(params: Params | None = None) -> float:
    """Of held-out texts of the world, the same for every run; of the BART that the runs start from without `params`."""
    config = shapes_vlkd.get_config()
    task = make_task(config)
    terms, texts = without_dropout(task.denoise_terms), held_out(config, task, texts=True)
    return mean_terms(terms, task.load_params() if params is None else params, {}, texts)["denoise"]


def measure(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains and asks: shares of right answers with their intervals, and the loss of texts to restore."""
    step = int(train(config, workdir).step)
    chosen = suites.get_config("shapes")
    chosen.batch_size = 128
    chosen.shapes.update(
        seed=config.seed, questions=QUESTIONS, text_questions=QUESTIONS, captions=1, retrieval=2, baselines=False
    )
    model = VLKD.from_run(workdir)
    ((_, metrics),) = evaluate(chosen, read_items(chosen), model, locate(workdir / "asked"))
    asked = {name: {key: metrics[name][key] for key in ("overall", "overall_interval", "n")} for name in TASKS}
    return {"step": step, **asked, "denoise_loss": denoise_loss(model.params)}


AXES = {
    "text-only questions wrong, %": lambda run: 100 - 100 * run["text_qa"]["overall"],
    "denoising loss of held-out texts, nats a token": lambda run: run["denoise_loss"],
}
"""What has to stay, and how a run's figure is read."""


def curves(result: dict[str, Any], rate: float) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Name of a curve -> value of its lever -> its runs, a seed each; 0 is the lever off, at this rate.

    Runs that stopped before their first checkpoint are left out: they are the student that learned nothing.
    """

    def seeds(setting: Setting) -> list[dict[str, Any]]:
        return [run for run in result["runs"].get(name_of(setting), {}).values() if run["step"]]

    points = {"BART's learning rate": {value: seeds({RATE: value}) for value in RATES}}
    for name, (_, values, _) in LEVERS.items():
        points[name] = {0.0: seeds({RATE: rate})} | {value: seeds(with_lever(rate, name, value)) for value in values}
    return {name: {value: some for value, some in curve.items() if some} for name, curve in points.items()}


def draw(result: dict[str, Any], figure: Path) -> None:
    """Answers about pictures against text abilities, a column a rate; each run is a small mark, means are large."""
    _, grid = plt.subplots(len(AXES), len(AT_RATES), figsize=(11, 9), sharey=True, sharex="row")
    starts = (0.0, result["denoise_at_start"])  # the built-in BART answers every one of these questions
    for row, start, (label, figure_of) in zip(grid, starts, AXES.items(), strict=True):
        for axis, rate in zip(row, AT_RATES, strict=True):
            for name, curve in curves(result, rate).items():
                measured = {
                    value: [(figure_of(run), 100 * run["vqa"]["overall"]) for run in seeds]
                    for value, seeds in curve.items()
                }
                means = {
                    value: tuple(map(statistics.mean, zip(*some, strict=True))) for value, some in measured.items()
                }
                (line,) = axis.plot(*zip(*(means[value] for value in sorted(means)), strict=True), "o-", label=name)
                for value, place in means.items():
                    axis.plot(*zip(*measured[value], strict=True), ".", color=line.get_color(), alpha=0.4)
                    if value:
                        style = {"color": line.get_color(), "fontsize": 8}
                        axis.annotate(f"{value:g}", place, textcoords="offset points", xytext=(5, 5), **style)
            axis.axvline(start, color="0.6", linestyle=":", label="before distillation")
            axis.set_title(f"levers at rate {rate:g}", fontsize=10)
            axis.set_xlabel(label)
            axis.grid(color="0.92")
        row[0].set_ylabel("questions about pictures right, zero-shot, %")
        row[0].invert_xaxis()  # to the right is better
    grid[0][0].legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(figure, dpi=110)


def table(result: dict[str, Any]) -> str:
    """A row a run, mean over the seeds (and each seed), per cent."""

    def cell(seeds: dict[str, Any], name: str) -> str:
        values = [100 * run[name]["overall"] for run in seeds.values()]
        return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"

    start = f"{result['denoise_at_start']:.3f}"
    head = f"| BART's rate | lever | stopped at | about pictures | text-only | denoising loss, {start} before |"
    lines = [head, "|---|---|---|---|---|---|"]
    for lever, setting in runs():
        if seeds := result["runs"].get(name_of(setting)):
            steps = ", ".join(str(run["step"]) for run in seeds.values())
            losses = ", ".join(f"{run['denoise_loss']:.3f}" for run in seeds.values())
            cells = (f"{setting[RATE]:g}", lever, steps, cell(seeds, "vqa"), cell(seeds, "text_qa"), losses)
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
    if options.output.is_file():
        result = json.loads(options.output.read_text())
    else:
        result = circumstances | {"denoise_at_start": denoise_loss(), "runs": {}}
    if result["settings"] != circumstances["settings"]:
        parser.error(f"{options.output}: of other settings, {result['settings']}; give another --output and --workdir")
    options.workdir.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for _, setting in runs():
            of_run, workdir = result["runs"].setdefault(name_of(setting), {}), options.workdir / name_of(setting)
            if str(seed) not in of_run:
                of_run[str(seed)] = measure(
                    config_of(setting, seed, options.steps, options.workdir), workdir / str(seed)
                )
                write_atomic(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))
    draw(result, options.figure)


if __name__ == "__main__":
    main()
