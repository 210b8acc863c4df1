"""The losses and their gradients against plain numpy in float64, in chunks and on several devices as on one, and what
(sum, count) promises."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import make_mesh

from vlkd_jax import losses
from vlkd_jax.models.layers import l2_normalize
from vlkd_jax.sharding import AXES, put_everywhere, put_rows

BATCH, WIDTH, LENGTH, VOCAB = 6, 5, 7, 11


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(rng, rows=BATCH, width=WIDTH):
    return unit(rng.normal(size=(rows, width)))


def token_inputs(rng, rows=BATCH):
    """hidden [B, T, D], table [V, D], bias [V], targets [B, T] and a ragged mask; one row is masked altogether."""
    lengths = np.resize([LENGTH, 1, 4, 0, 3, 6], rows)
    hidden, table = rng.normal(size=(rows, LENGTH, WIDTH)), rng.normal(size=(VOCAB, WIDTH))
    targets, mask = rng.integers(VOCAB, size=(rows, LENGTH)), np.arange(LENGTH) < lengths[:, None]
    return hidden, table, rng.normal(size=VOCAB), targets, mask


def check(loss, expected_sum, expected_count):
    total, count = loss
    assert total.dtype == count.dtype == jnp.float32 and total.shape == count.shape == ()
    np.testing.assert_allclose(total, expected_sum, rtol=1e-5, atol=1e-6)
    assert float(count) == expected_count


def close(ours, theirs, tolerance):
    """Trees of arrays equal in norm, each relative to its own."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert one.shape == other.shape and np.all(np.isfinite(one))
        assert np.linalg.norm(one - other) <= tolerance * max(np.linalg.norm(other), 1e-3)


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
    check(losses.itcl(image, sentence, scale)[0], itcl_by_rows(image, sentence, scale), BATCH)
    check(losses.itcl(sentence, image, scale)[0], itcl_by_rows(image, sentence, scale), BATCH)


def test_itcl_of_perfect_pairs_and_of_none(rng):
    rows, same = np.eye(BATCH), unit(np.ones((BATCH, BATCH)))
    for chunk in (None, 4):
        loss, accuracy = losses.itcl(rows, rows, 100.0, chunk)
        check(loss, 0, BATCH)
        check(accuracy, BATCH, BATCH)
        loss, accuracy = losses.itcl(same, same, 100.0, chunk)
        check(loss, BATCH * np.log(BATCH), BATCH)
        check(accuracy, 1, BATCH)  # of sentences that are all as near, the first in the batch


def plain_itcl(image, sentence, scale):
    """With the whole block of logits, by automatic differentiation."""
    logits = scale * jnp.einsum("be,ce->bc", image, sentence, precision="highest", preferred_element_type=jnp.float32)
    own = jnp.diagonal(logits)
    right = jnp.argmax(logits, 1) == jnp.arange(len(own))
    return jnp.sum(0.5 * (jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)) - own), jnp.sum(right)


@functools.cache
def with_slopes(loss, argnums, *options):
    """Jitted (inputs) -> ((loss, how many are right), gradients)."""

    def sums(*inputs):
        total, right = loss(*inputs, *options)
        return (total, right) if loss is plain_itcl else (total[0], right[0])

    return jax.jit(jax.value_and_grad(sums, argnums, has_aux=True))


@pytest.mark.parametrize("scale", [1.0, 1 / 0.07, 100.0])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 1), (1, None), (64, 64), (64, 8), (61, 20), (61, 1), (13, 1000)])
def test_chunks_of_itcl_are_the_whole(rng, scale, rows, chunk):
    """Inputs have few digits, so that products are exact: on these the order of their sums would weigh the most."""
    image = vectors(rng, rows, 16)
    sentence = unit(image + rng.normal(size=image.shape))
    inputs = [*(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in (image, sentence)), jnp.float32(scale)]
    (total, right), slopes = with_slopes(losses.itcl, (0, 1, 2), chunk)(*inputs)
    (expected, expected_right), expected_slopes = with_slopes(plain_itcl, (0, 1, 2))(*inputs)
    close((total, slopes), (expected, expected_slopes), 1e-6)
    assert right == expected_right and (rows == 1 or 0 < right < rows)


