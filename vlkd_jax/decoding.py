"""Decoding over BART with a key-value cache: static buffers, one prefill of the forced prefix, one `while_loop`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlkd_jax.models.bart import Bart
from vlkd_jax.types import Array, Params


class _State(NamedTuple):
    """The loop's carry: at `step` k, `ids[:, :k]` are final and `token` [B] is what comes next for rows not `done`."""

    step: Array
    token: Array
    ids: Array
    done: Array
    cache: object


def greedy(
    bart: Bart,
    params: Params,
    memory: Array,
    memory_mask: Array,
    prefix: Array,
    prefix_mask: Array,
    max_new_tokens: int,
) -> Array:
    """The most likely next token, again and again, after a forced prefix that may differ in length between rows.

    Args:
      bart, params: module and its parameters.
      memory: float [B, M, D], what the decoder reads; memory_mask: bool [B, M].
      prefix: int32 [B, P], forced decoder tokens from the decoder's start token on; prefix_mask: bool [B, P].
      max_new_tokens: the last of them is `</s>` if the row has not ended before, as Hugging Face forces it.

    Returns:
      int32 [B, max_new_tokens]: the new tokens, `</s>` included, then padding.
    """
    config = bart.config

    def call(*args, method: str):
        return bart.apply({"params": params}, *args, method=method)

    batch, width = prefix.shape
    length = jnp.sum(prefix_mask, -1)
    slots = jnp.arange(width + max_new_tokens)
    cross = call(memory, method="cross_cache")
    cache = call(batch, width + max_new_tokens, method="init_cache")
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    # What padding of the prefix writes is read by no real token: later steps overwrite a slot before they may read it.
    visible = slots[None, None, :] <= positions[..., None]
    hidden, cache = call(prefix, positions, cache, cross, memory_mask, visible, method="decode_step")
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], 1)
    token = jnp.argmax(call(last, method="logits")[:, 0], -1).astype(jnp.int32)

    def cond(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def body(state: _State) -> _State:
        token = state.token
        if config.forced_eos_token_id is not None:
            token = jnp.where(state.step == max_new_tokens - 1, config.forced_eos_token_id, token)
        token = jnp.where(state.done, config.pad_token_id, token)
        ids = state.ids.at[:, state.step].set(token)
        done = state.done | (token == config.eos_token_id)
        at = (length + state.step)[:, None]
        seen = slots[None, None, :] <= at[..., None]
        hidden, cache = call(token[:, None], at, state.cache, cross, memory_mask, seen, method="decode_step")
        token = jnp.argmax(call(hidden, method="logits")[:, 0], -1).astype(jnp.int32)
        return _State(state.step + 1, token, ids, done, cache)

    ids = jnp.full((batch, max_new_tokens), config.pad_token_id, jnp.int32)
    start = _State(jnp.int32(0), token, ids, jnp.zeros(batch, bool), cache)
    return jax.lax.while_loop(cond, body, start).ids
