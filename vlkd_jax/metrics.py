"""What a run tells: metrics.jsonl, TensorBoard events and one progress line with an ETA."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vlkd_jax import processes
from vlkd_jax.console import duration, rate
from vlkd_jax.storage import AnyPath, Mirror

METRICS_FILE = "metrics.jsonl"
RATES = ("images_per_second", "data_wait")


class MetricWriter:
    """Appends numbers to `workdir/metrics.jsonl` and to TensorBoard events (tensorboardX; no TensorFlow needed).

    Every process makes the same calls, process 0 writes. Use it in a `with` block: leaving the block, also by an
    exception, flushes the events. In an object store both appear as `storage.Mirror` copies them.
    """

    def __init__(self, workdir: AnyPath):
        self._writes = processes.is_first()
        if not self._writes:
            return
        from tensorboardX import SummaryWriter

        self._mirror = Mirror(workdir)
        self._mirror.fetch(METRICS_FILE)
        _end_last_line(self._mirror.local / METRICS_FILE)
        self._board = SummaryWriter(str(self._mirror.local / "tensorboard"), flush_secs=30)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line {"step", "kind", "time", name: value, ...} and one scalar `kind/name` each."""
        if not self._writes:
            return
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **values}
        with open(self._mirror.local / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._mirror.due():
            self._board.flush()
            self._mirror.copy()

    def lost_after(self, step: int) -> float:
        """Seconds from the last line of `step` or before to the very last: what a run that was cut off did in vain."""
        if not self._writes:
            return 0.0
        lines = [line for line in read_metrics(self._mirror.local / METRICS_FILE)[0] if "time" in line]
        kept = [line["time"] for line in lines if line["step"] <= step]
        return lines[-1]["time"] - kept[-1] if kept and lines[-1]["step"] > step else 0.0

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            with self._mirror:
                self._board.close()


def _end_last_line(path: Path) -> None:
    """Ends a line that a kill or a full disk cut off: the next one must not be glued to it."""
    if not path.is_file() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def read_metrics(path: AnyPath) -> tuple[list[dict[str, Any]], int]:
    """(the lines of a metrics.jsonl, how many could not be read: a run that was killed may leave half a line)."""
    lines, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int) and "kind" in values:
                lines.append(values)
                continue
        unreadable += 1
    return lines, unreadable


class Goodput:
    """Where the time of a run goes: seconds of this process, told as a line of kind "goodput".

    `start`: reading models and data and restoring; `compile`: the first step; `steps`: what is neither of the others;
    `data`: waiting for batches; `evaluate`; `save`: waiting for checkpoints; `lost`: what the process before did after
    the checkpoint that this one goes on from, as far as its lines tell.
    """

    KINDS = ("start", "compile", "steps", "data", "evaluate", "save", "lost")

    def __init__(self) -> None:
        self._began, self._since = round(time.time(), 3), time.monotonic()
        self.seconds = dict.fromkeys(self.KINDS, 0.0)

    def started(self) -> None:
        """The time until now was the start."""
        self.seconds["start"] = time.monotonic() - self._since

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """The block's time is of this kind."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.seconds[kind] += time.monotonic() - before

    def told(self) -> dict[str, float]:
        """Seconds by kind so far, and when this process began, in Unix time."""
        rest = time.monotonic() - self._since - (sum(self.seconds.values()) - self.seconds["lost"])
        return {"began": self._began} | {k: round(v, 3) for k, v in (self.seconds | {"steps": rest}).items()}


def goodput(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind of a whole run, all of its processes added up, from the lines of its metrics.jsonl."""
    last = {line["began"]: line for line in lines if line["kind"] == "goodput"}
    return {kind: sum(line[kind] for line in last.values()) for kind in Goodput.KINDS} if last else {}


def goodput_line(seconds: dict[str, float]) -> str:
    """`steps 81% of 1:02:31, start 2%, ...`: the largest first."""
    total = max(sum(seconds[kind] for kind in Goodput.KINDS), 1e-9)
    rest = sorted(((seconds[kind], kind) for kind in Goodput.KINDS if kind != "steps"), reverse=True)
    shares = [f"{name} {value / total:.1%}" for value, name in rest if value / total >= 0.0005]
    return ", ".join([f"steps {seconds['steps'] / total:.1%} of {duration(total)}", *shares])


class Progress:
    """Step, ETA, images/s and the share of the time spent waiting for data, over the time since the last line."""

    def __init__(self, steps: int, batch_size: int, start: int):
        self.steps, self.batch_size, self.last_step = steps, batch_size, start
        self.last_time, self.waited = time.monotonic(), 0.0

    def rates(self, step: int) -> dict[str, float]:
        """images_per_second and data_wait (a fraction) since the last call."""
        now = time.monotonic()
        seconds, steps = max(now - self.last_time, 1e-9), step - self.last_step
        rates = {"images_per_second": steps * self.batch_size / seconds, "data_wait": self.waited / seconds}
        self.last_time, self.last_step, self.waited = now, step, 0.0
        return rates

    def skip_time(self, seconds: float) -> None:
        """Leaves time that was not training (an evaluation) out of the rates."""
        self.last_time += seconds

    def line(self, step: int, values: dict[str, float]) -> str:
        """`step 120/900  eta 2:31  250 images/s  data 1%  lr 1.0e-04  loss 3.21  ...`"""
        speed = values["images_per_second"]
        left = (self.steps - step) * self.batch_size / max(speed, 1e-9)
        rest = [f"{name} {value:.4g}" for name, value in values.items() if name not in RATES]
        return "  ".join(
            [
                f"step {step}/{self.steps}",
                f"eta {duration(left)}",
                f"{rate(speed)} images/s",
                f"data {values['data_wait']:.0%}",
                *rest,
            ]
        )


def peak_memory() -> dict[str, float]:
    """Most memory so far in GiB: of this process (`host_gib`) and, where there is an accelerator, of its fullest."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kibibytes on Linux, bytes on macOS
    gib = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return gib | ({"device_gib": max(used) / 2**30} if any(used) else {})
