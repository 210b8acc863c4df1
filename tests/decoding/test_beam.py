"""Beam search: token for token as Hugging Face, and rows that keep to themselves."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
from prompts import BOS, EOS, PAD, START, decode, encode, hugging_face, padded, prefixes, sources, varied

from vlkd_jax.models.bart import Bart

NEW = 12


END_BIAS = {0.6: -0.2, 1.0: 0.1, 2.0: 0.75}
"""Length penalty -> what `</s>` gets on top, so that some of the hypotheses end early, and not all at once."""


@pytest.fixture
def rng() -> np.random.Generator:
    """Of the numbers of the other tests, one prompt has hypotheses that are alike to five digits: rounding decides."""
    return np.random.default_rng(100)


@pytest.fixture(scope="module")
def models(wordy_bart, wordy):
    """Function bias of `</s>` -> the wordy BART with it, as (torch model, (Bart, parameters))."""

    def change(end_bias):
        model, (bart, params) = copy.deepcopy(wordy_bart.model), wordy
        model.final_logits_bias[0, EOS] += end_bias
        bias = params["final_logits_bias"]
        return model, (bart, params | {"final_logits_bias": bias + np.float32(end_bias) * (np.arange(99) == EOS)})

    return change


@pytest.fixture(scope="module")
def model(models):
    """(Bart, parameters)."""
    return models(END_BIAS[1.0])[1]


GROUPS = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams, penalty, early in itertools.product((2, 3, 5), (0.6, 1.0, 2.0), (False, True))
]


def ours(model, memory, mask, prefix, prefix_mask, *, num_beams, **group):
    names = {"num_return_sequences": "returns", "no_repeat_ngram_size": "no_repeat_ngram"}
    options = {"beams": num_beams} | {names.get(name, name): value for name, value in group.items()}
    return decode(model, memory, mask, prefix, prefix_mask, method="beam", max_new_tokens=NEW, **options)


@pytest.mark.parity
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_hundred_prompts_as_hugging_face(models, rng, group):
    torch_model, model = models(END_BIAS[group["length_penalty"]])
    texts = sources(rng, 100)
    memory, mask = encode(model, texts)
    said = ours(model, memory, mask, *padded([[START, BOS]] * 100), **group)
    theirs = hugging_face(torch_model, texts, [[START]] * 100, NEW + 1, **group)
    np.testing.assert_array_equal(said, theirs[..., 1:])
    varied(said, 0.25)
    assert 5 <= (said[:, 0] == PAD).any(1).sum() < 90


@pytest.mark.parity
@pytest.mark.parametrize(
    "group",
    [
        {"num_beams": 3, "no_repeat_ngram_size": 3},
        {"num_beams": 5, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
        {"num_beams": 4, "num_return_sequences": 4, "min_new_tokens": 5},
        {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "no_repeat_ngram_size": 1},
    ],
    ids=str,
)
def test_forced_beginnings_and_rules_as_hugging_face(models, rng, group):
    """Rows of every prefix length in one batch here; Hugging Face takes one length at a time."""
    torch_model, model = models(END_BIAS[group.get("length_penalty", 1.0)])
    lengths = np.repeat([1, 4, 7, 9], 25)
    texts, rows = sources(rng, 100), prefixes(rng, lengths)
    memory, mask = encode(model, texts)
    said = ours(model, memory, mask, *padded(rows), **group)
    for start in range(0, 100, 25):
        part = slice(start, start + 25)
        theirs = hugging_face(torch_model, texts[part], rows[part], NEW, **group)
        np.testing.assert_array_equal(said[part], theirs)
    varied(said)


@pytest.mark.parity
def test_nothing_forced_as_hugging_face(models, rng):
    torch_model, (bart, params) = models(0.0)
    config = dataclasses.replace(bart.config, forced_bos_token_id=None, forced_eos_token_id=None)
    texts, group = sources(rng, 100), {"num_beams": 3, "length_penalty": 1.0}
    memory, mask = encode((bart, params), texts)
    said = ours((Bart(config), params), memory, mask, *padded([[START]] * 100), **group)
    theirs = hugging_face(torch_model, texts, [[START]] * 100, NEW, None, None, **group)
    np.testing.assert_array_equal(said, theirs)
    assert (said[:, 0, -1] != EOS).any()


def test_one_beam_is_greedy(model, rng):
    texts, rows = sources(rng, 30), prefixes(rng, rng.integers(0, 8, 30))
    memory, mask = encode(model, texts)
    one = ours(model, memory, mask, *padded(rows), num_beams=1)
    np.testing.assert_array_equal(one, decode(model, memory, mask, *padded(rows), max_new_tokens=NEW))


def test_a_row_depends_on_itself_alone(model, rng):
    """Wider buffers with anything in the padding, another order, other neighbours and none: the same hypotheses."""
    group = {"num_beams": 4, "num_return_sequences": 3, "no_repeat_ngram_size": 2}
    texts, rows = sources(rng, 8), prefixes(rng, [4, 0, 2, 6, 1, 3, 5, 2])
    memory, mask = encode(model, texts, 16)
    prefix, prefix_mask = padded(rows, 10)
    together = ours(model, memory, mask, prefix, prefix_mask, **group)
    noisy = np.where(mask[..., None], memory, rng.normal(size=memory.shape) * 10).astype(np.float32)
    other = np.where(prefix_mask, prefix, rng.integers(3, 99, prefix.shape)).astype(np.int32)
    np.testing.assert_array_equal(ours(model, noisy, mask, other, prefix_mask, **group), together)
    order = rng.permutation(8)
    moved = ours(model, memory[order], mask[order], prefix[order], prefix_mask[order], **group)
    np.testing.assert_array_equal(moved, together[order])
    for k in (2, 5):
        alone = ours(model, *encode(model, texts[k : k + 1]), *padded(rows[k : k + 1]), **group)
        np.testing.assert_array_equal(alone[0], together[k])
