"""The distillation losses. Each returns (sum, count), so that sharded and padded batches give the one-big-batch mean.

All but `itcl` add up over parts of a batch. Each pair of `itcl` is compared with every other of the batch it is given,
so the sum over two halves is another, easier loss than that of the whole: it always needs the global batch at once.
A task therefore gives `Pairs`, and `finish` makes the loss of them once the whole batch's are there.

Large blocks of logits never exist whole: `itcl` and `icti` work through them in chunks of about `CHUNK_BYTES` for each
device, with rows spread over the mesh of `jax.set_mesh`, and make each chunk again, or its gradient at once, instead
of keeping it. Results do not depend on the chunks but for rounding.

Sources: method section of Dai et al. 2022 (arXiv 2203.06386) as far as it is known; README.md lists what is our choice.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlkd_jax.sharding import AXES, BATCH, constrain
from vlkd_jax.types import Array, ArrayLike, Bool, Float, Float32, Int

SumAndCount = tuple[Float32[Array, ""], Float32[Array, ""]]
CHUNK_BYTES = 2**28
"""Size of the float32 logits that one device has before it at once; what lies below is not cut.

For each chunk `icti` reads and writes the gradient of the whole table. With BART-large's a chunk is 1,335 positions; by
the bandwidth and peak of an H100 (not measured) the products then take about five times as long as that traffic, and
at a quarter of the bytes as long.
"""


class Pairs(NamedTuple):
    """What `itcl` compares; the rows of several parts of a batch may be put together first.

    Attributes:
      image, sentence: L2-normalised embeddings, row by row of one pair.
      scale: the inverse temperature.
    """

    image: Float[Array, "B E"]
    sentence: Float[Array, "B E"]
    scale: Float[Array, ""]


def finish(terms: dict[str, SumAndCount | Pairs]) -> dict[str, SumAndCount]:
    """The loss terms of a whole batch: `Pairs` under a name become the `itcl` of that name and `<name>_accuracy`."""
    finished = {}
    for name, term in terms.items():
        if isinstance(term, Pairs):
            finished[name], finished[f"{name}_accuracy"] = itcl(*term)
        else:
            finished[name] = term
    return finished


def ttdm(sentence: Float[ArrayLike, "B E"], text: Float[ArrayLike, "B E"]) -> SumAndCount:
    """Text-text distance minimisation: squared L2 distance of the student's sentence to the teacher's text."""
    distance = jnp.sum(jnp.square(sentence.astype(jnp.float32) - text.astype(jnp.float32)), -1)
    return jnp.sum(distance), jnp.float32(distance.shape[0])


def itcl(
    image: Float[ArrayLike, "B E"],
    sentence: Float[ArrayLike, "B E"],
    scale: Float[ArrayLike, ""],
    chunk: int | None = None,
) -> tuple[SumAndCount, SumAndCount]:
    """Image-text contrastive loss: symmetric cross-entropy of `scale * image . sentence^T` over the global batch.

    Args:
      image: L2-normalised.
      sentence: L2-normalised.
      scale: the inverse temperature.
      chunk: sentences that all images are compared with at once, at most; None: by `CHUNK_BYTES`.

    Returns:
      The loss, and its accuracy: how many images have their own sentence nearest. Of several that are equally near,
      the first in the batch counts as the nearest.
    """
    count = image.shape[0]
    axes, shards = _spread(count)
    parts = _parts(count, 4 * count // shards, chunk)
    image, sentences = constrain(jnp.asarray(image), axes, None), _split(jnp.asarray(sentence), parts)
    columns = jnp.arange(parts * sentences.shape[1]).reshape(parts, -1)
    compare = functools.partial(_compare, image, scale)
    if parts > 1:  # the backward pass makes each chunk's logits again
        compare = jax.checkpoint(compare, prevent_cse=False)
    zeros = constrain(jnp.zeros(count, jnp.float32), axes)
    start = _Rows(zeros - jnp.inf, zeros, zeros, jnp.zeros_like(zeros, jnp.int32))
    rows, over_images = jax.lax.scan(compare, start, (constrain(sentences), columns), unroll=parts == 1)
    highest, total = (x.reshape(-1)[:count] for x in over_images)
    # differences of logits come first: what is left of a large one loses its digits when it is added to a small one
    per_pair = 0.5 * (jnp.log(rows.total) + (rows.highest - rows.own) + jnp.log(total) + (highest - rows.own))
    right = rows.nearest == jnp.arange(count)
    count = jnp.float32(count)
    return (jnp.sum(per_pair), count), (jnp.sum(right, dtype=jnp.float32), count)


class _Rows(NamedTuple):
    """What `itcl` knows of each image's logits after some of the sentences."""

    highest: Float32[Array, " B"]
    total: Float32[Array, " B"]  # sum of exp(logit - highest)
    own: Float32[Array, " B"]  # that of its own sentence
    nearest: Int[Array, " B"]  # index of the sentence with the highest


