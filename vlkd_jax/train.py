"""The training loop, one for every objective: `python -m vlkd_jax.train --config=NAME --workdir=DIR`.

The same command again goes on from the last checkpoint. DIR receives config.json, checkpoints/, metrics.jsonl and
TensorBoard events. Exit codes: see vlkd_jax.entry.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from vlkd_jax import entry, sharding, whitening
from vlkd_jax.checkpoint import Checkpoints
from vlkd_jax.configs import base
from vlkd_jax.data.streams import train_stream
from vlkd_jax.distill import Objective, make_objective, make_train_step
from vlkd_jax.errors import UserError
from vlkd_jax.evals.heldout import EarlyStop, HeldOut
from vlkd_jax.metrics import MetricWriter, Progress, peak_memory, say
from vlkd_jax.optim import count_parameters, make_optimizer, schedule
from vlkd_jax.types import Batch, TrainState
from vlkd_jax.workdir import claim, write_atomic

MAY_CHANGE = ("steps", "log_every", "save_every", "keep", "mesh", "data.threads")
"""Config fields that may differ when a run is resumed."""
LEAST = {
    **dict.fromkeys(("steps", "batch_size", "log_every", "save_every", "keep", "nan_limit", "eval.batches"), 1),
    **dict.fromkeys(("dropout", "data.threads", "data.context_length", "eval.every", "eval.questions"), 0),
    "student.whiten": 0,
    **{"data.twins": 1, "data.validation_every": 2, "data.text_length": 3, "data.source_length": 3},
}
"""The least value of config fields."""
STOPPED = "stopped.json"
"""The file in a workdir that says early stopping has ended the run."""


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains to `config.steps` and returns the state; a workdir with checkpoints of the same run is resumed.

    Raises:
      UserError: a config, a directory or a record that cannot be used; training that diverged (`entry.Diverged`).
    """
    check_config(config)
    with claim(workdir, json.loads(config.to_json_best_effort()), MAY_CHANGE) as directory:
        objective = make_objective(config)
        mesh = sharding.make_mesh(config.mesh.data)
        optimizer = make_optimizer(config.optim, config.steps)
        with Checkpoints(directory / "checkpoints", keep=config.keep) as checkpoints:
            fresh, meta = checkpoints.latest() is None, {}
            if fresh and config.objective == "vlkd" and config.student.whiten:
                objective = whitened(config, objective, mesh)
            state = start_state(objective, optimizer, mesh)
            if not fresh:
                _, state, meta = checkpoints.restore(jax.tree.map(abstract, state))
            loop = _Loop(config, directory, objective, mesh, checkpoints, meta)
            return loop.run(state, make_train_step(objective, optimizer, config.dropout, config.seed))


def check_config(config: ConfigDict) -> None:
    """Raises UserError for fields that are missing and for values that no run can use, naming the field."""
    missing = [name for name in base.get_config() if name not in config]
    if missing:
        raise UserError(f"--config has no field {', '.join(missing)}; start from a config for training, such as folder")
    for field, least in LEAST.items():
        value = functools.reduce(operator.getitem, field.split("."), config)
        if value < least:
            raise UserError(f"config.{field} is {value}; it must be at least {least}")
    if config.data.source == "shapes_texts" and config.objective != "bart_denoise":
        raise UserError("config.data.source is 'shapes_texts', which has no pictures; set it to shapes or folder")
    if config.early_stop.metric and not config.eval.every:
        raise UserError("config.early_stop.metric needs evaluations; set config.eval.every to a number of steps")
    for field in ("ratio", "mask_all"):
        if not 0 <= config.corruption[field] <= 1:
            raise UserError(f"config.corruption.{field} is {config.corruption[field]}; it must lie between 0 and 1")
    if config.optim.schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"config.optim.schedule is {config.optim.schedule!r}; it is one of constant, linear, cosine")
    devices = jax.device_count() if config.mesh.data == -1 else config.mesh.data
    if config.batch_size % max(devices, 1):
        raise UserError(f"config.batch_size is {config.batch_size}; it must be a multiple of the {devices} devices")


def whitened(config: ConfigDict, objective: Objective, mesh: jax.sharding.Mesh) -> Objective:
    """The objective with its student's `image_whitening` set from the first training images."""
    stream = train_stream(config, objective, 0)
    found = whitening.estimate(objective, config.student.image_tokens, stream, config.student.whiten, mesh)
    return dataclasses.replace(objective, params=objective.params | {"image_whitening": found})


def start_state(objective: Objective, optimizer, mesh: jax.sharding.Mesh) -> TrainState:
    """The state at step 0, every leaf a global array on the mesh (the scalars are made under jit: Orbax needs that)."""

    def make(params) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), zero, zero)

    params = jax.tree.map(jnp.asarray, objective.params)
    return jax.jit(make, out_shardings=sharding.replicated(mesh))(params)


def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, for `Checkpoints.restore`."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


