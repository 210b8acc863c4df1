"""Ranking: log-likelihoods of given texts, against teacher forcing of each alone, however they are packed."""

import functools

import jax
import numpy as np
import pytest
from prompts import EOS, encode, padded, prefixes, sources

from vlkd_jax.decoding import Decoding, decode, likelihood, make_decoder, pack, project_memory, rank


@pytest.fixture
def texts(rng):
    """Candidates of 1 to 6 tokens; one begins another, and one stands twice."""
    candidates = [list(map(int, rng.integers(3, 99, n))) for n in (1, 1, 4, 2, 6, 3, 1, 2)]
    return [*candidates, candidates[2][:2], candidates[3]]


@functools.partial(jax.jit, static_argnums=0)
def ranked(bart, params, memory, mask, prefix, prefix_mask, candidates):
    decoder = make_decoder(bart, params, project_memory(bart, params, memory, mask))
    return rank(decoder, prefix, prefix_mask, candidates)


def alone(model, memory, mask, prefix, text):
    """Log-likelihood of one text after one prefix, without a cache."""
    bart, params = model
    ids = np.array([[*prefix, *text]], np.int32)
    hidden = bart.apply({"params": params}, ids, memory[None], mask[None], method="decode")
    likely = jax.nn.log_softmax(bart.apply({"params": params}, hidden, method="logits"))[0]
    return sum(float(likely[len(prefix) - 1 + k, token]) for k, token in enumerate([*text, EOS]))


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_log_likelihoods_are_teacher_forcings(wordy, rng, texts, tokens):
    rows = prefixes(rng, [0, 5, 2])
    memory, mask = encode(wordy, sources(rng, 3))
    scores = np.asarray(ranked(*wordy, memory, mask, *padded(rows), pack(texts, EOS, tokens)))
    assert scores.shape == (3, len(texts))
    for row, candidate in ((0, 0), (0, 4), (1, 2), (1, 8), (2, 5), (2, 7), (2, 9)):
        expected = alone(wordy, memory[row], mask[row], rows[row], texts[candidate])
        np.testing.assert_allclose(scores[row, candidate], expected, atol=2e-4, rtol=0)
    np.testing.assert_allclose(scores[:, 3], scores[:, 9], atol=1e-5, rtol=0)


def test_packed_chunks_hold_every_text_whole(texts):
    packed = pack(texts, EOS, 8)
    assert packed.ids.shape == packed.target.shape == packed.offset.shape == packed.text.shape
    assert packed.ids.shape[1] == 8 and packed.ids.shape[0] < len(texts)
    for number, text in enumerate(texts):
        chunk, at = np.nonzero(packed.text == number)
        assert len(set(chunk)) == 1 and packed.offset[chunk, at].tolist() == list(range(len(text)))
        assert packed.ids[chunk, at].tolist() == text and packed.target[chunk, at].tolist() == [*text[1:], EOS]
    assert (packed.text < len(texts)).sum() == sum(map(len, texts))


@functools.partial(jax.jit, static_argnums=(0, 6))
def said(bart, params, memory, mask, prefix, prefix_mask, options):
    decoder = make_decoder(bart, params, project_memory(bart, params, memory, mask))
    ids = decode(decoder, prefix, prefix_mask, np.arange(len(prefix)), options)
    return ids, likelihood(decoder, prefix, prefix_mask, ids)


@pytest.mark.parametrize(
    "options",
    [
        Decoding(max_new_tokens=7),
        Decoding("beam", max_new_tokens=7, beams=4, returns=3),
        Decoding("sample", max_new_tokens=7, returns=3, seed=1),
    ],
    ids=lambda options: options.method,
)
def test_likelihoods_of_what_was_said(wordy, rng, options):
    """Of every text of every row its own, whether it ended early or was cut off."""
    rows = prefixes(rng, [0, 5, 2])
    memory, mask = encode(wordy, sources(rng, 3))
    ids, scores = map(np.asarray, said(*wordy, memory, mask, *padded(rows), options))
    assert scores.shape == ids.shape[:2] == (3, options.returns)
    for row, number in np.ndindex(scores.shape):
        text = ids[row, number].tolist()
        text = text[: text.index(EOS)] if EOS in text else text
        expected = alone(wordy, memory[row], mask[row], rows[row], text)
        np.testing.assert_allclose(scores[row, number], expected, atol=2e-4, rtol=0)
