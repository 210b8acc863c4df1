"""Draws how a train step's cost grows with what it is given: `python -m benchmarks.growth`.

    python -m benchmarks.growth [--curves=NAMES] [--size=tiny|base] [--output=FILE.json] [--figure=FILE.png]

One size is changed at a time, the others stay: pairs in a batch, tokens of a caption, image tokens, BART's vocabulary,
and for answers the number of beams. Beside the seconds of a step on this machine stands the floor: the arithmetic at
the rate of a large matrix product (of answers `benchmarks.decode` has it). How a step grows with devices:
`vlkd plan --sweep --rows=N`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import timing
from benchmarks.workload import Workload, answer, image_memory
from vlkd_jax.decoding import Decoding

BATCH, CAPTION, NEW_TOKENS = 8, 32, 16
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
"""Ticks of the axis."""
SIZES = {
    "pairs": (2, 4, 8, 16),
    "caption tokens": (8, 16, 32, 64),
    "image tokens": (17, 50, 101, 197),
    "vocabulary": (8192, 16384, 32768, 50265),
    "beams": (1, 2, 4, 8),
}


def workload_of(size: str, quantity: str, value: int) -> Workload:
    """The sizes of both models with one of them changed."""
    workload = Workload.of(size, jnp.float32)
    if quantity == "vocabulary":
        return dataclasses.replace(workload, bart=dataclasses.replace(workload.bart, vocab_size=value))
    if quantity == "image tokens":
        patch = workload.clip.vision.patch_size
        vision = dataclasses.replace(workload.clip.vision, image_size=patch * round((value - 1) ** 0.5))
        return dataclasses.replace(workload, clip=dataclasses.replace(workload.clip, vision=vision))
    return workload


def runs(size: str, quantity: str) -> Iterator[tuple[int, Any, int | None]]:
    """(size, what to time, its floating-point operations but for a loop of unknown length) for each size."""
    for value in SIZES[quantity]:
        workload, rng = workload_of(size, quantity, value), np.random.default_rng(0)
        params, frozen = workload.draw(0)
        if quantity == "beams":
            options = Decoding("beam", max_new_tokens=NEW_TOKENS, beams=value)
            prompts = workload.prompts(rng, BATCH, ask=True)
            image = image_memory(workload.student, workload.teacher, params, frozen["clip"], prompts.pixels)
            arguments = (workload.student, params, image, prompts, options)
            yield value, functools.partial(_done, answer, arguments), None
            continue
        rows = value if quantity == "pairs" else BATCH
        caption = value if quantity == "caption tokens" else CAPTION
        batch, state = jax.device_put(workload.batch(rng, rows, caption)), workload.state(params)
        step, arguments = jax.jit(workload.train_step()), (state, frozen, batch)
        yield value, functools.partial(_done, step, arguments), timing.matmul_flops(step, *arguments)


def _done(function: Callable, arguments: tuple) -> None:
    jax.block_until_ready(function(*arguments))


def draw(result: dict[str, Any], figure: Path) -> None:
    """One panel a quantity: seconds and the floor, both axes logarithmic."""
    quantities = {name: result["curves"][name] for name in SIZES if name in result["curves"]}
    _, axes = plt.subplots(1, len(quantities), figsize=(2.6 * len(quantities), 3.4), sharey=True)
    for axis, (name, points) in zip(np.atleast_1d(axes), quantities.items()):
        sizes = [point["size"] for point in points]
        axis.plot(sizes, [point["seconds"] for point in points], marker="o", label="measured")
        if all(point["floor_seconds"] for point in points):
            axis.plot(sizes, [point["floor_seconds"] for point in points], linestyle=":", label="arithmetic alone")
        axis.set(xscale="log", yscale="log", xlabel=name, xticks=sizes, xticklabels=[f"{n:,}" for n in sizes])
        axis.tick_params("x", labelrotation=45 if name == "vocabulary" else 0)
        axis.minorticks_off()
        axis.grid(axis="y", color="0.9")
    np.atleast_1d(axes)[0].set(ylabel="seconds", yticks=SECONDS, yticklabels=SECONDS)
    np.atleast_1d(axes)[0].legend(frameon=False)
    plt.tight_layout()
    plt.savefig(figure, dpi=110)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--curves", default=",".join(SIZES), help="which, by commas; others stay as FILE has them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("growth.json"))
    parser.add_argument("--figure", type=Path, default=Path("growth.png"))
    options = parser.parse_args()
    rate = timing.machine_rates()["flops"]
    before = json.loads(options.output.read_text())["curves"] if options.output.is_file() else {}
    result: dict[str, Any] = timing.circumstances(options) | {"curves": before}
    result["settings"].pop("figure")
    for quantity in options.curves.split(","):
        points = result["curves"][quantity] = []
        for value, run, flops in runs(options.size, quantity):
            seconds = statistics.median(timing.alternate({"run": run}, options.rounds)["run"])
            floor = flops / rate if flops else None
            points.append({"size": value, "seconds": seconds, "floor_seconds": floor})
            told = f", arithmetic alone {floor:.3f} s" if floor else ""
            print(f"{quantity} {value:,}: {seconds:.3f} s{told}", flush=True)
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.figure)


if __name__ == "__main__":
    main()