def test_chunks_of_itcl_with_rounded_embeddings(rng):
    image, sentence = (jnp.asarray(vectors(rng, 32, 16), jnp.bfloat16) for _ in range(2))
    whole = with_slopes(plain_itcl, (0, 1, 2))(image, sentence, jnp.float32(20))
    parts = with_slopes(losses.itcl, (0, 1, 2), 5)(image, sentence, jnp.float32(20))
    assert parts[1][0].dtype == jnp.bfloat16
    close(parts[0], whole[0], 1e-6)
    close(parts[1], whole[1], 2**-7)  # a chunk's share of a gradient is rounded as the embedding is


def icti_by_positions(hidden, table, bias, targets, mask):
    """(loss, how many are right, gradients of hidden and table), position by position."""
    loss, right, by_hidden, by_table = 0.0, 0, np.zeros_like(hidden), np.zeros_like(table)
    for at in zip(*np.nonzero(mask)):
        logits = table @ hidden[at] + bias
        slope = np.exp(logits) / np.exp(logits).sum()
        loss -= np.log(slope[targets[at]])
        right += logits.argmax() == targets[at]
        slope[targets[at]] -= 1
        by_hidden[at], by_table = table.T @ slope, by_table + np.outer(slope, hidden[at])
    return loss, right, by_hidden, by_table


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 41, 1000])
def test_icti(rng, chunk):
    hidden, table, bias, targets, mask = token_inputs(rng)
    guess = np.argmax(hidden @ table.T + bias, -1)
    targets = np.where(rng.random(targets.shape) < 0.5, guess, targets)
    loss, right, *slopes = icti_by_positions(hidden, table, bias, targets, mask)
    assert 0 < right < mask.sum()
    ours = losses.icti(hidden, table, bias, targets, mask, chunk)
    check(ours[0], loss, mask.sum())
    check(ours[1], right, mask.sum())
    inputs = [jnp.asarray(x, jnp.float32) for x in (hidden, table, bias)]
    ours = with_slopes(losses.icti, (0, 1, 2), chunk)(*inputs, targets, mask)
    close(ours, ((loss, right), (*slopes, np.zeros(VOCAB))), 1e-6)


def test_label_smoothing(rng):
    """With it the loss is that against targets of which a share lies on all of the vocabulary alike."""
    hidden, table, bias, targets, mask = token_inputs(rng)
    inputs = [jnp.asarray(x, jnp.float32) for x in (hidden, table)]

    def plain(hidden, table):
        shares = 0.9 * jax.nn.one_hot(targets, VOCAB) + 0.1 / VOCAB
        return -jnp.sum(jax.nn.log_softmax(hidden @ table.T + bias) * shares * mask[..., None])

    def ours(hidden, table):
        parts = [loss(hidden, table, bias, targets, mask) for loss in (losses.icti, losses.label_smoothing)]
        (loss, _), (excess, count) = parts[0][0], parts[1]
        assert excess.dtype == jnp.float32
        return loss + 0.1 * excess, count

    (loss, count), slopes = jax.value_and_grad(ours, (0, 1), has_aux=True)(*inputs)
    close((loss, slopes), jax.value_and_grad(plain, (0, 1))(*inputs), 1e-6)
    assert count == mask.sum()


def test_icti_in_bfloat16_rounds_its_inputs_alone(rng):
    """Sums are float32, also of the table's gradient, and the part of it that each chunk gives."""
    hidden, table, bias, targets, mask = token_inputs(rng, rows=32)
    half = jnp.asarray(hidden, jnp.bfloat16)
    table, bias = jnp.asarray(table, jnp.float32), jnp.asarray(bias, jnp.float32)
    rounded = [np.asarray(x, np.float64) for x in (half, table.astype(jnp.bfloat16), bias)]
    loss, _, by_hidden, by_table = icti_by_positions(*rounded, targets, mask)
    for chunk in (None, 3):
        (total, _), slopes = with_slopes(losses.icti, (0, 1), chunk)(half, table, bias, targets, mask)
        assert [slope.dtype for slope in slopes] == [jnp.bfloat16, jnp.float32]
        close(total, loss, 1e-6)
        close(slopes, (by_hidden, by_table), 2**-8)


