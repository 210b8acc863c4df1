"""What a teacher cache takes and gives: bytes a record, and a train step from it: `python -m benchmarks.teacher_cache`.

    python -m benchmarks.teacher_cache [--size=base] [--rows=16] [--rounds=5] [--output=FILE]

Sizes are those of the published models, with the total for CC3M's 3,318,333 pairs. The step is that of ViT-B/32 and
BART-base (base) or ViT-L/14 and BART-large (large) with random parameters, live and from each kind of cache, in turns;
decoding pictures, which a cache saves too, is not in it. Losses are compared with the live step's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.workload import Workload
from vlkd_jax import compression
from vlkd_jax.data.teacher_cache import row_type
from vlkd_jax.tasks.distill import teacher_projections
from vlkd_jax.types import Batch, TeacherOutputs

CC3M = 3_318_333
LENGTH = 32
PUBLISHED = {"ViT-B/32": (50, 768, 512), "ViT-B/16": (197, 768, 512), "ViT-L/14": (257, 1024, 768)}
"""Tokens N, width of the image tower, joint width E."""


def sizes() -> list[dict[str, Any]]:
    """Bytes a record and in total of every kind of cache."""
    rows = []
    for model, (count, width, joint) in PUBLISHED.items():
        shapes = {"pooled": None, "projected": (count, joint), "hidden": (count, width)}
        for tokens, shape in shapes.items():
            of_dtype = {name: row_type(TeacherOutputs(shape, (joint,), (joint,)), name) for name in compression.DTYPES}
            bytes_each = {name: row.itemsize for name, row in of_dtype.items()}
            total = {name: size * CC3M / 1e9 for name, size in bytes_each.items()}
            rows.append({"model": model, "tokens": tokens, "bytes": bytes_each, "gigabytes_cc3m": total})
    return rows


def cached(workload: Workload, teacher: Any, batch: Batch, dtype: str) -> Batch:
    """The batch with the teacher's outputs as a cache of `dtype` gives them."""

    def compute(params: Any, batch: Batch) -> TeacherOutputs:
        exact = teacher_projections(workload.teacher, params, batch, "projected")
        return TeacherOutputs(*(compression.compress(x, dtype) for x in exact))

    return batch.replace(pixels=None, clip_ids=None, clip_mask=None, teacher=jax.jit(compute)(teacher, batch))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="base", choices=("tiny", "base", "large"))
    parser.add_argument("--rows", type=int, default=16, help="pairs in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    workload = Workload.of(options.size, jnp.float32 if on_cpu else jnp.bfloat16)
    params, frozen = workload.draw(0)
    live = workload.batch(np.random.default_rng(0), options.rows, LENGTH)
    batches = {"live": live} | {name: cached(workload, frozen["clip"], live, name) for name in compression.DTYPES}
    batches = jax.device_put(batches)
    state, step = workload.state(params), jax.jit(workload.train_step())
    losses = {name: {k: float(v) for k, v in step(state, frozen, batch)[1].items()} for name, batch in batches.items()}
    runs = {
        name: lambda batch=batch: jax.block_until_ready(step(state, frozen, batch)) for name, batch in batches.items()
    }
    seconds = timing.alternate(runs, options.rounds)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "sizes": sizes(),
        "seconds_a_step": {name: statistics.median(values) for name, values in seconds.items()},
        "times_faster_than_live": {name: timing.ratio(seconds, "live", name) for name in compression.DTYPES},
        "losses": {
            name: {k: values[k] for k in ("ttdm", "itcl", "icti", "grad_norm")} for name, values in losses.items()
        },
    }
    timing.tell(result, options.output, seconds=seconds)


if __name__ == "__main__":
    main()
