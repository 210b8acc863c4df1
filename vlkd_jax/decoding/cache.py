"""What decoding reads and writes: a decoder's memory, and its key-value cache.

A cache has a slot for each token of the forced prefix and then, for each new token, one for each of the W texts that
are decoded beside one another for a row (beams, samples):

    slot    0 .. P-1    P .. P+W-1       P+W .. P+2W-1    ...
    holds   prefix      first tokens     second tokens

Slots are not positions: prefixes differ in length, and all rows write to the same slots. Which slots a token reads is a
mask. So beams share the prefix, nothing is copied when a beam takes the place of another, and a step writes one slice.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlkd_jax.models.attention import KeyValue
from vlkd_jax.models.bart import Bart, DecoderLayer
from vlkd_jax.types import Array, ArrayLike, Bool, Float, Float32, Int, Params

Cache = tuple[KeyValue, ...]
"""The keys and values of each layer."""


class Memory(NamedTuple):
    """What every step reads and none changes: each layer's cross-attention keys and values, and their mask."""

    cross: tuple[KeyValue, ...]
    mask: Bool[ArrayLike, "B M"]


class Decoder(NamedTuple):
    """A decoder and what it reads. Its layers stand apart: sliced out once, not in each step."""

    bart: Bart
    params: Params
    layers: tuple[Params, ...]
    memory: Memory


def _layers(bart: Bart, params: Params) -> tuple[Params, ...]:
    stacked, count = params["decoder"]["layers"], bart.config.decoder_layers
    return tuple(jax.tree.map(operator.itemgetter(k), stacked) for k in range(count))


def _apply(bart: Bart, layer: Params, *arguments, method: str):
    return DecoderLayer(bart.config, bart.dtype).apply({"params": layer}, *arguments, method=method)


def project_memory(
    bart: Bart, params: Params, hidden: Float[ArrayLike, "B M D"], mask: Bool[ArrayLike, "B M"]
) -> Memory:
    """What the decoder reads, from encoder states or an image prefix: once, whatever is decoded from it."""
    layers = _layers(bart, params)
    return Memory(tuple(_apply(bart, layer, hidden, method="project_memory") for layer in layers), mask)


def join_memories(*memories: Memory) -> Memory:
    """Memories of the same rows behind one another."""
    cross = jax.tree.map(lambda *parts: jnp.concatenate(parts, 2), *(memory.cross for memory in memories))
    return Memory(cross, jnp.concatenate([memory.mask for memory in memories], 1))


def take_rows(memory: Memory, rows: Int[ArrayLike, " R"]) -> Memory:
    """The memories of these rows, a row as often as it is named: many questions share what was computed of an image."""
    return jax.tree.map(lambda x: jnp.take(x, rows, 0), memory)


def make_decoder(bart: Bart, params: Params, memory: Memory) -> Decoder:
    """A decoder over this memory."""
    return Decoder(bart, params, _layers(bart, params), memory)


def empty_cache(bart: Bart, batch: int, slots: int) -> Cache:
    """A cache with nothing in it: leaves [batch, H, slots, K] zeros."""
    config, heads = bart.config, bart.config.decoder_attention_heads
    empty = jnp.zeros((batch, heads, slots, config.d_model // heads), bart.dtype)
    return (KeyValue(empty, empty),) * config.decoder_layers


def extend(
    decoder: Decoder,
    cache: Cache,
    ids: Int[ArrayLike, "B Q"],
    positions: Int[ArrayLike, "B Q"],
    at: Int[ArrayLike, ""],
    visible: Bool[ArrayLike, "B Q L"],
) -> tuple[Float[Array, "B Q D"], Cache]:
    """The decoder reads Q more tokens a row.

    Args:
      cache: of L slots.
      positions: 0-based, of each token in its text.
      at: the slot of the first of them; the others follow.
      visible: the slots that each token reads, its own included.

    Returns:
      Hidden states and the cache with the tokens in it.
    """
    bart, memory, written = decoder.bart, decoder.memory, []
    x = bart.apply({"params": decoder.params}, ids, positions, method="embed_decoder")
    for layer, own, cross in zip(decoder.layers, cache, memory.cross, strict=True):
        x, own = _apply(bart, layer, x, own, cross, at, visible, memory.mask, method="extend")
        written.append(own)
    return x, tuple(written)


def prefill(
    decoder: Decoder, prefix: Int[ArrayLike, "B P"], prefix_mask: Bool[ArrayLike, "B P"], room: int
) -> tuple[Float[Array, "B D"], Cache]:
    """The decoder reads a forced prefix, from its start token on, that may differ in length between rows.

    Returns:
      The hidden state after each row's last token, and a cache with `room` more slots.
    """
    batch, width = prefix.shape
    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    visible = jnp.arange(width + room) <= positions[..., None]
    cache = empty_cache(decoder.bart, batch, width + room)
    hidden, cache = extend(decoder, cache, prefix, positions, jnp.int32(0), visible)
    last = jnp.take_along_axis(hidden, (jnp.sum(prefix_mask, -1) - 1)[:, None, None], 1)
    return last[:, 0], cache


def score(decoder: Decoder, hidden: Float[ArrayLike, "*rows D"]) -> Float32[Array, "*rows V"]:
    """Logits of the token after each hidden state."""
    return decoder.bart.apply({"params": decoder.params}, hidden, method="logits")
