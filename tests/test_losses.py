"""The losses against plain numpy, their gradients against finite differences, and what (sum, count) promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlkd_jax import losses
from vlkd_jax.models.layers import l2_normalize

BATCH, WIDTH, LENGTH, VOCAB = 6, 5, 7, 11


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(rng, rows=BATCH):
    return unit(rng.normal(size=(rows, WIDTH)))


def token_inputs(rng):
    """logits [B, T, V], targets [B, T] and a ragged mask [B, T]; one row is masked altogether."""
    lengths = np.array([LENGTH, 1, 4, 0, 3, 6])
    logits = rng.normal(size=(BATCH, LENGTH, VOCAB)) * 3
    return logits, rng.integers(VOCAB, size=(BATCH, LENGTH)), np.arange(LENGTH) < lengths[:, None]


def check(loss, expected_sum, expected_count):
    total, count = loss
    assert total.dtype == count.dtype == jnp.float32 and total.shape == count.shape == ()
    np.testing.assert_allclose(total, expected_sum, rtol=1e-5, atol=1e-6)
    assert float(count) == expected_count


def test_l2_normalize(rng):
    x = rng.normal(size=(3, 4, WIDTH)) * 10.0 ** rng.integers(-4, 5, (3, 4, 1))
    np.testing.assert_allclose(l2_normalize(jnp.asarray(x)), unit(x), rtol=1e-5, atol=1e-7)
    assert l2_normalize(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32
    zero = jnp.zeros(WIDTH)
    assert not np.any(l2_normalize(zero))
    assert np.all(np.isfinite(jax.jacobian(l2_normalize)(zero)))


def test_ttdm(rng):
    sentence, text = rng.normal(size=(2, BATCH, WIDTH))
    check(losses.ttdm(sentence, text), sum(np.sum((a - b) ** 2) for a, b in zip(sentence, text)), BATCH)
    check(losses.ttdm(text, text), 0, BATCH)


def itcl_by_rows(image, sentence, scale):
    """The two directions as the cross-entropies of a classifier that must find the partner."""
    total = 0.0
    for rows, columns in ((image, sentence), (sentence, image)):
        for k, row in enumerate(rows):
            scores = np.exp([scale * float(np.dot(row, column)) for column in columns])
            total += -np.log(scores[k] / scores.sum()) / 2
    return total


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07])
def test_itcl(rng, scale):
    image, sentence = vectors(rng), vectors(rng)
    check(losses.itcl(image, sentence, scale), itcl_by_rows(image, sentence, scale), BATCH)
    check(losses.itcl(sentence, image, scale), itcl_by_rows(image, sentence, scale), BATCH)


def test_itcl_of_perfect_pairs_and_of_none(rng):
    rows = np.eye(BATCH)
    check(losses.itcl(rows, rows, 100.0), 0, BATCH)
    check(losses.itcl(np.ones_like(rows), np.ones_like(rows), 100.0), BATCH * np.log(BATCH), BATCH)


def test_icti(rng):
    logits, targets, mask = token_inputs(rng)
    expected = 0.0
    for row, column in zip(*np.nonzero(mask)):
        scores = np.exp(logits[row, column])
        expected -= np.log(scores[targets[row, column]] / scores.sum())
    check(losses.icti(logits, targets, mask), expected, mask.sum())


def test_token_accuracy(rng):
    logits, targets, mask = token_inputs(rng)
    targets = np.where(rng.random(targets.shape) < 0.5, logits.argmax(-1), targets)
    right = sum(logits[k].argmax() == targets[k] for k in zip(*np.nonzero(mask)))
    assert 0 < right < mask.sum()
    check(losses.token_accuracy(logits, targets, mask), right, mask.sum())


@pytest.mark.parametrize("loss", [losses.icti, losses.token_accuracy])
def test_what_is_masked_has_no_say(rng, loss):
    logits, targets, mask = token_inputs(rng)
    noise = np.where(mask[..., None], logits, rng.normal(size=logits.shape) * 1e3)
    others = np.where(mask, targets, rng.integers(VOCAB, size=targets.shape))
    np.testing.assert_array_equal(loss(logits, targets, mask), loss(noise, others, mask))
    assert float(loss(logits, targets, np.zeros_like(mask))[1]) == 0


def test_nothing_flows_back_from_masked_positions(rng):
    logits, targets, mask = token_inputs(rng)
    gradient = np.asarray(jax.grad(lambda x: losses.icti(x, targets, mask)[0])(jnp.asarray(logits, jnp.float32)))
    assert not gradient[~mask].any() and np.all(np.abs(gradient[mask]).sum(-1) > 0)


def test_parts_add_up_but_those_of_itcl(rng):
    """Sums and counts of two unequal parts are those of the whole; part of a contrastive batch has fewer negatives."""
    logits, targets, mask = token_inputs(rng)
    sentence, text = vectors(rng), vectors(rng)
    for loss, inputs in (
        (losses.ttdm, (sentence, text)),
        (losses.icti, (logits, targets, mask)),
        (losses.token_accuracy, (logits, targets, mask)),
    ):
        parts = [loss(*(x[rows] for x in inputs)) for rows in (slice(0, 2), slice(2, None))]
        np.testing.assert_allclose(np.sum(parts, 0), loss(*inputs), rtol=1e-6)
    parts = [losses.itcl(text[rows], sentence[rows], 2.0) for rows in (slice(0, 2), slice(2, None))]
    whole = losses.itcl(text, sentence, 2.0)
    assert sum(count for _, count in parts) == whole[1] and sum(total for total, _ in parts) < 0.9 * whole[0]


def test_contrastive_products_are_exact_on_every_device(rng):
    """Accelerators multiply float32 in TF32 or bfloat16 unless asked; so must the gradient's products be."""
    with jax.default_matmul_precision("bfloat16"):
        lowered = jax.jit(jax.grad(lambda *x: losses.itcl(*x)[0], argnums=(0, 1))).lower(
            *vectors(rng).astype(np.float32)[None].repeat(2, 0), np.float32(100)
        )
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 3 and all("HIGHEST" in line for line in products)


