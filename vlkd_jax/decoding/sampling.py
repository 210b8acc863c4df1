"""Texts that grow a token at a time, the likeliest one or one drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlkd_jax.decoding.cache import Cache, Decoder, extend, prefill, score
from vlkd_jax.decoding.options import Decoding
from vlkd_jax.decoding.rules import History, allow, append, begin, new_tokens
from vlkd_jax.types import Array, ArrayLike, Bool, Float32, Int

Choose = Callable[[Float32[Array, "B W V"], Int[Array, ""]], Int[Array, "B W"]]


class _State(NamedTuple):
    """The loop's carry: `count` tokens are chosen, the last of them not yet read; texts that ended are `done`."""

    count: Int[Array, ""]
    history: History
    done: Bool[Array, "B W"]
    cache: Cache


def greedy(
    decoder: Decoder, prefix: Int[ArrayLike, "B P"], prefix_mask: Bool[ArrayLike, "B P"], options: Decoding
) -> Int[Array, "B 1 {options.max_new_tokens}"]:
    """The likeliest next token, again and again, after a forced prefix: the new ones, `</s>` included, then padding."""
    return _grow(decoder, prefix, prefix_mask, options, lambda scores, count: jnp.argmax(scores, -1))


def sample(
    decoder: Decoder,
    prefix: Int[ArrayLike, "B P"],
    prefix_mask: Bool[ArrayLike, "B P"],
    draws: Int[ArrayLike, " B"],
    options: Decoding,
) -> Int[Array, "B {options.returns} {options.max_new_tokens}"]:
    """Tokens drawn at random; as `greedy`.

    Args:
      draws: with `options.seed` what a row's random numbers depend on, and nothing else.
    """
    texts = jnp.arange(options.returns)
    key = jax.random.key(options.seed)
    keys = jax.vmap(lambda draw: jax.vmap(lambda text: jax.random.fold_in(jax.random.fold_in(key, draw), text))(texts))(
        jnp.asarray(draws)
    )

    def choose(scores: Float32[Array, "B W V"], count: Int[Array, ""]) -> Int[Array, "B W"]:
        likely = _likely(scores / options.temperature, options)
        return jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, count), row)))(
            keys, likely
        )

    return _grow(decoder, prefix, prefix_mask, options, choose)


def _likely(scores: Float32[Array, "B W V"], options: Decoding) -> Float32[Array, "B W V"]:
    """-inf but for the `top_k` highest, and of these but for the fewest whose probabilities reach `top_p`."""
    if options.top_k:
        lowest = jax.lax.top_k(scores, min(options.top_k, scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    if options.top_p < 1:
        falling = -jnp.sort(-scores, -1)
        shares = jax.nn.softmax(falling, -1)
        kept = jnp.cumsum(shares, -1) - shares < options.top_p  # those before it do not suffice
        lowest = jnp.min(jnp.where(kept, falling, jnp.inf), -1, keepdims=True)
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    return scores


def _grow(decoder: Decoder, prefix, prefix_mask, options: Decoding, choose: Choose) -> Int[Array, "B W N"]:
    config, (batch, width) = decoder.bart.config, prefix.shape
    texts, room = options.rows, options.max_new_tokens
    start = jnp.sum(prefix_mask, -1)
    slot = jnp.arange(room * texts)
    own = slot % texts == jnp.arange(texts)[:, None]

    def add(scores: Float32[Array, "B W V"], state: _State, cache: Cache) -> _State:
        count, history, done, _ = state
        token = choose(allow(scores, history, count, options, config), count)
        token = jnp.where(done, config.pad_token_id, token).astype(jnp.int32)
        return _State(count + 1, append(history, token), done | (token == config.eos_token_id), cache)

    def go_on(state: _State) -> Bool[Array, ""]:
        return (state.count < room) & ~jnp.all(state.done)

    def decode(state: _State) -> _State:
        token = new_tokens(state.history, state.history.length - 1, 1)[..., 0]
        visible = jnp.broadcast_to(own & (slot < state.count * texts), (batch, texts, room * texts))
        visible = jnp.concatenate([jnp.broadcast_to(prefix_mask[:, None], (batch, texts, width)), visible], -1)
        positions = jnp.broadcast_to(state.history.length[:, None] - 1, (batch, texts))
        at = width + (state.count - 1) * texts
        hidden, cache = extend(decoder, state.cache, token, positions, at, visible)
        return add(score(decoder, hidden), state, cache)

    hidden, cache = prefill(decoder, prefix, prefix_mask, room * texts)
    history = begin(prefix, prefix_mask, options, config.pad_token_id)
    nothing = _State(jnp.int32(0), history, jnp.zeros((batch, texts), bool), cache)
    first = jnp.broadcast_to(score(decoder, hidden)[:, None], (batch, texts, config.vocab_size))
    # the first token needs no step of its own, and after the last one there is none
    return new_tokens(jax.lax.while_loop(go_on, decode, add(first, nothing, cache)).history, start, room)
