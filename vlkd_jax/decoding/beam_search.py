"""Beam search with Hugging Face's rules: which hypotheses go on, which are kept, and when a row is done."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlkd_jax.decoding.cache import Cache, Decoder, extend, prefill, score
from vlkd_jax.decoding.options import Decoding
from vlkd_jax.decoding.rules import History, allow, append, begin, new_tokens
from vlkd_jax.types import Array, ArrayLike, Bool, Float32, Int

IMPOSSIBLE = -1e9
"""Below every score; finite, so that sums of it stay comparable."""


class _Open(NamedTuple):
    """Hypotheses that go on, the likeliest first, and the slots of new tokens that each has come by."""

    history: History
    log_likelihood: Float32[Array, "B W"]
    slots: Bool[Array, "B W S"]


class _Ended(NamedTuple):
    """The best hypotheses that have ended, the best first; places not taken yet have the score `IMPOSSIBLE`."""

    ids: Int[Array, "B W N"]
    score: Float32[Array, "B W"]
    taken: Bool[Array, "B W"]


class _State(NamedTuple):
    """The loop's carry: `count` tokens are chosen, the last ones not yet read; rows in `search` can still improve."""

    count: Int[Array, ""]
    search: Bool[Array, " B"]
    open: _Open
    ended: _Ended
    cache: Cache


def beam(
    decoder: Decoder, prefix: Int[ArrayLike, "B P"], prefix_mask: Bool[ArrayLike, "B P"], options: Decoding
) -> Int[Array, "B {options.returns} {options.max_new_tokens}"]:
    """The best of `options.beams` hypotheses, best first: the new tokens, `</s>` included, then padding."""
    config, (batch, width) = decoder.bart.config, prefix.shape
    beams, room = options.beams, options.max_new_tokens

    def decode(state: _State) -> _State:
        token = new_tokens(state.open.history, state.open.history.length - 1, 1)[..., 0]
        visible = jnp.concatenate([jnp.broadcast_to(prefix_mask[:, None], (batch, beams, width)), state.open.slots], -1)
        positions = jnp.broadcast_to(state.open.history.length[:, None] - 1, (batch, beams))
        at = width + (state.count - 1) * beams
        hidden, cache = extend(decoder, state.cache, token, positions, at, visible)
        return _advance(score(decoder, hidden), state, cache, options, config)

    def go_on(state: _State) -> Bool[Array, ""]:
        return (state.count < room) & jnp.any(state.search)

    hidden, cache = prefill(decoder, prefix, prefix_mask, room * beams)
    logits = jnp.broadcast_to(score(decoder, hidden)[:, None], (batch, beams, config.vocab_size))
    only_first = jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, IMPOSSIBLE), (batch, beams))
    history = begin(prefix, prefix_mask, options, config.pad_token_id)
    opened = _Open(history, only_first, jnp.zeros((batch, beams, room * beams), bool))
    ended = _Ended(
        jnp.full((batch, beams, room), config.pad_token_id, jnp.int32),
        jnp.full((batch, beams), IMPOSSIBLE),
        jnp.zeros((batch, beams), bool),
    )
    state = _State(jnp.int32(0), jnp.ones(batch, bool), opened, ended, cache)
    # as in greedy decoding, neither the first tokens nor the last ones need a step
    state = jax.lax.while_loop(go_on, decode, _advance(logits, state, cache, options, config))
    return state.ended.ids[:, : options.returns]


def _advance(logits: Float32[Array, "B W V"], state: _State, cache: Cache, options: Decoding, config) -> _State:
    """The next token of every hypothesis: 2 W candidates a row, so that W go on even where W end."""
    count, search, opened, ended, _ = state
    (batch, beams, vocab_size), room = logits.shape, options.max_new_tokens
    scores = allow(jax.nn.log_softmax(logits), opened.history, count, options, config)
    scores = (scores + opened.log_likelihood[..., None]).reshape(batch, beams * vocab_size)
    likelihood, chosen = jax.lax.top_k(scores, 2 * beams)
    parent, token = chosen // vocab_size, (chosen % vocab_size).astype(jnp.int32)
    candidates = append(History(_take(opened.history.ids, parent), opened.history.length), token)
    ends = (token == config.eos_token_id) | (count + 1 == room)

    # an ended hypothesis counts only where it is among the W best, and while its row is searched
    good = ends & (jnp.arange(2 * beams) < beams) & search[:, None]
    start = candidates.length - (count + 1)
    # where nothing is forced but the first `<s>`, Hugging Face and fairseq count it as a token that was chosen
    length = (count + 1 + (start == 2)).astype(jnp.float32) ** options.length_penalty
    final = jnp.where(good, likelihood / length[:, None], IMPOSSIBLE)
    merged = _Ended(
        jnp.concatenate([ended.ids, new_tokens(candidates, start, room)], 1),
        jnp.concatenate([ended.score, final], 1),
        jnp.concatenate([ended.taken, good], 1),
    )
    best = jax.lax.top_k(merged.score, beams)[1]
    ended = _Ended(*(_take(x, best) for x in merged))

    kept = jax.lax.top_k(jnp.where(ends, likelihood + IMPOSSIBLE, likelihood), beams)[1]
    slots = _take(opened.slots, _take(parent, kept))
    slots |= jnp.arange(room * beams) == (count * beams + jnp.arange(beams))[:, None]
    likelihood = _take(jnp.where(ends, likelihood + IMPOSSIBLE, likelihood), kept)
    opened = _Open(History(_take(candidates.ids, kept), candidates.length), likelihood, slots)

    # the best open one, if it ended now, against the worst of the ended ones
    full = jnp.all(ended.taken, -1)
    search &= ~full | (likelihood[:, 0] / length > jnp.min(ended.score, -1))
    if options.early_stopping:
        search &= ~full
    return _State(count + 1, search, opened, ended, cache)


def _take(x: Array, index: Int[Array, "B K"]) -> Array:
    """x[b, index[b, k]]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)
