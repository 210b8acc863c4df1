"""The one train step, for every task."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vlkd_jax.optim import cap_logit_scale
from vlkd_jax.tasks.task import Frozen, Task, Terms
from vlkd_jax.types import Array, Batch, Params, TrainState


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, dropout: float, seed: int
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]:
    """The step function (state, frozen, batch) -> (state, metrics); jit it with the state donated.

    An update whose loss or gradient is not finite is not applied: parameters and optimizer state stay as they were,
    bit for bit, and it is counted in `skipped`. `metrics` holds each term's mean, `loss`, `grad_norm`, and `updates`:
    how many the optimizer had applied before, which is where its schedule stands.
    """

    def loss(params: Params, frozen: Frozen, batch: Batch, rng: Array | None) -> tuple[Array, Terms]:
        terms = task.terms(params, frozen, batch, rng)
        means = {name: total / jnp.maximum(count, 1) for name, (total, count) in terms.items()}
        return sum(weight * means[name] for name, weight in task.weights.items()), means

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        (total, means), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, rng)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cap_logit_scale(optax.apply_updates(state.params, updates))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = jnp.where(good, 0, 1).astype(jnp.int32)
        new = TrainState(state.step + 1, params, opt_state, state.skipped + bad, (state.skipped_in_row + bad) * bad)
        told = {"updates": state.step - state.skipped, "skipped_in_row": new.skipped_in_row}
        return new, {"loss": total, **means, "grad_norm": norm, **told}

    return step