def test_what_is_masked_has_no_say(rng):
    hidden, table, bias, targets, mask = token_inputs(rng)
    noise = np.where(mask[..., None], hidden, rng.normal(size=hidden.shape) * 1e3)
    others = np.where(mask, targets, rng.integers(VOCAB, size=targets.shape))
    clean, noisy = losses.icti(hidden, table, bias, targets, mask), losses.icti(noise, table, bias, others, mask)
    np.testing.assert_array_equal(clean, noisy)
    slopes = with_slopes(losses.icti, (0, 1), 4)(*map(jnp.float32, (noise, table, bias)), others, mask)[1]
    assert not np.asarray(slopes[0])[~mask].any() and np.all(np.abs(slopes[0])[mask].sum(-1) > 0)
    close(slopes[1], icti_by_positions(hidden, table, bias, targets, mask)[3], 1e-6)
    assert float(losses.icti(hidden, table, bias, targets, np.zeros_like(mask))[0][1]) == 0


def test_parts_add_up_but_those_of_itcl(rng):
    """Sums and counts of two unequal parts are those of the whole; part of a contrastive batch has fewer negatives."""
    hidden, table, bias, targets, mask = token_inputs(rng)
    sentence, text = vectors(rng), vectors(rng)

    def icti(hidden, targets, mask):
        return losses.icti(hidden, table, bias, targets, mask)

    for loss, inputs in ((losses.ttdm, (sentence, text)), (icti, (hidden, targets, mask))):
        parts = [loss(*(x[rows] for x in inputs)) for rows in (slice(0, 2), slice(2, None))]
        np.testing.assert_allclose(np.sum(parts, 0), loss(*inputs), rtol=1e-6)
    parts = [losses.itcl(text[rows], sentence[rows], 2.0)[0] for rows in (slice(0, 2), slice(2, None))]
    whole = losses.itcl(text, sentence, 2.0)[0]
    assert sum(count for _, count in parts) == whole[1] and sum(total for total, _ in parts) < 0.9 * whole[0]


def test_finished_terms(rng):
    image, sentence = (jnp.asarray(vectors(rng), jnp.float32) for _ in range(2))
    other = jnp.float32(1), jnp.float32(2)
    finished = losses.finish({"itcl": losses.Pairs(image, sentence, jnp.float32(3)), "other": other})
    assert set(finished) == {"itcl", "itcl_accuracy", "other"} and finished["other"] == other
    assert (finished["itcl"], finished["itcl_accuracy"]) == losses.itcl(image, sentence, 3.0)


