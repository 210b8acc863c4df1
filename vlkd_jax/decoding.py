"""Decoding over BART with a key-value cache: static buffers, one prefill of the forced prefix, then a token at a time.

`prefill` and `step` know BART and its cache; what becomes the next token is decided by the method above them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlkd_jax.models.attention import KeyValue
from vlkd_jax.models.bart import Bart
from vlkd_jax.types import Array, ArrayLike, Bool, Float, Float32, Int, Params


class Memory(NamedTuple):
    """What every step reads and none changes: cross-attention keys and values [layers, B, M, H, K], and their mask."""

    cross: KeyValue
    mask: Bool[ArrayLike, "B M"]


class Written(NamedTuple):
    """What has been decoded: self-attention cache [layers, B, length, H, K]; the next position of each row."""

    cache: KeyValue
    position: Int[Array, " B"]


def project_memory(
    bart: Bart, params: Params, hidden: Float[ArrayLike, "B M D"], mask: Bool[ArrayLike, "B M"]
) -> Memory:
    """What the decoder reads, from encoder states or an image prefix: once, whatever is decoded from it."""
    return Memory(bart.apply({"params": params}, hidden, method="cross_cache"), mask)


def join_memories(*memories: Memory) -> Memory:
    """Memories of the same rows behind one another."""
    keys_values = jax.tree.map(lambda *parts: jnp.concatenate(parts, 2), *(memory.cross for memory in memories))
    return Memory(keys_values, jnp.concatenate([memory.mask for memory in memories], 1))


def take_rows(memory: Memory, rows: Int[ArrayLike, " R"]) -> Memory:
    """The memories of these rows, a row as often as it is named: many questions share what was computed of an image."""
    return Memory(jax.tree.map(lambda x: jnp.take(x, rows, 1), memory.cross), jnp.take(memory.mask, rows, 0))


def prefill(
    bart: Bart,
    params: Params,
    memory: Memory,
    prefix: Int[ArrayLike, "B P"],
    prefix_mask: Bool[ArrayLike, "B P"],
    new_tokens: int,
) -> tuple[Float32[Array, "B V"], Written]:
    """Reads the memory and a forced prefix that may differ in length between rows.

    Args:
      bart, params: module and its parameters.
      memory: what the decoder reads.
      prefix, prefix_mask: decoder tokens from the decoder's start token on.
      new_tokens: how many steps the cache shall have room for.

    Returns:
      Logits of the token after the prefix, and what `step` carries on.
    """

    def call(*args, method: str):
        return bart.apply({"params": params}, *args, method=method)

    batch, width = prefix.shape
    length = jnp.sum(prefix_mask, -1)
    cache = call(batch, width + new_tokens, method="init_cache")
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    # What padding of the prefix writes is read by no real token: later steps overwrite a slot before they may read it.
    visible = jnp.arange(width + new_tokens) <= positions[..., None]
    hidden, cache = call(prefix, positions, cache, *memory, visible, method="decode_step")
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], 1)
    return call(last, method="logits")[:, 0], Written(cache, length)


def step(
    bart: Bart, params: Params, memory: Memory, written: Written, token: Int[ArrayLike, " B"]
) -> tuple[Float32[Array, "B V"], Written]:
    """Writes a token at each row's next position: logits of the one after it, and the state."""
    at = written.position[:, None]
    visible = jnp.arange(written.cache.key.shape[2]) <= at[..., None]
    hidden, cache = bart.apply(
        {"params": params}, token[:, None], at, written.cache, *memory, visible, method="decode_step"
    )
    logits = bart.apply({"params": params}, hidden, method="logits")[:, 0]
    return logits, Written(cache, written.position + 1)


class _State(NamedTuple):
    """The loop's carry: `ids[:, :count]` are decided, `token` is the last of them, rows that ended are `done`."""

    count: Int[Array, ""]
    token: Int[Array, " B"]
    ids: Int[Array, "B T"]
    done: Bool[Array, " B"]
    written: Written


def greedy(
    bart: Bart,
    params: Params,
    memory: Memory,
    prefix: Int[ArrayLike, "B P"],
    prefix_mask: Bool[ArrayLike, "B P"],
    max_new_tokens: int,
) -> Int[Array, "B {max_new_tokens}"]:
    """The most likely next token, again and again, after a forced prefix; arguments as in `prefill`.

    Args:
      max_new_tokens: the last of them is `</s>` if the row has not ended before, as Hugging Face forces it.

    Returns:
      The new tokens, int32, `</s>` included, then padding.
    """
    config, batch = bart.config, prefix.shape[0]

    def choose(logits: Float32[Array, "B V"], count: Int[Array, ""], done: Bool[Array, " B"]) -> Int[Array, " B"]:
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        if config.forced_eos_token_id is not None:
            token = jnp.where(count == max_new_tokens - 1, config.forced_eos_token_id, token)
        return jnp.where(done, config.pad_token_id, token)

    def add(logits: Float32[Array, "B V"], state: _State, written: Written) -> _State:
        token = choose(logits, state.count, state.done)
        ids = state.ids.at[:, state.count].set(token)
        return _State(state.count + 1, token, ids, state.done | (token == config.eos_token_id), written)

    def go_on(state: _State) -> Bool[Array, ""]:
        return (state.count < max_new_tokens) & ~jnp.all(state.done)

    def decode(state: _State) -> _State:
        logits, written = step(bart, params, memory, state.written, state.token)
        return add(logits, state, written)

    logits, written = prefill(bart, params, memory, prefix, prefix_mask, max_new_tokens)
    ids = jnp.full((batch, max_new_tokens), config.pad_token_id, jnp.int32)
    nothing = _State(jnp.int32(0), ids[:, 0], ids, jnp.zeros(batch, bool), written)
    # the first token needs no step of its own, and after the last one there is none
    return jax.lax.while_loop(go_on, decode, add(logits, nothing, written)).ids