def _compare(
    image: Float[Array, "B E"],
    scale: Float[ArrayLike, ""],
    rows: _Rows,
    chunk: tuple[Float[Array, "chunk E"], Int[Array, " chunk"]],
) -> tuple[_Rows, tuple[Float32[Array, " chunk"], Float32[Array, " chunk"]]]:
    """One chunk of sentences with their indices, B and above for padding: (rows, each sentence's highest and total)."""
    sentences, columns = chunk
    # scale enlarges the products' rounding a hundredfold; the default is TF32 or bfloat16 on accelerators
    products = jnp.einsum("be,ce->bc", image, sentences, precision="highest", preferred_element_type=jnp.float32)
    logits = scale * products
    of_pairs = jnp.where(columns < len(image), logits, -jnp.inf)
    # the highest only keep exp in its range: the sums' logarithms with them are the same for every choice
    constant, over_images = jax.lax.stop_gradient(of_pairs), jax.lax.stop_gradient(jnp.max(logits, 0))
    nearest, top = columns[jnp.argmax(constant, 1)], jnp.max(constant, 1)
    highest = jnp.maximum(rows.highest, top)
    place = jnp.arange(len(image)) - columns[0]
    own = jnp.take_along_axis(logits, jnp.clip(place, 0, len(columns) - 1)[:, None], 1)[:, 0]
    new = _Rows(
        highest,
        rows.total * jnp.exp(rows.highest - highest) + jnp.sum(jnp.exp(of_pairs - highest[:, None]), 1),
        jnp.where((place >= 0) & (place < len(columns)), own, rows.own),
        jnp.where(top > rows.highest, nearest, rows.nearest),
    )
    return new, (over_images, jnp.sum(jnp.exp(logits - over_images), 0))


def icti(
    hidden: Float[ArrayLike, "B T D"],
    table: Float[ArrayLike, "V D"],
    bias: Float[ArrayLike, " V"],
    targets: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
    chunk: int | None = None,
) -> tuple[SumAndCount, SumAndCount]:
    """Infilling loss: cross-entropy of `hidden . table^T + bias` against targets, summed where mask is True.

    Products are taken in the dtype of `hidden` and summed in float32. Gradients of hidden and table are computed in
    the same pass as the loss where they are wanted; bias has none.

    Args:
      hidden: the decoder's last hidden states.
      table: the output embedding, which is BART's token embedding.
      chunk: positions of each device whose logits exist at once, at most; None: by `CHUNK_BYTES`.

    Returns:
      The loss, and its accuracy: how many targets have the highest logit, be it with others.
    """
    arrays = map(jnp.asarray, (hidden, table, bias, targets, mask))
    loss, right = _cross_entropy(*arrays, chunk)
    count = jnp.sum(mask, dtype=jnp.float32)
    return (loss, count), (right, count)


