"""Log-likelihoods of given texts after a prompt, instead of a text of the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax.decoding.cache import Decoder, extend, prefill, score
from vlkd_jax.types import Array, ArrayLike, Bool, Float32, Int


class Candidates(NamedTuple):
    """C texts, cut into chunks of Q tokens that hold whole texts and no padding between them.

    Attributes:
      first: the first token of each text.
      ids, target: the tokens to be read and the one that follows each.
      offset, text: of each token, its place in its text, and the number of that; C where a chunk is filled up.
    """

    first: Int[ArrayLike, " C"]
    ids: Int[ArrayLike, "chunks Q"]
    target: Int[ArrayLike, "chunks Q"]
    offset: Int[ArrayLike, "chunks Q"]
    text: Int[ArrayLike, "chunks Q"]


def pack(texts: Sequence[Sequence[int]], eos: int, tokens: int) -> Candidates:
    """Texts (ids without `</s>`, one at least) in chunks of `tokens`, or of the longest text if that has more."""
    tokens = max(tokens, *map(len, texts))
    chunks: list[list[tuple[int, int, int, int]]] = [[]]
    for number, text in enumerate(texts):
        rows = [(*pair, offset, number) for offset, pair in enumerate(zip(text, [*text[1:], eos], strict=True))]
        if len(chunks[-1]) + len(rows) > tokens:
            chunks.append([])
        chunks[-1] += rows
    filling = (eos, eos, 0, len(texts))
    packed = np.array([chunk + [filling] * (tokens - len(chunk)) for chunk in chunks], np.int32)
    return Candidates(np.array([text[0] for text in texts], np.int32), *np.moveaxis(packed, -1, 0))


def rank(
    decoder: Decoder, prefix: Int[ArrayLike, "B P"], prefix_mask: Bool[ArrayLike, "B P"], candidates: Candidates
) -> Float32[Array, "B C"]:
    """The log-likelihood of each candidate and `</s>` after a forced prefix: the sum over its tokens.

    Candidates of a chunk are read side by side from one cache, in which each sees the prefix and its own tokens alone.
    """
    batch, (_, tokens), texts = prefix.shape[0], candidates.ids.shape, len(candidates.first)
    hidden, cache = prefill(decoder, prefix, prefix_mask, tokens)
    length = jnp.sum(prefix_mask, -1)
    first = jax.nn.log_softmax(score(decoder, hidden))[:, candidates.first]

    def read(total: Float32[Array, "B _"], chunk) -> tuple[Float32[Array, "B _"], None]:
        ids, target, offset, text = chunk
        before = (text[:, None] == text) & (offset[:, None] >= offset)
        visible = jnp.concatenate(
            [
                jnp.broadcast_to(prefix_mask[:, None], (batch, tokens, prefix.shape[1])),
                jnp.broadcast_to(before, (batch, tokens, tokens)),
            ],
            -1,
        )
        ids, positions = jnp.broadcast_to(ids, (batch, tokens)), length[:, None] + offset
        hidden, _ = extend(decoder, cache, ids, positions, jnp.int32(prefix.shape[1]), visible)
        likely = jax.nn.log_softmax(score(decoder, hidden))
        likely = jnp.take_along_axis(likely, jnp.broadcast_to(target, (batch, tokens))[..., None], -1)[..., 0]
        return total.at[:, text].add(likely), None

    total = jnp.pad(first, ((0, 0), (0, 1)))
    return jax.lax.scan(read, total, tuple(map(jnp.asarray, candidates[1:])))[0][:, :texts]


def likelihood(
    decoder: Decoder,
    prefix: Int[ArrayLike, "B P"],
    prefix_mask: Bool[ArrayLike, "B P"],
    ids: Int[ArrayLike, "B R N"],
) -> Float32[Array, "B R"]:
    """The log-likelihood of R texts of each row's own after a forced prefix: the sum over its tokens.

    Args:
      ids: as `decode` gives them: a text ends with its first `</s>`, which counts, or with its last token.
    """
    batch, texts, tokens = ids.shape
    ends = ids == decoder.bart.config.eos_token_id
    counts = jnp.cumsum(ends, -1) - ends == 0
    hidden, cache = prefill(decoder, prefix, prefix_mask, texts * tokens)
    first = jnp.take_along_axis(jax.nn.log_softmax(score(decoder, hidden)), ids[..., 0], -1)
    text, offset = jnp.divmod(jnp.arange(texts * tokens), tokens)
    before = (text[:, None] == text) & (offset[:, None] >= offset)
    visible = [
        jnp.broadcast_to(prefix_mask[:, None], (batch, texts * tokens, prefix.shape[1])),
        jnp.broadcast_to(before, (batch, texts * tokens, texts * tokens)),
    ]
    positions = jnp.sum(prefix_mask, -1)[:, None] + offset
    at, flat = jnp.int32(prefix.shape[1]), ids.reshape(batch, -1)
    hidden, _ = extend(decoder, cache, flat, positions, at, jnp.concatenate(visible, -1))
    likely = jax.nn.log_softmax(score(decoder, hidden)).reshape(batch, texts, tokens, -1)
    following = jnp.take_along_axis(likely[:, :, :-1], ids[..., 1:, None], -1)[..., 0]
    return first + jnp.sum(following, -1, where=counts[..., 1:])
