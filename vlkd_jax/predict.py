"""The one set of predict functions over a `VLKD`: pictures and prompts in, texts and embeddings out, as streams.

Batches have one compiled shape; nothing of a whole split is held. What a picture's questions share, its tokens and the
decoder's keys and values of them, is computed once for all of its questions in a batch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vlkd_jax import sharding
from vlkd_jax.data.images import resize_and_crop
from vlkd_jax.data.text import pad
from vlkd_jax.decoding import (
    Candidates,
    Decoder,
    Decoding,
    Memory,
    decode,
    join_memories,
    likelihood,
    make_decoder,
    pack,
    project_memory,
    take_rows,
)
from vlkd_jax.decoding import rank as rank_texts
from vlkd_jax.errors import UserError
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.classifier import Classifier
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.vlkd import Student
from vlkd_jax.tasks.classify import encode_pair
from vlkd_jax.tasks.distill import encode_pixels, select_tokens
from vlkd_jax.types import Array, Params

if TYPE_CHECKING:
    from vlkd_jax.vlkd import VLKD

BATCH_SIZE = 64
"""Rows of a batch where nothing else is said."""
WIDTH_STEP = 16
"""Room for texts is a multiple of this, so that few shapes are compiled."""
RANKED_TOKENS = 1024
"""Tokens of a batch's candidates that are scored at once."""
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to generate.

    Attributes:
      source: what the encoder reads, ids without `<s>` and `</s>`.
      prefix: ids the decoder is forced through first (`<s>` is put before them).
      image: what the decoder reads beside it, or None; requests in a row that hold the same object share it.
      context: ids of a text that stands in the memory where an image would, or empty.
      draw: what the text depends on beside the seed where it is drawn at random, below 2**31.
    """

    source: list[int]
    prefix: list[int]
    image: Image.Image | np.ndarray | None = None
    context: list[int] = dataclasses.field(default_factory=list)
    draw: int = 0


class Scored(NamedTuple):
    """A text and its score: a log-likelihood, or a cosine where one is said."""

    text: str
    score: float


def generate(
    model: VLKD, requests: Iterable[Request], decoding: Decoding, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[str, ...]]:
    """Continuations, `decoding.returns` for each request, as the batches are done; either all have an image or none.

    Requests are read ahead, in a thread, while the devices work.

    Raises:
      UserError: a source, a context, or a prefix with its continuation is longer than the model's positions.
    """
    text = model.bart_text
    for texts in generate_ids(model, requests, decoding, batch_size):
        yield tuple(text.decode(row[row != text.pad]) for row in texts)


def generate_ids(
    model: VLKD, requests: Iterable[Request], decoding: Decoding, batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """The token ids of `generate`'s texts, padded on the right [returns, max_new_tokens]. Raises UserError likewise."""
    for ids, _ in _generated(model, requests, decoding, batch_size, scored=False):
        yield ids


def generate_scored(
    model: VLKD, requests: Iterable[Request], decoding: Decoding, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[Scored, ...]]:
    """The texts of `generate`, each with its log-likelihood as `rank` counts it. Raises UserError likewise."""
    text = model.bart_text
    for ids, scores in _generated(model, requests, decoding, batch_size, scored=True):
        texts = (text.decode(row[row != text.pad]) for row in ids)
        yield tuple(Scored(said, float(score)) for said, score in zip(texts, scores, strict=True))


