"""The training loop, one for every objective: `python -m vlkd_jax.train --config=NAME --workdir=DIR`.

The same command again goes on from the last checkpoint. DIR receives config.json, checkpoints/, metrics.jsonl and
TensorBoard events.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from ml_collections import ConfigDict

from vlkd_jax import entry, processes, runtime, sharding, whitening
from vlkd_jax.checkpoint import Checkpoints, check_directory
from vlkd_jax.checks import check_batch_size, check_config
from vlkd_jax.commands import COMMANDS
from vlkd_jax.config import CONFIG_VERSION
from vlkd_jax.configs import base
from vlkd_jax.console import say
from vlkd_jax.data.few_shot import record_examples
from vlkd_jax.data.pipeline import UnusableRecords
from vlkd_jax.data.streams import cache_key, text_lengths, train_sources, train_stream
from vlkd_jax.data.teacher_cache import CachedPairs
from vlkd_jax.data.text import PROMPT_FIELDS
from vlkd_jax.evals.heldout import EarlyStop, HeldOut
from vlkd_jax.identity import (
    MODELS,
    Hashes,
    check_inputs,
    hash_inputs,
    keep_models,
    record_inputs,
    with_absolute_paths,
)
from vlkd_jax.manifest import CHECKPOINTS, check_format
from vlkd_jax.metrics import Goodput, MetricWriter, Progress, goodput_line, peak_memory
from vlkd_jax.optim import count_parameters, make_optimizer, schedule
from vlkd_jax.step import make_train_step
from vlkd_jax.storage import AnyPath, locate, write_atomic
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.task import Frozen, Task
from vlkd_jax.types import Batch, Params, TrainState
from vlkd_jax.workdir import claim, flatten

MAY_CHANGE = (
    *("steps", "log_every", "save_every", "keep", "keep_teacher", "mesh", "watchdog_seconds"),
    *(f"prompts.{name}" for name in PROMPT_FIELDS),
    *("data.threads", "data.workers", "data.max_unusable", "plan.clip", "plan.bart"),
    # their places: what lies there is compared by its hashes
    *MODELS,
    *(f"data.{name}" for name in ("captions", "images", "directory", "teacher_cache", "questions", "annotations")),
)
"""Config fields that may differ when a run is resumed; data.replay too, where it names a file."""
TOLD = ("updates", "skipped_in_row", "asked")
"""Metrics of a step that the loop itself reads, and no log line."""
STOPPED = "stopped.json"
"""The file in a workdir that says early stopping has ended the run."""


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains to `config.steps` and returns the state; a workdir with checkpoints of the same run is resumed.

    Raises:
      UserError: a config, a directory or a record that cannot be used; training that diverged (`entry.Diverged`).
      Interrupted: Ctrl-C or SIGTERM, in a program that `entry.run` runs.
    """
    spent = Goodput()
    check_directory(workdir)
    check_config(config)
    config, defaults = with_absolute_paths(config), json.loads(base.get_config().to_json_best_effort())
    told = json.loads(config.to_json_best_effort())
    processes.check_alike(flatten(told))
    inputs, may_change, saved = hash_inputs(config), MAY_CHANGE, locate(workdir) / CHECKPOINTS
    processes.on_first(lambda: check_format(saved))
    if processes.on_first(lambda: any(saved.glob("step_*"))):  # what has saved nothing may begin with other files
        check_inputs(workdir, config, inputs)
        if "data.replay" in inputs:  # it is a file, and that of the start
            may_change += ("data.replay",)
    mesh = sharding.make_mesh(config.mesh)
    check_batch_size(config, mesh)
    task = make_task(config)
    with claim(workdir, told, may_change, defaults) as directory, jax.set_mesh(mesh):
        sources = train_sources(config, task)
        if config.data.teacher_cache:
            key = cache_key(config, task, inputs, sources[0])
            sources = (CachedPairs(sources[0], config.data.teacher_cache, key), sources[1])
        optimizer = make_optimizer(config.optim, config.steps, task.new)
        with Checkpoints(directory / CHECKPOINTS, keep=config.keep) as checkpoints, MetricWriter(directory) as writer:
            abstract = abstract_state(task, optimizer, mesh)
            frozen = task.load_frozen(sharding.shardings(task.abstract()[1], mesh))
            sharding.check_rules([abstract.parts(), frozen])
            keep_models(directory, config, anew=checkpoints.latest() is None)
            if checkpoints.latest() is None:
                record_inputs(directory, inputs)
                record_examples(directory, sources[0])
                params = task.load_params(sharding.shardings(task.abstract()[0], mesh))
                state, meta = start_state(whitened(config, task, params, frozen, mesh), optimizer, mesh), {}
            else:
                step, parts, meta = checkpoints.restore(abstract.parts())
                state = TrainState.from_parts(parts)
                spent.seconds["lost"] = writer.lost_after(step)
                _tell_changed_schedule(config, meta["steps"], step)
            meta = _meta(config, task, inputs) | {"retention_start": meta.get("retention_start")}
            loop = _Loop(
                config=config,
                directory=directory,
                task=task,
                frozen=frozen,
                mesh=mesh,
                checkpoints=checkpoints,
                writer=writer,
                sources=sources,
                meta=meta,
                spent=spent,
            )
            return loop.run(state, make_train_step(task, optimizer, config.dropout, config.seed, config.accumulate))