@pytest.mark.parametrize("chunk", [None, 2])
def test_contrastive_products_are_exact_on_every_device(rng, chunk):
    """Accelerators multiply float32 in TF32 or bfloat16 unless asked; so must the gradient's products be."""
    with jax.default_matmul_precision("bfloat16"):
        lowered = jax.jit(jax.grad(lambda *x: losses.itcl(*x, chunk)[0][0], argnums=(0, 1))).lower(
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
    for chunk in (None, 4):
        _, ours = with_slopes(losses.itcl, (0, 1, 2), chunk)(*(jnp.asarray(x, jnp.float32) for x in inputs))
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
    targets, mask = np.zeros((1, 4096), int), np.ones((1, 4096), bool)
    loss, _ = losses.icti(jnp.zeros((1, 4096, 1), jnp.bfloat16), np.ones((2, 1)), np.zeros(2), targets, mask)
    check(loss, 4096 * np.log(2), 4096)
    image, sentence = (jnp.asarray(vectors(rng), jnp.bfloat16) for _ in range(2))
    expected = itcl_by_rows(*(np.asarray(x, np.float64) for x in (image, sentence)), 1 / 0.07)
    check(losses.itcl(image, sentence, 1 / 0.07)[0], expected, BATCH)


MESHES = {"rows": {"data": 4, "fsdp": 2}, "model": {"data": 2, "fsdp": 2, "model": 2}}


def loops(compiled):
    """Text of a compiled program's computations that a loop runs, and of the others."""
    text = compiled.as_text()
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    inside = {name: computations.pop(name) for name in set(re.findall(r"body=%?([\w.\-]+)", text))}
    return "".join(inside.values()), "".join(computations.values())


@pytest.mark.parametrize("name", MESHES)
def test_icti_on_eight_devices(rng, name):
    """As on one; devices add up the table's gradient once, and logits of all their positions never exist."""
    mesh, inputs = make_mesh(**MESHES[name]), token_inputs(rng, rows=16)
    inputs = [np.asarray(x, np.float32 if x.dtype == np.float64 else x.dtype) for x in inputs]
    expected = with_slopes(losses.icti, (0, 1), None)(*inputs)
    arrays = [put_rows(mesh, x) if k in (0, 3, 4) else put_everywhere(mesh, x) for k, x in enumerate(inputs)]
    with jax.set_mesh(mesh):
        compiled = with_slopes(losses.icti, (0, 1), 3).lower(*arrays).compile()
    ours = compiled(*arrays)
    close(ours, expected, 1e-6)
    assert ours[1][0].sharding.is_equivalent_to(NamedSharding(mesh, P(AXES)), 3)
    inside, outside = loops(compiled)
    assert "dot(" in inside and not re.search(r"all-(reduce|gather|to-all)|collective-permute", inside)
    sums = re.findall(rf"f32\[(?:1,)?{VOCAB},{WIDTH}\]\S* all-reduce(?:-start)?\(", outside)
    assert len(sums) == 1


@pytest.mark.parametrize("name", MESHES)
def test_itcl_on_eight_devices(rng, name):
    """As on one; each device compares its own images with a chunk of all sentences."""
    mesh, rows = make_mesh(**MESHES[name]), 40
    inputs = [np.asarray(x, np.float32) for x in (vectors(rng, rows, 16), vectors(rng, rows, 16), 30.0)]
    expected = with_slopes(losses.itcl, (0, 1, 2), None)(*inputs)
    arrays = *put_rows(mesh, inputs[:2]), put_everywhere(mesh, inputs[2])
    with jax.set_mesh(mesh):
        compiled = with_slopes(losses.itcl, (0, 1, 2), 16).lower(*arrays).compile()
    close(compiled(*arrays), expected, 1e-6)
    inside, _ = loops(compiled)
    assert f"f32[{rows // 8},14]" in inside and f"f32[{rows},14]" not in compiled.as_text()


def test_rows_that_devices_cannot_share(rng):
    mesh = make_mesh(data=8)
    hidden, table, bias, targets, mask = token_inputs(rng)
    image, sentence = vectors(rng), vectors(rng)
    with jax.set_mesh(mesh):
        close(jax.jit(losses.itcl)(image, sentence, 3.0)[0][0], itcl_by_rows(image, sentence, 3.0), 1e-6)
        ours = jax.jit(losses.icti)(*map(jnp.float32, (hidden, table, bias)), targets, mask)[0][0]
    close(ours, icti_by_positions(hidden, table, bias, targets, mask)[0], 1e-6)


def test_memory_follows_the_chunk():
    """Of both losses with their gradients, as compiled."""
    embeddings, scale = jax.ShapeDtypeStruct((2048, 8), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    positions, vocabulary = jax.ShapeDtypeStruct((16, 64), jnp.int32), jax.ShapeDtypeStruct((4096,), jnp.float32)
    hidden, table = (jax.ShapeDtypeStruct((*x.shape, 8), jnp.float32) for x in (positions, vocabulary))
    keep = jax.ShapeDtypeStruct((16, 64), jnp.bool)
    for loss, inputs in (
        (losses.itcl, (embeddings, embeddings, scale)),
        (losses.icti, (hidden, table, vocabulary, positions, keep)),
    ):
        whole, quarter, sixteenth = (
            with_slopes(loss, (0, 1), chunk).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
            for chunk in (None, inputs[0].size // 32, inputs[0].size // 128)
        )
        assert whole > 3 * quarter > 9 * sixteenth
