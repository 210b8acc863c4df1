"""The optimizer: AdamW with warm-up, a schedule, clipping, and a learning rate for each parameter group."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from vlkd_jax.types import ConfigDict, Params

MAX_LOGIT_SCALE = 100.0
"""Largest inverse temperature of the contrastive loss (Radford et al. 2021, section 2.5)."""


def schedule(config: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over `config.warmup` steps, then `config.schedule`: "constant", "linear" or "cosine" to zero."""
    warmup = min(config.warmup, steps)
    rest = max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(peak / max(warmup, 1), peak, warmup), after], [warmup])


def groups(params: Params, new: Collection[str]) -> Params:
    """ "linears" for each parameter below a name of `new`, "model" for the others."""
    return flax.traverse_util.path_aware_map(lambda path, _: "linears" if path[0] in new else "model", params)


def decayed(params: Params) -> Params:
    """True for each parameter that weight decay acts on: kernels and embeddings, not biases, norms and the scale."""
    return flax.traverse_util.path_aware_map(lambda path, _: path[-1] in ("kernel", "embedding"), params)


def make_optimizer(config: ConfigDict, steps: int, new: Collection[str]) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019; decay scaled by the learning rate) for a train state's parameters.

    Args:
      config: `config.optim` of configs/base.py.
      steps: length of the run, for the schedule.
      new: top-level parameters that take `lr_linears`.
    """
    rates = {"model": schedule(config, config.lr, steps), "linears": schedule(config, config.lr_linears, steps)}
    label = functools.partial(groups, new=tuple(new))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed) if config.weight_decay else optax.identity(),
        optax.partition({k: optax.scale_by_learning_rate(rate) for k, rate in rates.items()}, label),
    )


def cap_logit_scale(params: Params) -> Params:
    """Parameters with `logit_scale`, where there is one, at log 100 or less.

    As CLIP, the parameter is clipped and not its use: behind a minimum it would get no gradient and never come back.
    """
    if "logit_scale" not in params:
        return params
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], math.log(MAX_LOGIT_SCALE))}


def count_parameters(params: Params) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(params))