def _tell_changed_schedule(config: ConfigDict, before: int, step: int) -> None:
    """One line when the length of a resumed run, along which its learning rate falls, is another than it was."""
    if config.steps == before or config.optim.schedule == "constant":
        return
    old, new = (float(schedule(config.optim, config.optim.lr, steps)(step)) for steps in (before, config.steps))
    say(
        f"config.steps is {config.steps} and was {before}: the {config.optim.schedule} schedule now ends there, so the "
        f"learning rate goes on with {new:.3g} instead of {old:.3g} at step {step}"
    )


def _meta(config: ConfigDict, task: Task, inputs: Hashes) -> dict[str, Any]:
    """What a checkpoint says of itself beside its arrays."""
    return {
        "config_version": CONFIG_VERSION,
        "config": json.loads(config.to_json_best_effort()),
        "models": {name: model.to_hf() for name, model in task.configs.items()},
        "preprocessing": task.configs["clip"].preprocessing.to_hf() if "clip" in task.configs else None,
        "inputs": inputs,
        "steps": config.steps,
    }


def whitened(config: ConfigDict, task: Task, params: Params, frozen: Frozen, mesh: jax.sharding.Mesh) -> Params:
    """The parameters as training starts: where a student whitens, that is set from the first training images."""
    if not task.whiten:
        return params
    stream = train_stream(config, task, 0, share=sharding.data_share(mesh))
    statistics = whitening.estimate(task, frozen["clip"], stream, mesh)
    return params | {"image_whitening": sharding.put_everywhere(mesh, statistics)}


