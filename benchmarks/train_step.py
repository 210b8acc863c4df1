"""Times a train step against Hugging Face's modules in PyTorch on this machine: `python -m benchmarks.train_step`.

    python -m benchmarks.train_step [--size=base] [--batch=8] [--caption=32] [--rounds=5] [--output=FILE]

The same random models, batch and optimizer on both sides, float32, rivals in turn; first the losses are compared. The
peer runs eagerly and with its layers compiled. Ours runs also from a teacher's cache. Most memory of a step is taken
in processes of their own. One accelerator: `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks import peer, timing
from benchmarks.teacher_cache import cached
from benchmarks.workload import OPTIMIZER, Workload
from vlkd_jax.hf.save import save_bart, save_clip

SEED = 0
TOLERANCE = 1e-3
LOSSES = ("ttdm", "itcl", "icti", "grad_norm")


class Ours:
    """Our step, jitted, its state donated."""

    def __init__(self, workload: Workload, batch: Any):
        self.workload, self.batch = workload, batch
        self.params, self.frozen = workload.draw(SEED)
        self.step = jax.jit(workload.train_step(), donate_argnums=0)
        self.begin()

    def begin(self) -> None:
        """Back to the first step."""
        self.state = self.workload.state(jax.tree.map(jnp.copy, self.params))

    def run(self, batch: Any = None) -> dict[str, float]:
        """One step and its losses."""
        self.state, metrics = self.step(self.state, self.frozen, self.batch if batch is None else batch)
        jax.block_until_ready(self.state)
        return {name: float(metrics[name]) for name in LOSSES}


def make_peer(workload: Workload, params: Any, frozen: Any) -> tuple[peer.Teacher, peer.Student]:
    """The same models in PyTorch."""
    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder) / "clip", workload.clip, frozen["clip"])
        save_bart(Path(folder) / "bart", workload.bart, params["bart"])
        teacher = peer.Teacher(Path(folder) / "clip", torch.float32, workload.clip.preprocessing)
        linears = (np.asarray(params[name]["kernel"]).T for name in ("sentence_projection", "image_projection"))
        student = peer.Student(Path(folder) / "bart", *map(torch.tensor, linears), float(params["logit_scale"]))
    return teacher, student


def peak_gib(options: argparse.Namespace, side: str) -> float:
    """Most memory of a process that makes a few steps of one side."""
    command = [sys.executable, "-m", "benchmarks.train_step", f"--peak={side}"]
    command += [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "caption")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["gib"]


def make_steps(options: argparse.Namespace, side: str) -> None:
    """Three steps of one side, and what the process needed at most."""
    workload = Workload.of(options.size, jnp.float32)
    batch = workload.batch(np.random.default_rng(SEED), options.batch, options.caption)
    if side == "ours":
        run = Ours(workload, jax.device_put(batch)).run
    else:
        trainer = peer.Trainer(*_drawn_by_torch(workload), OPTIMIZER, autocast=False)
        run = functools.partial(trainer.step, peer.tensors(vars(batch), torch.device("cpu")))
    for _ in range(3):
        run()
    print(json.dumps({"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def _drawn_by_torch(workload: Workload) -> tuple[peer.Teacher, peer.Student]:
    """Models of this size with torch's own random weights, so that jax holds none."""
    with tempfile.TemporaryDirectory() as folder:
        for name, config, kind in (
            ("clip", workload.clip, transformers.CLIPModel),
            ("bart", workload.bart, transformers.BartForConditionalGeneration),
        ):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config.to_hf()))
            kind(kind.config_class.from_pretrained(Path(folder) / name)).save_pretrained(Path(folder) / name)
        teacher = peer.Teacher(Path(folder) / "clip", torch.float32, workload.clip.preprocessing)
        width, joint = workload.bart.d_model, workload.clip.projection_dim
        linears = torch.randn(joint, width) / width, torch.randn(width, joint) / joint
        return teacher, peer.Student(Path(folder) / "bart", *linears, 2.0)


def main() -> None:
    """Measures and prints."""
    parser = timing.parser(__doc__, batch=8, what="pairs", rounds=5)
    parser.add_argument("--caption", type=int, default=32, help="BART tokens, padding included")
    parser.add_argument("--peak", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if options.peak:
        make_steps(options, options.peak)
        return
    workload = Workload.of(options.size, jnp.float32)
    batch = workload.batch(np.random.default_rng(SEED), options.batch, options.caption)
    peaks = {side: peak_gib(options, side) for side in ("ours", "peer")}
    print(f"peak memory, GiB: {peaks}", flush=True)
    ours = Ours(workload, jax.device_put(batch))
    from_cache = jax.device_put(cached(workload, ours.frozen["clip"], ours.batch, "float32"))
    teacher, student = make_peer(workload, ours.params, ours.frozen)
    compiled = peer.Trainer(copy.deepcopy(teacher), copy.deepcopy(student), OPTIMIZER, autocast=False)
    eager = peer.Trainer(teacher, student, OPTIMIZER, autocast=False)
    compiled.compile()
    inputs = peer.tensors(vars(batch), torch.device("cpu"))
    first = {"ours": ours.run()} | {
        name: {k: float(v) for k, v in trainer.step(inputs).items()}
        for name, trainer in (("eager", eager), ("compiled", compiled))
    }
    gaps = {name: max(abs(first[name][k] / first["ours"][k] - 1) for k in LOSSES) for name in ("eager", "compiled")}
    print(f"largest relative difference of losses and gradient norm: {gaps}", flush=True)
    if max(gaps.values()) > TOLERANCE:
        raise SystemExit(f"the peer computes something else: {first}")
    runs = {
        "ours": ours.run,
        "ours, teacher cached": lambda: ours.run(from_cache),
        "eager": lambda: eager.step(inputs),
        "compiled": lambda: compiled.step(inputs),
    }
    seconds = timing.alternate(runs, options.rounds)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = timing.matmul_flops(workload.train_step(), ours.state, ours.frozen, ours.batch)
    result = timing.circumstances(options) | {
        "losses": first,
        "peak_gib": peaks,
        "seconds_a_step": median,
        "images_per_second": {name: options.batch / value for name, value in median.items()},
        "real_tokens_per_second": int(np.sum(batch.text_mask)) / median["ours"],
        "times_faster": {name: timing.ratio(seconds, name, "ours") for name in ("eager", "compiled")},
        "times_faster_cached": timing.ratio(seconds, "ours", "ours, teacher cached"),
        "gflop_a_step": flops / 1e9,
        "floor_seconds": flops / timing.machine_rates()["flops"],
    }
    timing.tell(result, options.output, seconds=seconds)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
