"""The one set of predict functions: pixels and prompts in, image tokens, embeddings and texts out, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax import decoding
from vlkd_jax.data.text import BartText, ClipText, pad
from vlkd_jax.distill import Objective, select_tokens
from vlkd_jax.errors import UserError
from vlkd_jax.models.bart import Bart, join_memory
from vlkd_jax.types import Array, Params


class Predictor:
    """Runs a student (and its teacher's image tower) on any number of items, in batches of one compiled shape.

    Args:
      objective: a "vlkd" or "bart_denoise" objective; its modules, tokenizers and frozen teacher are used.
      image_tokens: which of the teacher's image tokens the student reads.
      batch_size: rows a call; the last batch is padded and the padding dropped.
    """

    def __init__(self, objective: Objective, image_tokens: str = "projected", batch_size: int = 64):
        self.student, self.teacher = objective.module, objective.teacher
        self._clip = objective.frozen.get("clip")
        self.bart = Bart(objective.configs["bart"], dtype=objective.module.dtype)
        self.text: BartText = objective.encoder.bart_text
        self.clip_text: ClipText | None = objective.encoder.clip_text
        self.clip_length, self.image_size = objective.encoder.clip_length, objective.encoder.image_size
        self.batch_size = batch_size
        self._is_student = self.teacher is not None
        self._encode_images = jax.jit(lambda clip, pixels: self._image_step(clip, pixels, image_tokens))
        self._generate = jax.jit(self._generate_step, static_argnames="max_new_tokens")
        self._embed = jax.jit(self._embed_step)
        self._embed_clip = jax.jit(
            lambda clip, ids, mask: self.teacher.apply({"params": clip}, ids, mask, method="encode_texts")
        )

    @functools.cached_property
    def clip_params(self) -> Params:
        """The teacher's parameters, put on the device once."""
        return jax.device_put(self._clip)

    def _image_step(self, clip: Params, pixels: Array, kind: str) -> tuple[Array, Array]:
        output = self.teacher.apply({"params": clip}, pixels, method="encode_images")
        return select_tokens(output, kind), output.embedding

    def _generate_step(self, params, tokens, context, source, prefix, max_new_tokens: int) -> Array:
        """What the decoder reads: [image prefix or encoded context, if any; encoded source]. Texts are (ids, mask)."""
        bart = params["bart"] if self._is_student else params

        def encode(ids: Array, mask: Array) -> Array:
            return self.bart.apply({"params": bart}, ids, mask, method="encode")

        parts = [(encode(*source), source[1])]
        if tokens is not None:
            image = self.student.apply({"params": params}, tokens, method="image_prefix")
            parts.insert(0, (image, jnp.ones(image.shape[:2], bool)))
        if context is not None:
            parts.insert(0, (encode(*context), context[1]))
        memory, mask = join_memory(*parts)
        return decoding.greedy(self.bart, bart, memory, mask, *prefix, max_new_tokens)

    def _embed_step(self, params: Params, ids: Array, mask: Array) -> Array:
        def read(student):
            return student.embed_sentence(student.encode(ids, mask), mask)

        return self.student.apply({"params": params}, method=read)

    def encode_images(self, pixels: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Image tokens [n, N, E] and L2-normalised image embeddings [n, E] of float32 pixels [height, width, 3]."""
        parts = []
        for rows, count in _chunks(pixels, self.batch_size):
            tokens, embedding = self._encode_images(self.clip_params, np.stack(_fill(rows, self.batch_size)))
            parts.append((np.asarray(tokens)[:count], np.asarray(embedding)[:count]))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def embed_texts(self, params: Params, texts: Sequence[str]) -> np.ndarray:
        """The student's sentence embeddings [n, E], L2-normalised.

        Raises:
          UserError: a text is longer than the model's positions.
        """
        ids, params = [self.text.wrap(self.text.encode(text)) for text in texts], jax.device_put(params)
        return self._over_texts(lambda i, m: self._embed(params, i, m), ids, self.text.pad, self._width(ids))

    def embed_texts_clip(self, texts: Sequence[str]) -> np.ndarray:
        """The teacher's text embeddings [n, E], L2-normalised; texts are cut at CLIP's positions."""
        ids = [self.clip_text.encode(text) for text in texts]
        ids = [i if len(i) <= self.clip_length else [*i[: self.clip_length - 1], i[-1]] for i in ids]
        return self._over_texts(
            lambda i, m: self._embed_clip(self.clip_params, i, m), ids, self.clip_text.pad, self.clip_length
        )

    def _width(self, rows: Sequence[list[int]], step: int = 16) -> int:
        """Room for the longest: a multiple of `step`, so that few shapes are compiled, or all of the positions."""
        longest = max(map(len, rows))
        return max(min(-(-longest // step) * step, self.bart.config.max_position_embeddings), longest)

    def _over_texts(self, function, ids: list[list[int]], pad_id: int, width: int) -> np.ndarray:
        parts = []
        for rows, count in _chunks(ids, self.batch_size):
            parts.append(np.asarray(function(*pad(_fill(rows, self.batch_size), width, pad_id)))[:count])
        return np.concatenate(parts)

    def generate(
        self,
        params: Params,
        sources: Sequence[list[int]],
        prefixes: Sequence[list[int]],
        max_new_tokens: int,
        image_tokens: np.ndarray | None = None,
        image_of: Sequence[int] | None = None,
        contexts: Sequence[list[int]] | None = None,
    ) -> list[str]:
        """Greedy continuations, one text a row.

        Args:
          params: the student's (or BART's) parameters.
          sources: what the encoder reads, ids without `<s>` and `</s>`.
          prefixes: ids the decoder is forced through first (`<s>` is put before them).
          image_tokens: [images, N, E] from `encode_images`; None: no image (text only, or the blind baseline).
          image_of: which image each row is about; default: row k is about image k.

        Raises:
          UserError: a source or a prefix with its continuation is longer than the model's positions.
        """
        config, params = self.bart.config, jax.device_put(params)  # once, not with each batch
        first = [config.decoder_start_token_id, self.text.bos]  # as training starts, whatever a directory forces
        prefixes, sources = [first + list(p) for p in prefixes], [self.text.wrap(s) for s in sources]
        limit = config.max_position_embeddings
        contexts = [self.text.wrap(c) for c in contexts] if contexts is not None else [[]] * len(sources)
        widths = tuple(self._width(rows) for rows in (sources, prefixes, contexts))
        for rows, room in ((sources, limit), (prefixes, limit - max_new_tokens), (contexts, limit)):
            if max(map(len, rows)) > room:
                raise UserError(f"a prompt has {max(map(len, rows))} BART tokens, there is room for {room}; shorten it")
        image_of = range(len(sources)) if image_of is None else image_of
        texts: list[str] = []
        for rows, count in _chunks(zip(sources, prefixes, contexts, image_of, strict=True), self.batch_size):
            rows = _fill(rows, self.batch_size)
            tokens = None if image_tokens is None else image_tokens[[row[3] for row in rows]]
            source = pad([row[0] for row in rows], widths[0], self.text.pad)
            prefix = pad([row[1] for row in rows], widths[1], self.text.pad)
            context = pad([row[2] for row in rows], widths[2], self.text.pad) if widths[2] else None
            ids = self._generate(params, tokens, context, source, prefix, max_new_tokens=max_new_tokens)
            texts += [self.text.decode(row[row != self.text.pad]) for row in np.asarray(ids)[:count]]
        return texts


def _fill(rows: list, size: int) -> list:
    return rows + [rows[0]] * (size - len(rows))


def _chunks(items: Iterable, size: int) -> Iterable[tuple[list, int]]:
    rows: list = []
    for item in items:
        rows.append(item)
        if len(rows) == size:
            yield rows, size
            rows = []
    if rows:
        yield rows, len(rows)