def start_state(params: Params, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """The state at step 0, laid out by the rules (also the scalars are made under jit: Orbax needs global arrays)."""
    start = functools.partial(_start, optimizer)
    layout = sharding.shardings(jax.eval_shape(start, params), mesh)
    return jax.jit(start, out_shardings=layout, donate_argnums=0)(params)  # a second copy may not fit


def _start(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, from the configuration alone."""
    shapes = jax.eval_shape(functools.partial(_start, optimizer), task.abstract()[0])
    return sharding.laid_out(shapes, mesh)


class NanGuard:
    """Ends a run after `limit` skipped updates in a row, and names their batches.

    A step's flag is looked at when the next step has been started, so that the device never waits for the program.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._ahead: list[tuple[int, jax.Array, np.ndarray]] = []  # started, not looked at
        self._bad: list[str] = []  # the skipped updates without a good one between

    def add(self, step: int, skipped_in_row: jax.Array, index: np.ndarray) -> None:
        """Takes note of a step that was started on the records `index` [B]."""
        self._ahead.append((step, skipped_in_row, index))

    def look(self, but_last: bool) -> None:
        """Waits for the steps added so far, `but_last` leaving out the newest.

        Raises:
          Diverged: too many in a row were skipped.
        """
        while len(self._ahead) > but_last:
            step, skipped_in_row, index = self._ahead.pop(0)
            if not int(skipped_in_row):
                self._bad.clear()
                continue
            rows = ", ".join(map(str, index[:8])) + (", ..." if len(index) > 8 else "")
            self._bad.append(f"step {step} (records {rows})")
            say(f"step {step}: the loss or its gradient is not finite; this update is skipped")
            if len(self._bad) >= self.limit:
                raise entry.Diverged(
                    f"{len(self._bad)} updates in a row were not finite: {'; '.join(self._bad)}; "
                    "lower optim.lr or look at these records; the last checkpoint is good"
                )


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """One run of the loop, with what it reads from and reports to."""

    config: ConfigDict
    directory: AnyPath
    task: Task
    frozen: Frozen
    mesh: jax.sharding.Mesh
    checkpoints: Checkpoints
    writer: MetricWriter
    sources: tuple[Any, Any]
    meta: dict[str, Any]
    spent: Goodput

    def __post_init__(self):
        config, limits = self.config, self.config.early_stop
        self.held_out = HeldOut(config, self.task, self.frozen, self.mesh) if config.eval.every else None
        self.early_stop = EarlyStop(limits.metric, limits.max_drop, self.meta["retention_start"])
        self.stopped = self.directory / STOPPED
        self.rate = schedule(config.optim, config.optim.lr, config.steps)
        self.unusable = UnusableRecords(config.data.max_unusable)

    def run(self, state: TrainState, step_function) -> TrainState:
        """Steps until `config.steps`, until early stopping, or until a signal.

        Raises:
          Interrupted: after Ctrl-C or SIGTERM, once the step under way is saved.
        """
        config, start = self.config, int(state.step)
        if start >= config.steps or processes.on_first(self.stopped.exists):
            say(f"nothing to do: this run is complete at step {start}")
            return state
        self.spent.started()
        self._introduce(state, start)
        progress = Progress(config.steps, config.batch_size, start)
        if start == 0:
            self._evaluate(0, state, progress)
            if self.early_stop.metric:
                self._save(0, state)
        layout = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(self.mesh)
        step_function = jax.jit(_with_signals(step_function), donate_argnums=0, out_shardings=layout)
        with runtime.deferred() as signal_number, runtime.Watchdog(config.watchdog_seconds) as watchdog:
            return self._steps(state, step_function, progress, signal_number, watchdog)

    def _introduce(self, state: TrainState, start: int) -> None:
        config = self.config
        trained = {name: value for name, value in state.params.items() if name not in self.task.fixed}
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        say(
            f"{config.objective}: {count_parameters(trained):,} parameters trained, "
            f"{count_parameters(self.frozen):,} frozen, {self.mesh.size} device(s){axes and f' ({axes})'}, "
            f"step {start} of {config.steps}"
        )
        say(parameter_overview.get_parameter_overview(state.params, include_stats="sharding"))
        for line in text_lengths(config, self.task, self.sources):
            say(line)

    def _steps(
        self,
        state: TrainState,
        step_function,
        progress: Progress,
        signal_number: Callable[[], int | None],
        watchdog: runtime.Watchdog,
    ) -> TrainState:
        config, start, alone, asked = self.config, progress.last_step, jax.process_count() == 1, 0
        guard = NanGuard(config.nan_limit)
        share = sharding.data_share(self.mesh)
        stream, since = train_stream(config, self.task, start, self.unusable, self.sources, share), time.monotonic()
        for step, batch in enumerate(self._timed(stream, progress), start + 1):
            # returns at once: while the device runs this step, the next batch is read and put there
            here = sharding.put_each(self.mesh, signal_number() or 0)
            state, metrics = step_function(state, self.frozen, sharding.put(self.mesh, batch.replace(index=None)), here)
            guard.add(step, metrics["skipped_in_row"], batch.index)
            guard.look(but_last=step % config.save_every != 0 and step != config.steps)
            watchdog.beat(step)
            if step == start + 1:
                jax.block_until_ready(metrics)
                self.spent.seconds["compile"] = time.monotonic() - since - progress.waited
                progress.rates(step)  # the first step compiles: it is left out of the rates
            elif step % config.log_every == 0 or step == config.steps:
                self._log(step, state, metrics, progress)
            evaluated = self.held_out and (step % config.eval.every == 0 or step == config.steps)
            if evaluated and self._evaluate(step, state, progress):
                say(f"stopped at step {step}: {self.early_stop.metric} fell by more than {self.early_stop.max_drop}")
                return self._last_good(step, state)
            due = evaluated if self.early_stop.metric else step % config.save_every == 0 or step == config.steps
            if due:  # with early stopping only states that were evaluated are kept
                self._save(step, state)
                self.writer.write(step, "goodput", self.spent.told())
            # of several processes all have to stop at one step: what they were told of the step before says which
            if number := signal_number() if alone else int(asked):
                guard.look(but_last=False)
                self._interrupt(number, step, state)
            asked = metrics["asked"]
            if step == config.steps:
                break
        self._finish(step)
        return state

    def _finish(self, step: int) -> None:
        self._wait_for_saves()
        if self.unusable.reasons:
            say(f"records passed over: {self.unusable}")
        memory = peak_memory()
        self.writer.write(step, "memory", memory)
        say("peak memory  " + "  ".join(f"{name} {value:.2f}" for name, value in memory.items()))
        self._tell_time(step)

    def _wait_for_saves(self) -> None:
        with self.spent.spent("save"):
            self.checkpoints.wait()

    def _tell_time(self, step: int) -> None:
        seconds = self.spent.told()
        self.writer.write(step, "goodput", seconds)
        say(f"time  {goodput_line(seconds)}")

    def _timed(self, stream: Iterator[Batch], progress: Progress) -> Iterator[Batch]:
        while True:
            before = time.monotonic()
            batch = next(stream)
            waited = time.monotonic() - before
            progress.waited += waited
            self.spent.seconds["data"] += waited
            yield batch

    def _log(self, step: int, state: TrainState, metrics: dict, progress: Progress) -> None:
        values = {name: float(value) for name, value in metrics.items() if name not in TOLD}
        rate = float(self.rate(int(metrics["updates"])))  # skipped steps do not move the optimizer's schedule on
        unusable = sum(processes.share(self.unusable.reasons.total()))
        counts = {"skipped": int(state.skipped), "unusable_records": unusable}
        values = {**progress.rates(step), "lr": rate, **values, **counts}
        self.writer.write(step, "train", values)
        say(progress.line(step, {k: v for k, v in values.items() if k not in counts or v}))

    def _evaluate(self, step: int, state: TrainState, progress: Progress) -> bool:
        """Writes the held-out figures; whether to stop."""
        if not self.held_out:
            return False
        before = time.monotonic()
        with self.spent.spent("evaluate"):
            figures = self.held_out(state.params)
        self.writer.write(step, "eval", figures)
        say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        progress.skip_time(time.monotonic() - before)
        return self.early_stop(figures)

    def _save(self, step: int, state: TrainState) -> None:
        with self.spent.spent("save"):
            self.checkpoints.save(step, state.parts(), self.meta | {"retention_start": self.early_stop.start})

    def _interrupt(self, number: int, step: int, state: TrainState) -> None:
        """Raises Interrupted when `step` is saved; with early stopping the last state that was evaluated stands."""
        if not self.early_stop.metric:
            self._save(step, state)
        self._wait_for_saves()
        self._tell_time(step)
        kept = self.checkpoints.latest()
        raise runtime.Interrupted(
            number, f"after step {step}; step {kept} is saved, and the same command goes on from there"
        )

    def _last_good(self, step: int, state: TrainState) -> TrainState:
        """The newest checkpoint: the last evaluated state that was within the limit. The run is marked as complete."""
        self._wait_for_saves()
        good, parts, _ = self.checkpoints.restore(jax.tree.map(_abstract, state.parts()))
        stopped = (json.dumps({"stopped_at": step, "checkpoint": good}) + "\n").encode()
        processes.on_first(lambda: write_atomic(self.stopped, stopped))
        self._finish(step)
        say(f"the checkpoint of step {good} stands")
        return TrainState.from_parts(parts)


def _with_signals(step_function):
    """The step function with an argument more, each process's signal number; the largest is among its metrics."""

    def stepped(state: TrainState, frozen: Frozen, batch: Batch, asked: jax.Array):
        state, metrics = step_function(state, frozen, batch)
        return state, metrics | {"asked": jnp.max(asked)}

    return stepped


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    train(values.config, values.workdir)


if __name__ == "__main__":
    entry.run(main, COMMANDS["train"])