class _Loop:
    """One run of the loop, with what it reports to."""

    def __init__(self, config, directory: Path, objective: Objective, mesh, checkpoints: Checkpoints, meta: dict):
        self.config, self.objective, self.mesh, self.checkpoints = config, objective, mesh, checkpoints
        self.frozen = jax.device_put(objective.frozen, sharding.replicated(mesh))
        self.writer = MetricWriter(directory)
        self.held_out = HeldOut(config, objective) if config.eval.every else None
        self.early_stop = EarlyStop(config.early_stop.metric, config.early_stop.max_drop, meta.get("retention_start"))
        self.stopped = directory / STOPPED
        self.rate = schedule(config.optim, config.optim.lr, config.steps)

    def run(self, state: TrainState, step_function) -> TrainState:
        """Steps until `config.steps`, or until early stopping."""
        config, start = self.config, int(state.step)
        if start >= config.steps or self.stopped.exists():
            say(f"nothing to do: this run is complete at step {start}")
            return state
        shared = sharding.replicated(self.mesh)
        step_function = jax.jit(step_function, donate_argnums=0, out_shardings=shared)
        trained = {name: value for name, value in state.params.items() if name != "image_whitening"}
        say(
            f"{config.objective}: {count_parameters(trained):,} parameters trained, "
            f"{count_parameters(self.frozen):,} frozen, {self.mesh.size} device(s), step {start} of {config.steps}"
        )
        progress = Progress(config.steps, config.batch_size, start)
        if start == 0:
            self._evaluate(0, state, progress)
            if self.early_stop.metric:
                self.checkpoints.save(0, state, self._meta())
        bad: list[str] = []
        for step, batch in enumerate(self._timed(train_stream(config, self.objective, start), progress), start + 1):
            state, metrics = step_function(state, self.frozen, sharding.put(self.mesh, batch.replace(index=None)))
            bad = self._watch(step, metrics, batch, bad)
            if step == start + 1:
                progress.rates(step)  # the first step compiles: it is left out of the rates
            elif step % config.log_every == 0 or step == config.steps:
                self._log(step, state, metrics, progress)
            evaluated = self.held_out and (step % config.eval.every == 0 or step == config.steps)
            if evaluated and self._evaluate(step, state, progress):
                say(f"stopped at step {step}: {self.early_stop.metric} fell by more than {self.early_stop.max_drop}")
                return self._last_good(step, state)
            due = evaluated if self.early_stop.metric else step % config.save_every == 0 or step == config.steps
            if due:  # with early stopping only states that were evaluated are kept
                self.checkpoints.save(step, state, self._meta())
            if step == config.steps:
                break
        self.checkpoints.wait()
        self._finish(step)
        return state

    def _finish(self, step: int) -> None:
        memory = peak_memory()
        self.writer.write(step, "memory", memory)
        self.writer.close()
        say("peak memory  " + "  ".join(f"{name} {value:.2f}" for name, value in memory.items()))

    def _timed(self, stream: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
        while True:
            before = time.monotonic()
            batch = next(stream)
            progress.waited += time.monotonic() - before
            yield batch

    def _watch(self, step: int, metrics: dict, batch: Batch, bad: list[str]) -> list[str]:
        """Names the batches of the current run of skipped updates; raises when there are too many."""
        if not int(metrics["skipped_in_row"]):
            return []
        rows = ", ".join(str(i) for i in batch.index[:8])
        bad = [*bad, f"step {step} (records {rows}{', ...' if len(batch.index) > 8 else ''})"]
        say(f"step {step}: the loss or its gradient is not finite; this update is skipped")
        if len(bad) >= self.config.nan_limit:
            raise entry.Diverged(
                f"{len(bad)} updates in a row were not finite: {'; '.join(bad)}; "
                "lower optim.lr or look at these records; the last checkpoint is good"
            )
        return bad

    def _log(self, step: int, state: TrainState, metrics: dict, progress: Progress) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != "skipped_in_row"}
        values = {**progress.rates(step), "lr": float(self.rate(step - 1)), **values, "skipped": int(state.skipped)}
        self.writer.write(step, "train", values)
        say(progress.line(step, {k: v for k, v in values.items() if k != "skipped" or v}))

    def _evaluate(self, step: int, state: TrainState, progress: Progress) -> bool:
        """Writes the held-out figures; whether to stop."""
        if not self.held_out:
            return False
        before = time.monotonic()
        figures = self.held_out(state.params)
        self.writer.write(step, "eval", figures)
        say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        progress.skip_time(time.monotonic() - before)
        return self.early_stop(figures)

    def _meta(self) -> dict:
        return {"retention_start": self.early_stop.start}

    def _last_good(self, step: int, state: TrainState) -> TrainState:
        """The newest checkpoint: the last evaluated state that was within the limit. The run is marked as complete."""
        self.checkpoints.wait()
        good, state, _ = self.checkpoints.restore(jax.tree.map(abstract, state))
        write_atomic(self.stopped, (json.dumps({"stopped_at": step, "checkpoint": good}) + "\n").encode())
        self._finish(step)
        say(f"the checkpoint of step {good} stands")
        return state


def define_flags() -> None:
    """The flags of this entry point."""
    config_flags.DEFINE_config_file("config", None, "a config of the package, e.g. shapes_vlkd, or FILE.py")
    flags.DEFINE_string("workdir", None, "directory of the run")


def main() -> None:
    """Entry point."""
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    entry.run(main, define_flags, required=("config", "workdir"))
