"""Times of rivals in turn, and how much arithmetic there is in a function: exact counts, no clocks."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PAUSE = 0.5
"""Seconds before each run on a CPU: threads of the rival's pool spin on for a while when its work is done."""


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, one after the other in every round, after one round that does not count.

    Args:
      runs: name -> what is timed; it returns when its work is done, not when it is under way.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if jax.default_backend() == "cpu":
                time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is than `slow`: the median over the rounds of what one round gives."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def machine_rates() -> dict[str, float]:
    """FLOP/s of a float32 matrix product on this machine, and bytes/s read by a sum."""
    a, values = jnp.ones((2048, 2048)), jnp.ones(2**27)
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    runs = {
        "product": lambda: jax.block_until_ready(product(a, a)),
        "sum": lambda: jax.block_until_ready(total(values)),
    }
    seconds = {name: statistics.median(values) for name, values in alternate(runs, 5).items()}
    return {"flops": 2 * 2048**3 / seconds["product"], "bytes": 4 * 2**27 / seconds["sum"]}


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on: the date, the machine, versions and the script's options."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **versions,
        "settings": {name: value for name, value in vars(options).items() if name not in ("output", "peak")},
    }


def parser(doc: str, batch: int, what: str, rounds: int) -> argparse.ArgumentParser:
    """The options that scripts share: size of the models, `batch` of `what`, rounds, a file for the figures.

    Args:
      doc: of the script, whose first line says what it is for.
    """
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--size", default="base", choices=("tiny", "base", "large"))
    made.add_argument("--batch", type=int, default=batch, help=what)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--output", type=Path, help="JSON file for the figures")
    return made


def tell(result: dict[str, Any], output: Path | None, **more: Any) -> None:
    """Prints a script's figures, and writes them, with what is too long to be printed, where a file is given."""
    print(json.dumps(result, indent=1))
    if output:
        output.write_text(json.dumps(result | more, indent=1) + "\n")


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """Floating-point operations of a function's contractions, each pass of a scan counted; nothing is computed.

    A compiled program's own count takes a loop's body once and does not look into cuBLAS's calls. A `while` loop's body
    is taken once here too.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(_count(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    values = [value for item in params.values() for value in (item if isinstance(item, tuple | list) else [item])]
    opened = [getattr(value, "jaxpr", value) for value in values]
    return [value for value in opened if hasattr(value, "eqns")]
