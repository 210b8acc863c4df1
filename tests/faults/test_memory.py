"""Long runs in one process: what they hold of memory does not grow."""

import re
import subprocess
import sys

import pytest
from running import MIXED
from tiny import ROOT, arguments, environment

TOLD = """
import gc
from vlkd_jax import entry, train
from vlkd_jax.commands import COMMANDS
evaluate = train._Loop._evaluate
def told(loop, step, *rest):
    stop = evaluate(loop, step, *rest)
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    print(f"held {step} {pages * 4096}", flush=True)
    return stop
train._Loop._evaluate = told
entry.run(train.main, COMMANDS["train"])
"""
GROWTH = 8 * 2**20
"""Bytes that a process may hold more of at the end than after two fifths of its steps: pools and fragments."""


@pytest.mark.parametrize("steps", [300, pytest.param(2000, marks=pytest.mark.nightly)])
def test_steps_checkpoints_and_ten_evaluations(assets, tmp_path, steps, record_property):
    changes = {**MIXED, "steps": steps, "save_every": steps // 10, "eval__every": steps // 10, "log_every": 50}
    command = [sys.executable, "-c", TOLD, *arguments(assets, tmp_path / "run", **changes)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert run.returncode == 0, run.stderr
    held = {int(step): int(size) for step, size in re.findall(r"^held (\d+) (\d+)$", run.stdout, re.MULTILINE)}
    assert len(held) == 11  # the start, and ten
    early, late = held[steps // 5 * 2], held[steps]
    record_property("growth", f"{(late - early) / 2**20:+.1f} MiB")
    assert late - early < GROWTH, {k: v >> 20 for k, v in held.items()}
