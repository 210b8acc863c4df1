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
MEBIBYTE, A_SAVE = 2**20, 4 * 2**20
"""A save may keep so much; `allowed` beside that, of what a process holds more than after two fifths of its steps."""


@pytest.mark.parametrize(
    "steps, saves, allowed",
    [
        (300, 1, 32 * MEBIBYTE),  # on a busy machine the threads of a short run are not yet where they will be
        pytest.param(2000, 1, 4 * MEBIBYTE, marks=pytest.mark.nightly),
        pytest.param(2000, 20, 4 * MEBIBYTE, marks=pytest.mark.nightly),
    ],
)
def test_long_runs_with_ten_evaluations_hold_no_more_memory(assets, tmp_path, steps, saves, allowed, record_property):
    """Orbax and tensorstore keep about a megabyte of each save of these tiny models, whatever the arrays' sizes."""
    changes = {**MIXED, "steps": steps, "save_every": steps // saves, "eval__every": steps // 10, "log_every": 5}
    command = [sys.executable, "-c", TOLD, *arguments(assets, tmp_path / "run", **changes)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert run.returncode == 0, run.stderr
    held = {int(step): int(size) for step, size in re.findall(r"^held (\d+) (\d+)$", run.stdout, re.MULTILINE)}
    assert len(held) == 11  # the start, and ten
    grown = held[steps] - held[steps * 2 // 5]
    record_property("mebibytes", round(grown / 2**20, 1))
    assert grown < allowed + A_SAVE * saves * 3 // 5, {k: v >> 20 for k, v in held.items()}