def label_smoothing(
    hidden: Float[ArrayLike, "B T D"],
    table: Float[ArrayLike, "V D"],
    bias: Float[ArrayLike, " V"],
    targets: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"],
) -> SumAndCount:
    """By how much the cross-entropy against all of the vocabulary alike exceeds `icti`, of the same arguments.

    `icti + e * label_smoothing` is the loss that Hugging Face's `LabelSmoother` and PyTorch take with a smoothing of e
    (Szegedy et al. 2016, section 7; BART's authors fine-tune for summaries with 0.1). No logits are needed.
    """
    table, bias = jnp.asarray(table), jnp.asarray(bias)
    away, offset = table[targets] - table.mean(0), bias[targets] - bias.mean()
    excess = jnp.einsum("btd,btd->bt", hidden, away, preferred_element_type=jnp.float32) + offset
    return jnp.sum(jnp.where(mask, excess, 0)), jnp.sum(mask, dtype=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(hidden: Array, table: Array, bias: Array, targets: Array, mask: Array, chunk: int | None):
    """(summed loss, how many are right) of `icti`."""
    return _over_positions(hidden, table, bias, targets, mask, chunk, slopes=False)[0]


def _cross_entropy_forward(hidden: Array, table: Array, bias: Array, targets: Array, mask: Array, chunk: int | None):
    return _over_positions(hidden, table, bias, targets, mask, chunk, slopes=True)


def _cross_entropy_backward(chunk: int | None, slopes: tuple[Array, Array], cotangents: tuple[Array, Array]):
    return *((cotangents[0] * slope).astype(slope.dtype) for slope in slopes), None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _over_positions(
    hidden: Array, table: Array, bias: Array, targets: Array, mask: Array, chunk: int | None, slopes: bool
) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """((summed loss, how many are right), the loss's gradients of hidden and table where `slopes`, or None)."""
    axes, shards = _spread(hidden.shape[0])
    positions = mask.size // shards  # of each device
    parts = _parts(positions, 4 * len(table), chunk)

    def split(x: Array) -> Array:
        x = constrain(x.reshape(shards, positions, *x.shape[2:]), axes)
        return constrain(_split(x, parts, 1), None, axes)

    vocabulary = constrain(table.astype(hidden.dtype))  # whole on every device before the loop, not in it
    # sums of each shard by itself: devices add theirs up once, after the loop
    shapes = [(shards,), (shards,), (shards, *table.shape)][: 3 if slopes else 2]
    start = tuple(constrain(jnp.zeros(shape, jnp.float32), axes) for shape in shapes)
    score = functools.partial(_score, vocabulary, bias, slopes)
    sums, by_states = jax.lax.scan(score, start, tuple(map(split, (hidden, targets, mask))), unroll=parts == 1)
    loss, right, *by_table = (x.sum(0) for x in sums)
    if not slopes:
        return (loss, right), None
    by_hidden = jnp.moveaxis(by_states, 0, 1).reshape(shards, -1, hidden.shape[-1])[:, :positions]
    return (loss, right), (by_hidden.reshape(hidden.shape), by_table[0].astype(table.dtype))


def _score(
    table: Array, bias: Array, slopes: bool, sums: tuple[Array, ...], chunk: tuple[Array, Array, Array]
) -> tuple[tuple[Array, ...], Array | None]:
    """One chunk of (states [shards, positions, D], targets, mask) added to each shard's sums of loss, how many are
    right and, where `slopes`, the table's gradient; beside them then the gradient of the states."""
    states, targets, mask = chunk
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("spd,vd->spv", states, table) + bias
    top = jnp.max(logits, -1)
    weights = jnp.exp(logits - top[..., None])
    total = jnp.sum(weights, -1)
    own = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = jnp.sum(jnp.where(mask, jnp.log(total) + (top - own), 0), 1)
    right = jnp.sum((own >= top) & mask, 1, dtype=jnp.float32)
    if not slopes:
        return (sums[0] + loss, sums[1] + right), None
    probability = weights * jnp.where(mask, 1 / total, 0)[..., None]
    is_target = jnp.where(mask, targets, -1)[..., None] == jnp.arange(len(table))
    slope = jnp.where(is_target, probability - 1, probability).astype(states.dtype)
    by_table = product("spv,spd->svd", slope, states)
    by_states = product("spv,vd->spd", slope, table).astype(states.dtype)
    return (sums[0] + loss, sums[1] + right, sums[2] + by_table), by_states


def _spread(rows: int) -> tuple[tuple[str, ...], int]:
    """The axes of `jax.set_mesh`'s mesh over which rows lie while they are scored, and their devices' number.

    Even devices that share rows elsewhere, because they split the model, take rows of their own here.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    for axes in (AXES, BATCH) if sizes else ():
        shards = math.prod(sizes[axis] for axis in axes)
        if rows % shards == 0:
            return axes, shards
    return (), 1


def _parts(count: int, bytes_each: int, chunk: int | None) -> int:
    """In how many parts `count` items are gone through: `chunk` of them at once, or `CHUNK_BYTES`, at most."""
    return max(1, math.ceil(count / (chunk or max(1, CHUNK_BYTES // bytes_each))))


def _split(x: Array, parts: int, axis: int = 0) -> Array:
    """An axis cut into equal parts, which go to the front, filled up with zeros at its end: [parts, ...]."""
    size = math.ceil(x.shape[axis] / parts)
    padding: list[Any] = [(0, 0)] * x.ndim
    padding[axis] = (0, size * parts - x.shape[axis])
    padded = jnp.pad(x, padding) if padding[axis][1] else x
    return jnp.moveaxis(padded.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :]), axis, 0)