def differences(function, x, step):
    """Central finite differences of a scalar function, entry by entry."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        gradient[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def test_gradient_of_itcl(rng):
    inputs = [vectors(rng), vectors(rng), np.float64(3.0)]
    ours = jax.grad(lambda *x: losses.itcl(*x)[0], argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.float32) for x in inputs))
    for k, gradient in enumerate(ours):

        def moved(x, k=k):
            return itcl_by_rows(*[x if j == k else other for j, other in enumerate(inputs)])

        np.testing.assert_allclose(gradient, differences(moved, np.asarray(inputs[k]), 1e-5), atol=2e-5)


def test_gradient_of_ttdm_through_l2_normalize(rng):
    x, text = rng.normal(size=(3, WIDTH)), vectors(rng, 3)
    ours = jax.grad(lambda x: losses.ttdm(l2_normalize(x), text)[0])(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, differences(lambda x: np.sum((unit(x) - text) ** 2), x, 1e-5), atol=2e-5)


def test_low_precision_inputs_are_summed_in_float32(rng):
    """4,096 equal terms: a bfloat16 sum would stand still after 256 of them. Nor are products rounded to bfloat16."""
    sentence, text = jnp.ones((4096, 1), jnp.bfloat16), jnp.zeros((4096, 1), jnp.bfloat16)
    check(losses.ttdm(sentence, text), 4096, 4096)
    total, _ = losses.icti(jnp.zeros((1, 4096, 2), jnp.bfloat16), np.zeros((1, 4096), int), np.ones((1, 4096), bool))
    np.testing.assert_allclose(total, 4096 * np.log(2), rtol=1e-5)
    image, sentence = (jnp.asarray(vectors(rng), jnp.bfloat16) for _ in range(2))
    expected = itcl_by_rows(*(np.asarray(x, np.float64) for x in (image, sentence)), 1 / 0.07)
    check(losses.itcl(image, sentence, 1 / 0.07), expected, BATCH)