def _generated(
    model: VLKD, requests: Iterable[Request], decoding: Decoding, batch_size: int, scored: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(ids, log-likelihoods or None) of each request's texts."""
    options = {"vocab_size": model.bart_text.vocab_size, "options": decoding, "scored": scored}
    for rows, images, texts in _batches(model, requests, decoding.max_new_tokens, batch_size):
        inputs = _image_memory(model, images), *texts
        ids, scores = _on_mesh(model, _generate, (model.bart, model.bart_params), inputs, **options)
        scores = np.asarray(scores) if scored else [None] * len(rows)
        yield from zip(np.asarray(ids)[: len(rows)], scores[: len(rows)], strict=True)


def rank(
    model: VLKD, requests: Iterable[Request], candidates: Sequence[str], batch_size: int = BATCH_SIZE
) -> Iterator[tuple[str, float]]:
    """The likeliest candidate for each request, and its log-likelihood (the sum over its tokens and `</s>`).

    Raises:
      UserError: as `generate`; no candidates, or an empty one.
    """
    for scores in candidate_scores(model, requests, candidates, batch_size):
        yield candidates[scores.argmax()], float(scores.max())


def candidate_scores(
    model: VLKD, requests: Iterable[Request], candidates: Sequence[str], batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """The log-likelihood of every candidate for each request [C], in their order. Raises UserError as `rank`."""
    text = model.bart_text
    ids = [text.encode(f" {candidate.strip()}") for candidate in candidates if candidate.strip()]
    if not ids or len(ids) < len(candidates):
        raise UserError(f"{len(candidates) - len(ids)} of {len(candidates)} answers to choose from are empty")
    packed = pack(ids, text.eos, max(WIDTH_STEP, RANKED_TOKENS // batch_size))
    longest = max(map(len, ids))
    for rows, images, texts in _batches(model, requests, longest, batch_size):
        models, inputs = (model.bart, model.bart_params, packed), (_image_memory(model, images), *texts)
        scores = _on_mesh(model, _rank, models, inputs, vocab_size=text.vocab_size)
        yield from np.asarray(scores)[: len(rows)]


def _batches(model: VLKD, requests: Iterable[Request], new_tokens: int, batch_size: int):
    """(requests of a batch, their images, their texts), prepared in a thread."""

    def prepare(rows: list[Request]):
        images = None if rows[0].image is None else _different_images(model, rows, batch_size)
        return rows, images, _texts(model, rows, new_tokens, batch_size)

    return _ahead(map(prepare, _chunks(requests, batch_size)))


def _ahead(items: Iterator[Item], count: int = 2) -> Iterator[Item]:
    """Items of which `count` are made in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        waiting = collections.deque(thread.submit(next, items, None) for _ in range(count))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def _texts(model: VLKD, rows: list[Request], max_new_tokens: int, batch_size: int):
    """(source, context or None, prefix, draws) with room for `batch_size` rows, the first three (ids, mask)."""
    filled = _fill(rows, batch_size)
    lists = _lists(model, filled, max_new_tokens)
    padded = (None if ids is None else pad(ids, _width(ids, room), model.bart_text.pad) for ids, room in lists)
    return *padded, np.array([row.draw for row in filled], np.int32)


def _lists(model: VLKD, rows: list[Request], max_new_tokens: int) -> tuple[tuple[list[list[int]] | None, int], ...]:
    """(ids of each row, how many there is room for) of sources, contexts if any, and prefixes."""
    text, limit = model.bart_text, model.bart.config.max_position_embeddings
    first = [model.bart.config.decoder_start_token_id, text.bos]  # as training starts, whatever a directory forces
    return (
        ([text.wrap(row.source) for row in rows], limit),
        ([text.wrap(row.context) for row in rows], limit) if rows[0].context else (None, limit),
        ([first + row.prefix for row in rows], limit - max_new_tokens),
    )


def check_request(model: VLKD, request: Request, max_new_tokens: int) -> None:
    """Raises UserError when one of its texts is longer than the model's positions."""
    for ids, room in _lists(model, [request], max_new_tokens):
        if ids is not None:
            _width(ids, room)


def _width(rows: Sequence[list[int]], room: int) -> int:
    """Room for the longest, a multiple of `WIDTH_STEP` where there is as much. Raises UserError when there is not."""
    longest = max(map(len, rows))
    if longest > room:
        raise UserError(f"a prompt has {longest} BART tokens, there is room for {room}; shorten it")
    return min(-(-longest // WIDTH_STEP) * WIDTH_STEP, room)


def _different_images(model: VLKD, rows: list[Request], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of the different images, and which of them each row reads [batch_size]."""
    number: dict[int, int] = {}
    image_of = [number.setdefault(id(row.image), len(number)) for row in rows]
    images = {image: row.image for image, row in zip(image_of, rows, strict=True)}
    room = 1 << (len(images) - 1).bit_length()  # powers of two: few shapes are compiled
    pixels = _pixels(model, images.values(), min(max(room, sharding.row_shards(model.mesh)), batch_size))
    return pixels, np.array(image_of + [0] * (batch_size - len(rows)))


def _image_memory(model: VLKD, images: tuple[np.ndarray, np.ndarray] | None) -> tuple[Memory, np.ndarray] | None:
    """The memories of the different images, and which of them each row reads."""
    if images is None:
        return None
    pixels, image_of = images
    models = model.student, model.teacher, model.config.image_tokens, model.params, model.clip_params
    return _on_mesh(model, _project_images, models, (pixels,)), image_of


def _pixels(model: VLKD, images: Iterable[Image.Image | np.ndarray], room: int) -> np.ndarray:
    rows = [resize_and_crop(image, model.teacher.config.preprocessing) for image in images]
    return np.stack(_fill(rows, room))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _project_images(
    student: Student, teacher: Clip, image_tokens: str, params: Params, clip_params: Params, pixels: Array
) -> Memory:
    tokens = select_tokens(encode_pixels(teacher, clip_params, pixels), image_tokens)
    prefix = student.apply({"params": params}, tokens, method="image_prefix")
    bart = Bart(student.config, dtype=student.dtype)
    return project_memory(bart, params["bart"], prefix, jnp.ones(prefix.shape[:2], bool))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("vocab_size", "options", "scored"))
def _generate(
    bart: Bart, params: Params, image, source, context, prefix, draws, vocab_size: int, options: Decoding, scored: bool
) -> tuple[Array, Array | None]:
    """Ids below `vocab_size` [B, returns, max_new_tokens], and where they are asked for their log-likelihoods."""
    decoder = _decoder(bart, params, image, source, context, vocab_size)
    ids = decode(decoder, *prefix, draws, options)
    scores = likelihood(decoder, *prefix, ids) if scored else None
    return jax.tree.map(sharding.constrain, (ids, scores))  # whole on every process


@functools.partial(jax.jit, static_argnums=0, static_argnames="vocab_size")
def _rank(
    bart: Bart, params: Params, candidates: Candidates, image, source, context, prefix, draws, vocab_size: int
) -> Array:
    """Log-likelihoods [B, C]."""
    decoder = _decoder(bart, params, image, source, context, vocab_size)
    return sharding.constrain(rank_texts(decoder, *prefix, candidates))


def _decoder(bart: Bart, params: Params, image, source, context, vocab_size: int) -> Decoder:
    """The decoder reads [image or encoded context, if any; encoded source]."""
    bias = params["final_logits_bias"]  # where every way of decoding meets the embedding rows that no token has
    params = params | {"final_logits_bias": jnp.where(jnp.arange(bias.shape[-1]) < vocab_size, bias, -jnp.inf)}
    memories = [] if image is None else [take_rows(*image)]
    for ids, mask in [text for text in (context, source) if text is not None]:
        hidden = bart.apply({"params": params}, ids, mask, method="encode")
        memories.append(project_memory(bart, params, hidden, mask))
    return make_decoder(bart, params, join_memories(*memories))


def attention(model: VLKD, request: Request, answer: list[int]) -> np.ndarray:
    """How much each token of a continuation, `</s>` included, read of each image token when it was chosen.

    Args:
      answer: ids without `</s>`.

    Returns:
      float32 [tokens of `answer` and one, N], the mean of the cross-attention's weights over layers and heads. A row
      adds up to what was read of the image; the rest was read of the text.

    Raises:
      UserError: a text that is too long.
    """
    text = model.bart_text
    target = [text.bos, *request.prefix, *answer, text.eos]
    room = model.bart.config.max_position_embeddings
    source, target = (pad([ids], _width([ids], room), text.pad) for ids in (text.wrap(request.source), target))
    pixels = _pixels(model, [request.image], sharding.row_shards(model.mesh))[:1]
    models = model.student, model.teacher, model.config.image_tokens, model.params, model.clip_params
    weights = np.asarray(_on_mesh(model, _attention, models, (pixels, *source, target[0])))
    first = 1 + len(request.prefix)
    return weights[first : first + len(answer) + 1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention(
    student: Student,
    teacher: Clip,
    image_tokens: str,
    params: Params,
    clip_params: Params,
    pixels: Array,
    source: Array,
    mask: Array,
    target: Array,
) -> Array:
    """Mean weights [T, N] of one row."""
    tokens = select_tokens(encode_pixels(teacher, clip_params, pixels), image_tokens)

    def read(student: Student) -> Array:
        memory = student.memory(student.image_prefix(tokens), student.encode(source, mask), mask)
        return student.decode(target, *memory)

    _, kept = student.apply({"params": params}, method=read, mutable=["intermediates"])
    (weights,) = kept["intermediates"]["bart"]["decoder"]["layers"]["encoder_attn"]["weights"]  # [layers, 1, H, T, M]
    return sharding.constrain(jnp.mean(weights[:, 0].astype(jnp.float32), (0, 1))[:, : tokens.shape[1]])


def embed_images(model: VLKD, images: Iterable[Image.Image | np.ndarray], batch_size: int = BATCH_SIZE) -> np.ndarray:
    """The teacher's image embeddings [n, E], L2-normalised; n at least 1."""
    return np.concatenate(list(image_embeddings(model, images, batch_size)))


def image_embeddings(
    model: VLKD, images: Iterable[Image.Image | np.ndarray], batch_size: int = BATCH_SIZE
) -> Iterator[np.ndarray]:
    """The teacher's image embeddings [rows of a batch, E], L2-normalised, as they are done; images are read ahead."""

    def prepare(rows: list[Image.Image | np.ndarray]) -> tuple[int, np.ndarray]:
        return len(rows), _pixels(model, rows, batch_size)

    for count, pixels in _ahead(map(prepare, _chunks(images, batch_size))):
        yield np.asarray(_on_mesh(model, _embed_images, (model.teacher, model.clip_params), (pixels,)))[:count]


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(teacher: Clip, params: Params, pixels: Array) -> Array:
    return sharding.constrain(encode_pixels(teacher, params, pixels).embedding)


def embed_texts(model: VLKD, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> np.ndarray:
    """The student's sentence embeddings [n, E], L2-normalised.

    Raises:
      UserError: a text is longer than the model's positions.
    """
    text = model.bart_text
    ids = [text.wrap(text.encode(caption)) for caption in texts]
    width = _width(ids, model.bart.config.max_position_embeddings)

    def embed(rows: list[list[int]]) -> Array:
        padded = pad(_fill(rows, batch_size), width, text.pad)
        return _on_mesh(model, _embed_texts, (model.student, model.params), padded)

    return _over_batches(embed, ids, batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(student: Student, params: Params, ids: Array, mask: Array) -> Array:
    def read(student: Student) -> Array:
        return student.embed_sentence(student.encode(ids, mask), mask)

    return sharding.constrain(student.apply({"params": params}, method=read))


def classify(model: VLKD, pairs: Iterable[tuple[str, str]], batch_size: int = BATCH_SIZE) -> Iterator[np.ndarray]:
    """What a classifier gives for texts, or pairs of them (the second ""): float32 logits of the classes, or a score.

    What is longer than the model has positions is cut, of a pair the longer text.
    """
    text, room = model.bart_text, model.bart.config.max_position_embeddings
    for rows in _chunks(pairs, batch_size):
        ids = [encode_pair(text, *pair, room) for pair in rows]
        padded = pad(_fill(ids, batch_size), _width(ids, room), text.pad)
        outputs = _on_mesh(model, _classify, (model.classifier, model.params), padded)
        yield from np.asarray(outputs)[: len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _classify(classifier: Classifier, params: Params, ids: Array, mask: Array) -> Array:
    return sharding.constrain(classifier.apply({"params": params}, ids, mask))


def embed_texts_clip(model: VLKD, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> np.ndarray:
    """The teacher's text embeddings [n, E], L2-normalised; texts are cut at CLIP's positions."""
    text, width = model.clip_text, model.teacher.config.text.max_position_embeddings
    ids = [text.encode(caption) for caption in texts]
    ids = [row if len(row) <= width else [*row[: width - 1], row[-1]] for row in ids]

    def embed(rows: list[list[int]]) -> Array:
        padded = pad(_fill(rows, batch_size), width, text.pad)
        return _on_mesh(model, _embed_texts_clip, (model.teacher, model.clip_params), padded)

    return _over_batches(embed, ids, batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts_clip(teacher: Clip, params: Params, ids: Array, mask: Array) -> Array:
    return sharding.constrain(teacher.apply({"params": params}, ids, mask, method="encode_texts"))


def _on_mesh(model: VLKD, function: Callable, models: tuple, inputs, **options):
    """`function(*models, *inputs)` on the model's devices, over which rows of the inputs (numpy) are spread."""

    def put(rows):
        return sharding.put_rows(model.mesh, rows) if isinstance(rows, np.ndarray) else rows

    with jax.set_mesh(model.mesh):
        return function(*models, *jax.tree.map(put, inputs), **options)


def _over_batches(function: Callable[[list[Item]], Array], items: Iterable[Item], batch_size: int) -> np.ndarray:
    return np.concatenate([np.asarray(function(rows))[: len(rows)] for rows in _chunks(items, batch_size)])


def _fill(rows: list[Item], size: int) -> list[Item]:
    return rows + rows[:1] * (size - len(rows))


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while rows := list(itertools.islice(items, size)):
        yield rows
