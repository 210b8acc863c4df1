"""The one train step, for every task."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vlkd_jax import losses
from vlkd_jax.optim import cap_logit_scale
from vlkd_jax.sharding import BATCH, constrain
from vlkd_jax.tasks.task import TEACHER, Frozen, Rng, Task, Terms, TermsFunction
from vlkd_jax.types import Array, Batch, Params, TrainState


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, dropout: float, seed: int, accumulate: int = 1
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]:
    """The step function (state, frozen, batch) -> (state, metrics); jit it with the state donated.

    An update whose loss or gradient is not finite is not applied: parameters and optimizer state stay as they were,
    bit for bit, and it is counted in `skipped`. `metrics` holds each term's mean, `loss`, `grad_norm`, and `updates`:
    how many the optimizer had applied before, which is where its schedule stands.

    With `accumulate` above 1 the batch passes through the models in so many parts, see `terms_in_parts`.
    """
    of_batch = terms_in_parts(task.terms, accumulate)

    def loss(params: Params, frozen: Frozen, batch: Batch, rng: Array | None) -> tuple[Array, dict[str, Array]]:
        terms = losses.finish(of_batch(params, frozen, batch, rng))
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


def terms_in_parts(terms: TermsFunction, parts: int) -> TermsFunction:
    """`terms` of a batch, computed from `parts` parts of it one after the other, to the same gradients.

    For the gradient each part runs forward once more, so that activations of one part exist at a time. What needs the
    whole batch still gets it: embeddings of all parts stand together in `losses.Pairs`, and the gradients by them flow
    back into the parts. That is GradCache (Gao et al. 2021, arXiv 2101.06983), which automatic differentiation makes
    of rematerialisation. The outputs of the teacher are kept, it runs once. Dropout draws anew for each part.
    """
    if parts == 1:
        return terms

    def of_batch(params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
        policy = jax.checkpoint_policies.save_only_these_names(TEACHER)

        @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
        def of_part(params: Params, index: Array, part: Batch) -> Terms:
            return terms(params, frozen, part, None if rng is None else jax.random.fold_in(rng, index))

        dealt = jax.tree.map(functools.partial(_deal, parts), batch)
        stacked = jax.lax.map(lambda part: of_part(params, *part), (jnp.arange(parts), dealt))
        return {name: _join(term) for name, term in stacked.items()}

    return of_batch


def _deal(parts: int, x: Array) -> Array:
    """[B, ...] -> [parts, B / parts, ...], part k with rows k, k + parts, ...: no row leaves its device."""
    return constrain(jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), None, BATCH)


def _join(term: losses.SumAndCount | losses.Pairs) -> losses.SumAndCount | losses.Pairs:
    """A term of the whole batch from those of its parts, stacked: `_deal` undone, or sums and counts added up."""
    if not isinstance(term, losses.Pairs):
        return jax.tree.map(jnp.sum, term)
    image, sentence = (jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1]) for x in term[:2])
    return losses.Pairs(image, sentence, term.scale[0])
