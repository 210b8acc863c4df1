"""What a run tells: metrics.jsonl, TensorBoard events and one progress line with an ETA."""

from __future__ import annotations

import json
import resource
import sys
import time

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

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            with self._mirror:
                self._board.close()


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
