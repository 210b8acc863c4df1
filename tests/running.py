"""Training runs in this process and what they leave: for tests that make many of them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlkd_jax import train as module
from vlkd_jax.data import streams

MIXED = {"loss__denoise": 0.5, "loss__l2": 0.1, "dropout": 0.1, "data__context_length": 0}
"""Options under which everything that is random or frozen takes part."""
POISON = {np.nan: (1, 254, 3), np.inf: (1, 254, 4)}
"""A first pixel of the fourth row that makes the loss NaN or infinite, see `poisonable`."""


def poisonable(task):
    """The task with a loss that is not finite where the batch is marked with `POISON`, as by a bad record."""

    def terms(params, frozen, batch, rng):
        factor = jnp.float32(1)
        for value, mark in POISON.items() if batch.pixels is not None else ():
            factor = jnp.where(jnp.all(batch.pixels[3, 0, 0] == np.array(mark)), value, factor)
        return jax.tree.map(lambda value: factor * value, task.terms(params, frozen, batch, rng))

    return dataclasses.replace(task, terms=terms)


def poison(patch, steps):
    """Batches of the stream make the loss not finite: {step: NaN or infinity}."""
    original = streams.train_stream

    def stream(config, task, start, *rest):
        for step, batch in enumerate(original(config, task, start, *rest), start + 1):
            if step in steps:
                batch.pixels[3, 0, 0] = POISON[steps[step]]
            yield batch

    patch.setattr(module, "train_stream", stream)


def states_by_step(patch):
    """Filled while a run goes on, from step 2: step -> (skipped so far, parameters, optimizer state)."""
    seen = {}
    original = module._Loop._log

    def log(loop, step, state, *rest):
        seen[step] = int(state.skipped), *jax.tree.map(np.array, (state.params, state.opt_state))
        original(loop, step, state, *rest)

    patch.setattr(module._Loop, "_log", log)
    return seen


def share_programs(patch, change=lambda task: task):
    """From here on runs with the same options share their task, after `change`, and step function: one compiles."""

    def share(name, key, change=lambda value: value):
        original, made = getattr(module, name), {}

        def get(*arguments):
            if key(*arguments) not in made:
                made[key(*arguments)] = arguments, change(original(*arguments))  # the arguments too: ids are keys
            return made[key(*arguments)][1]

        patch.setattr(module, name, get)

    apart = ("steps", "log_every", "save_every", "keep", "mesh", "nan_limit", "optim", "eval", "early_stop")
    share("make_task", lambda config: str([(k, v) for k, v in config.to_dict().items() if k not in apart]), change)
    share("make_optimizer", lambda optim, steps, new: (str(optim.to_dict()), steps, new))
    share("make_train_step", lambda task, optimizer, *rest: (id(task), id(optimizer), *rest))


def same_bits(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def metrics_of(workdir, kind="train"):
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def steps_of(workdir):
    return sorted(int(path.name[5:]) for path in (Path(workdir) / "checkpoints").glob("step_????????"))


def cases(ordinary, nightly):
    """Parametrises a test by `case`: so many in every run, so many with --nightly."""
    marks = [() if k < ordinary else pytest.mark.nightly for k in range(nightly)]
    return pytest.mark.parametrize("case", [pytest.param(k, marks=mark) for k, mark in enumerate(marks)])
