"""Greedy decoding in bfloat16 against its own uncached logits in bfloat16; ties may fall either way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlkd_jax import decoding
from vlkd_jax.decoding.cache import empty_cache, extend, score
from vlkd_jax.hf.load import load_bart
from vlkd_jax.models.bart import Bart

PAD, EOS = 1, 2
ROWS, SOURCE, PREFIX, NEW = 24, 10, 5, 12
TIE = 2**-6
"""Share of the spread of logits: a few of bfloat16's steps of 2^-8, from sums in another order in two layers."""


@pytest.fixture(scope="module", params=["tiny_bart", "scaled_bart"])
def said(request):
    """(Bart in bfloat16, its parameters, memory and mask, prefix and mask, what greedy decoding says)."""
    config, params = load_bart(request.getfixturevalue(request.param).directory)
    bart, rng = Bart(config, dtype=jnp.bfloat16), np.random.default_rng(0)
    mask = np.arange(SOURCE) < rng.integers(3, SOURCE + 1, ROWS)[:, None]
    ids = rng.integers(3, 99, mask.shape)
    memory = jax.jit(functools.partial(bart.apply, method="encode"))({"params": params}, ids, mask)
    assert memory.dtype == jnp.bfloat16
    prefix_mask = np.arange(PREFIX) < rng.integers(2, PREFIX + 1, ROWS)[:, None]
    prefix = np.where(prefix_mask, rng.integers(3, 99, prefix_mask.shape), PAD).astype(np.int32)
    prefix[:, :2] = config.decoder_start_token_id, 0

    @jax.jit
    def decode(params, memory, mask, prefix, prefix_mask):
        decoder = decoding.make_decoder(bart, params, decoding.project_memory(bart, params, memory, mask))
        return decoding.greedy(decoder, prefix, prefix_mask, decoding.Decoding(max_new_tokens=NEW))[:, 0]

    tokens_said = decode(params, memory, mask, prefix, prefix_mask)
    return bart, params, memory, mask, prefix, prefix_mask, np.asarray(tokens_said)


def whole(said):
    """Decoder ids [B, PREFIX + NEW] (prefix, then what was said), and where in them each new token stands [B, NEW]."""
    *_, prefix, prefix_mask, tokens_said = said
    ids, lengths = np.full((ROWS, PREFIX + NEW), PAD, np.int32), prefix_mask.sum(1)
    ids[:, :PREFIX] = prefix
    at = lengths[:, None] + np.arange(NEW)
    np.put_along_axis(ids, at, tokens_said, 1)
    return ids, at


def uncached(said, ids):
    """Teacher-forced logits [B, T, V] of the same module."""
    bart, params, memory, mask = said[:4]

    @jax.jit
    def run(params):
        def read(bart):
            return bart.logits(bart.decode(ids, memory, mask))

        return bart.apply({"params": params}, method=read)

    return np.asarray(run(params))


def test_ids_are_valid_and_rows_end(said):
    tokens_said = said[-1]
    assert tokens_said.dtype == np.int32 and tokens_said.min() >= 0 and tokens_said.max() < 99
    for row in tokens_said:
        end = row.tolist().index(EOS)  # the last token is forced
        assert (row[end + 1 :] == PAD).all() and (row[:end] != EOS).all()
    assert len({tuple(row) for row in tokens_said.tolist()}) > ROWS / 2


def test_every_token_is_the_most_likely_one_within_ties(said):
    ids, at = whole(said)
    logits, tokens_said = uncached(said, ids), said[-1]
    chosen = checked = 0
    for row, places, tokens in zip(logits, at, tokens_said):
        for place, token in zip(places[: tokens.tolist().index(EOS)], tokens):
            scores = row[place - 1]
            assert scores.max() - scores[token] <= TIE * np.ptp(scores)
            chosen, checked = chosen + (scores.argmax() == token), checked + 1
    assert checked > 3 * ROWS and chosen > 0.9 * checked


def test_cached_logits_are_close_to_uncached_ones(said):
    """The same ids through the cache, a prompt at once and then token by token."""
    bart, params, memory, mask = said[:4]
    ids, _ = whole(said)
    length = ids.shape[1]

    @jax.jit
    def step(params, cache, positions):
        decoder = decoding.make_decoder(bart, params, decoding.project_memory(bart, params, memory, mask))
        visible = jnp.arange(length) <= positions[..., None]
        tokens = jnp.take_along_axis(ids, positions, 1)
        hidden, cache = extend(decoder, cache, tokens, positions, positions[0, 0], visible)
        return score(decoder, hidden), cache

    cache = empty_cache(bart, ROWS, length)
    parts = []
    for start, stop in ((0, PREFIX), *((k, k + 1) for k in range(PREFIX, PREFIX + 4))):
        logits, cache = step(params, cache, np.tile(np.arange(start, stop), (ROWS, 1)))
        parts.append(logits)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)} and parts[
        0
    ].dtype == jnp.float32
    cached, plain = np.concatenate(parts, 1), uncached(said, ids)[:, : PREFIX + 4]
    assert np.abs(cached - plain).max() <= TIE * np.ptp(plain)
    assert np.ptp(plain, axis=-1).min() > 1
