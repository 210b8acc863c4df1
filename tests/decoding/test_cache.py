"""The decoder over a cache: the same hidden states as without, whatever the slots and however many tokens at once."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prompts import padded, prefixes

from vlkd_jax.decoding import Memory, join_memories, make_decoder, project_memory, take_rows
from vlkd_jax.decoding.cache import empty_cache, extend, prefill
from vlkd_jax.hf.load import load_bart
from vlkd_jax.models.bart import Bart

ROWS, LENGTH, TOLERANCE = 3, 9, 1e-5


class Case(NamedTuple):
    """A decoder over `memory`, and its hidden states [ROWS, LENGTH, D] of `ids` without a cache."""

    bart: Bart
    params: dict
    memory: np.ndarray
    mask: np.ndarray
    ids: np.ndarray
    hidden: np.ndarray


@pytest.fixture(params=["tiny_bart", "scaled_bart"])
def case(request, rng):
    config, params = load_bart(request.getfixturevalue(request.param).directory)
    bart = Bart(config)
    memory = rng.normal(size=(ROWS, 6, config.d_model)).astype(np.float32)
    mask = np.arange(6) < np.array([6, 2, 4])[:, None]
    ids = rng.integers(3, 99, (ROWS, LENGTH)).astype(np.int32)
    return Case(bart, params, memory, mask, ids, decoded(bart, params, ids, memory, mask))


def decoded(bart, params, ids, memory, mask):
    run = jax.jit(functools.partial(bart.apply, method="decode"))
    return np.asarray(run({"params": params}, ids, memory, mask))


@functools.partial(jax.jit, static_argnums=0)
def read(bart, params, memory, mask, cache, ids, positions, at, visible):
    decoder = make_decoder(bart, params, project_memory(bart, params, memory, mask))
    return extend(decoder, cache, ids, positions, at, visible)


def extended(case, cache, ids, positions, at, visible):
    arguments = case.params, case.memory, case.mask, cache, ids, positions, jnp.int32(at), visible
    return read(case.bart, *arguments)


@pytest.mark.parametrize("parts", [[1] * LENGTH, [5, 1, 3], [LENGTH]])
def test_cached_is_uncached(case, parts):
    cache, start = empty_cache(case.bart, ROWS, LENGTH + 2), 0
    for count in parts:
        positions = np.tile(np.arange(start, start + count), (ROWS, 1))
        visible = np.arange(LENGTH + 2) <= positions[..., None]
        ids = case.ids[:, start : start + count]
        hidden, cache = extended(case, cache, ids, positions, start, visible)
        np.testing.assert_allclose(hidden, case.hidden[:, start : start + count], atol=TOLERANCE, rtol=0)
        start += count


def test_slots_are_not_positions(case, rng):
    """Tokens lie anywhere in the cache, behind one another or not: a mask says which are read."""
    order = rng.permutation(LENGTH)
    slot_of = np.argsort(order) + 1
    cache, noise = empty_cache(case.bart, ROWS, LENGTH + 2), rng.normal(size=2)
    cache = jax.tree.map(lambda x: x.at[:, :, 0].set(noise[0]).at[:, :, -1].set(noise[1]), cache)
    for position in range(LENGTH):
        visible = np.zeros((ROWS, 1, LENGTH + 2), bool)
        visible[..., slot_of[: position + 1]] = True
        ids, positions = case.ids[:, position : position + 1], np.full((ROWS, 1), position)
        hidden, cache = extended(case, cache, ids, positions, slot_of[position], visible)
        np.testing.assert_allclose(hidden[:, 0], case.hidden[:, position], atol=TOLERANCE, rtol=0)


def test_texts_beside_one_another_share_prefix_and_memory(case, rng):
    """Two texts a row, token about in turn in one cache, are what each is alone."""
    other = case.ids.copy()
    other[:, 4:] = rng.integers(3, 99, other[:, 4:].shape)
    expected = np.stack([case.hidden[:, 4:], decoded(case.bart, case.params, other, case.memory, case.mask)[:, 4:]], 2)
    slots = 4 + 2 * (LENGTH - 4)
    cache, positions = empty_cache(case.bart, ROWS, slots), np.tile(np.arange(4), (ROWS, 1))
    _, cache = extended(case, cache, case.ids[:, :4], positions, 0, np.arange(slots) <= positions[..., None])
    slot = np.arange(slots)
    for step in range(LENGTH - 4):
        own = ((slot - 4) % 2 == np.arange(2)[:, None]) & (slot < 6 + 2 * step)
        visible = np.broadcast_to((slot < 4) | own, (ROWS, 2, slots))
        ids = np.stack([case.ids[:, 4 + step], other[:, 4 + step]], 1)
        hidden, cache = extended(case, cache, ids, np.full((ROWS, 2), 4 + step), 4 + 2 * step, visible)
        np.testing.assert_allclose(hidden, expected[:, step], atol=TOLERANCE, rtol=0)


def test_a_prefix_ends_where_its_mask_does(case):
    lengths = [2, LENGTH, 5]
    prefix, mask = padded([row[:n] for row, n in zip(case.ids.tolist(), lengths, strict=True)])
    run = jax.jit(lambda params, memory: prefill(make_decoder(case.bart, params, memory), prefix, mask, 3))
    memory = project_memory(case.bart, case.params, case.memory, case.mask)
    hidden, cache = run(case.params, memory)
    np.testing.assert_allclose(hidden, case.hidden[range(ROWS), np.array(lengths) - 1], atol=TOLERANCE, rtol=0)
    heads = case.bart.config.decoder_attention_heads
    shape = (ROWS, heads, LENGTH + 3, case.bart.config.d_model // heads)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [shape] * 2 * case.bart.config.decoder_layers


def test_joined_and_taken_memories_are_those_of_the_states(case, rng):
    """Projecting parts and rows of a memory gives the parts and rows of its projection."""
    rows = np.array([2, 0, 0, 1])
    second = rng.normal(size=(4, 3, case.memory.shape[-1])).astype(np.float32)
    project = functools.partial(project_memory, case.bart, case.params)
    joined = join_memories(
        take_rows(project(case.memory, case.mask), rows), project(second, np.ones(second.shape[:2], bool))
    )
    whole = np.concatenate([case.memory[rows], second], 1)
    expected = project(whole, np.concatenate([case.mask[rows], np.ones((4, 3), bool)], 1))
    assert isinstance(joined, Memory)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0), joined, expected)


def test_a_long_text_may_run_past_the_table(wordy, rng):
    """A row that has ended goes on in lockstep: what it reads past the last position stays finite."""
    bart, params = wordy
    limit = bart.config.max_position_embeddings
    prefix, mask = padded(prefixes(rng, [limit - 2]))
    memory, memory_mask = rng.normal(size=(1, 4, bart.config.d_model)).astype(np.float32), np.ones((1, 4), bool)
    decoder = make_decoder(bart, params, project_memory(bart, params, memory, memory_mask))
    _, cache = prefill(decoder, prefix, mask, 3)
    visible = np.ones((1, 1, limit + 3), bool)
    ids, positions = np.array([[5]], np.int32), np.array([[limit + 2]], np.int32)
    hidden, _ = extend(decoder, cache, ids, positions, jnp.int32(limit), visible)
    assert np.isfinite(hidden).all()
