"""Sampling: drawn with the model's own probabilities, of the tokens that top-k and top-p leave, row by row."""

import itertools

import jax
import numpy as np
import pytest
from prompts import BOS, EOS, PAD, START, decode, encode, padded, prefixes, sources
from scipy import stats

DRAWS = 2000


@pytest.fixture(scope="module")
def asked(wordy):
    """(memory, mask, prefix, prefix mask) of one prompt, and its next token's logits [V]."""
    bart, params = wordy
    rng = np.random.default_rng(0)
    memory, mask = encode(wordy, sources(rng, 1))
    prefix, prefix_mask = padded(prefixes(rng, [3]))
    hidden = bart.apply({"params": params}, prefix, memory, mask, method="decode")
    return (memory, mask, prefix, prefix_mask), np.asarray(bart.apply({"params": params}, hidden, method="logits"))[
        0, -1
    ]


def drawn(model, asked, count=DRAWS, **options):
    """The first tokens of `count` texts."""
    return decode(model, *asked[0], method="sample", max_new_tokens=2, returns=count, **options)[0, :, 0]


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that shall be drawn from: a plain rewrite."""
    logits = logits.astype(np.float64)
    order = np.argsort(-logits)
    probabilities = np.exp(logits / temperature - np.max(logits / temperature))
    probabilities[order[top_k or len(order) :]] = 0
    probabilities /= probabilities.sum()
    total, share = 0.0, np.zeros_like(probabilities)
    for token in order:
        if total >= top_p:
            break
        share[token], total = probabilities[token], total + probabilities[token]
    return share / share.sum()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8, "temperature": 2.0}]
)
def test_frequencies_are_the_probabilities(wordy, asked, options):
    tokens, expected = drawn(wordy, asked, **options), kept(asked[1], **options)
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    often = expected * DRAWS >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * DRAWS
    good = wanted > 0
    assert stats.chisquare(observed[good], wanted[good]).pvalue > 1e-3
    assert (counts > 0).sum() > 2


def test_one_token_left_is_greedy(wordy, rng):
    memory, mask = encode(wordy, sources(rng, 12))
    prompt = memory, mask, *padded(prefixes(rng, rng.integers(0, 8, 12)))
    likeliest = decode(wordy, *prompt, max_new_tokens=9)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        np.testing.assert_array_equal(decode(wordy, *prompt, method="sample", max_new_tokens=9, **options), likeliest)


def test_a_row_depends_on_its_draw_and_the_seed_alone(wordy, rng):
    texts, rows = sources(rng, 6), prefixes(rng, [2, 0, 4, 1, 3, 5])
    memory, mask = encode(wordy, texts, 16)
    prefix, prefix_mask = padded(rows, 8)
    options = {"method": "sample", "max_new_tokens": 9, "returns": 3, "temperature": 1.5}
    draws = np.array([7, 1, 5, 2**31 - 1, 0, 3], np.int32)
    together = decode(wordy, memory, mask, prefix, prefix_mask, draws, **options)
    order = rng.permutation(6)
    moved = decode(wordy, memory[order], mask[order], prefix[order], prefix_mask[order], draws[order], **options)
    np.testing.assert_array_equal(moved, together[order])
    for other in ({"draws": draws + np.int32(11) * (draws < 9)}, {"seed": 1}):
        changed = decode(wordy, memory, mask, prefix, prefix_mask, **({"draws": draws} | options | other))
        assert (changed[draws < 9] != together[draws < 9]).any((1, 2)).all()
    assert all(len({tuple(text) for text in row}) == 3 for row in together.tolist())


def test_texts_are_their_own_continuations(wordy, rng):
    """Beside one another in one cache, each text reads itself: its tokens are likely after its own ones alone."""
    bart, params = wordy
    memory, mask = encode(wordy, sources(rng, 4))
    rows = prefixes(rng, [3, 1, 0, 5])
    said = decode(wordy, memory, mask, *padded(rows), method="sample", max_new_tokens=10, returns=5, top_k=2)
    logits_of = jax.jit(
        lambda ids, memory, mask: bart.apply(
            {"params": params},
            bart.apply({"params": params}, ids, memory, mask, method="decode"),
            method="logits",
        )
    )
    for row in range(4):
        whole, _ = padded([[*rows[row], *text] for text in said[row].tolist()], 20)
        logits = np.asarray(
            logits_of(whole, np.repeat(memory[row : row + 1], 5, 0), np.repeat(mask[row : row + 1], 5, 0))
        )
        for text, scores in zip(said[row], logits, strict=True):
            end = int(np.argmax(text == EOS))
            for at, token in enumerate(text[:end] if end == 9 else text[: end + 1]):
                assert token in np.argsort(-scores[len(rows[row]) + at - 1])[:2]
            assert (text[end + 1 :] == PAD).all()


def test_rules_hold(wordy, rng):
    memory, mask = encode(wordy, sources(rng, 20))
    prompt = memory, mask, *padded([[START, BOS, 5, 6, 7]] * 20)
    options = {"method": "sample", "max_new_tokens": 16, "min_new_tokens": 9, "no_repeat_ngram": 2, "temperature": 0.3}
    for text in decode(wordy, *prompt, returns=2, **options).reshape(-1, 16).tolist():
        whole = [START, BOS, 5, 6, 7, *text[: text.index(EOS) + 1]]
        assert text.index(EOS) >= 9
        pairs = list(itertools.pairwise(whole))
        assert len(set(pairs[:-1])) == len(pairs[:-1])  # the forced end may repeat
