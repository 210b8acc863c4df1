"""What the next token may be: minimum length, no n-gram twice, the forced end. In Hugging Face's order."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from vlkd_jax.decoding.options import Decoding
from vlkd_jax.models.configs import BartConfig
from vlkd_jax.types import Array, ArrayLike, Bool, Float32, Int


class History(NamedTuple):
    """The tokens of each text so far, the forced prefix included, and how many they are."""

    ids: Int[Array, "B W T"]
    length: Int[Array, " B"]


def begin(prefix: Int[ArrayLike, "B P"], prefix_mask: Bool[ArrayLike, "B P"], options: Decoding, pad: int) -> History:
    """The prefix, alone."""
    ids = jnp.where(prefix_mask, prefix, pad).astype(jnp.int32)
    ids = jnp.pad(ids, ((0, 0), (0, options.max_new_tokens)), constant_values=pad)
    ids = jnp.broadcast_to(ids[:, None], (ids.shape[0], options.rows, ids.shape[1]))
    return History(ids, jnp.sum(prefix_mask, -1))


def append(history: History, token: Int[ArrayLike, "B W"]) -> History:
    """One more token for each text."""
    ids, length = history
    here = jnp.arange(ids.shape[-1]) == length[:, None, None]
    return History(jnp.where(here, token[..., None], ids), length + 1)


def new_tokens(history: History, start: Int[ArrayLike, " B"], count: int) -> Int[Array, "B W {count}"]:
    """The `count` tokens after the first `start` of each text."""
    return jnp.take_along_axis(history.ids, (start[:, None] + jnp.arange(count))[:, None], 2)


def allow(
    scores: Float32[ArrayLike, "B W V"],
    history: History,
    count: Int[ArrayLike, ""],
    options: Decoding,
    config: BartConfig,
) -> Float32[Array, "B W V"]:
    """Scores with -inf where a token may not follow the `count` new ones that there are."""
    token = jnp.arange(scores.shape[-1])
    if options.no_repeat_ngram:
        scores = jnp.where(_repeats(history, options.no_repeat_ngram, scores.shape[-1]), -jnp.inf, scores)
    if options.min_new_tokens:
        scores = jnp.where((count < options.min_new_tokens) & (token == config.eos_token_id), -jnp.inf, scores)
    if config.forced_eos_token_id is not None:
        forced = jnp.where(token == config.forced_eos_token_id, 0.0, -jnp.inf)
        scores = jnp.where(count == options.max_new_tokens - 1, forced, scores)
    return scores


def _repeats(history: History, n: int, vocab_size: int) -> Bool[Array, "B W V"]:
    """Whether a token would end a run of n tokens that the text has already."""
    ids, length = history
    batch, width, total = ids.shape
    starts = jnp.arange(total - n + 1)
    inside = jnp.arange(n - 1)
    tail = jnp.take_along_axis(ids, jnp.maximum(length[:, None] - n + 1 + inside, 0)[:, None], 2)
    windows = ids[..., starts[:, None] + inside]
    same = jnp.all(windows == tail[:, :, None], -1) & (starts + n - 1 < length[:, None])[:, None]
    ends = ids[..., starts + n - 1]
    rows, texts = jnp.arange(batch)[:, None, None], jnp.arange(width)[:, None]
    return jnp.zeros((batch, width, vocab_size), bool).at[rows, texts, ends].max(same)
