"""A distillation without files: models of real sizes with random parameters, drawn where they are used, and batches."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlkd_jax import decoding
from vlkd_jax.data.pipeline import Encoder
from vlkd_jax.decoding import Decoding, Memory
from vlkd_jax.hf.random import bart_config, clip_config
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip, example_inputs, normalize_pixels
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig
from vlkd_jax.models.vlkd import NEW, Student
from vlkd_jax.optim import make_optimizer
from vlkd_jax.step import make_train_step
from vlkd_jax.tasks.distill import Distillation, distill_terms, select_tokens
from vlkd_jax.tasks.task import Frozen, Task
from vlkd_jax.types import Array, Batch, DTypeLike, Params, TrainState

VOCABULARIES = {"tiny": (512, 600), "base": (49408, 50265), "large": (49408, 50265)}
"""Tokens of CLIP and of BART."""
OPTIMIZER = SimpleNamespace(
    lr=1e-5, lr_linears=1e-4, schedule="constant", warmup=1, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01, clip_norm=1.0
)
"""As `config.optim` of configs/base.py; the peer is given the same numbers."""
QUESTION, PREFIX = 16, 5
"""BART tokens of a question at most, and of a decoder prefix."""


class Prompts(NamedTuple):
    """What is to be answered: pictures uint8 [B, height, width, 3], questions [B, S] and decoder prefixes [B, P]."""

    pixels: Any
    source_ids: Any
    source_mask: Any
    prefix_ids: Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of both models and the dtype of activations: what there is to train, to read and to time."""

    clip: ClipConfig
    bart: BartConfig
    dtype: DTypeLike

    @classmethod
    def of(cls, size: str, dtype: DTypeLike) -> Workload:
        """ViT-L/14 and BART-large ("large"), ViT-B/32 and BART-base ("base"), or "tiny" ones; no dropout."""
        clip_tokens, bart_tokens = VOCABULARIES[size]
        clip_text = SimpleNamespace(
            vocab_size=clip_tokens, bos=clip_tokens - 2, eos=clip_tokens - 1, pad=clip_tokens - 1
        )
        bart = bart_config(SimpleNamespace(vocab_size=bart_tokens, bos=0, pad=1, eos=2), size)
        return cls(clip_config(clip_text, size), dataclasses.replace(bart, dropout=0.0), dtype)

    @functools.cached_property
    def student(self) -> Student:
        return Student(self.bart, self.clip.projection_dim, self.clip.projection_dim, dtype=self.dtype)

    @functools.cached_property
    def teacher(self) -> Clip:
        return Clip(self.clip, dtype=self.dtype)

    @functools.cached_property
    def task(self) -> Task:
        """`ttdm`, `itcl` with the student's own scale, and `icti`, each with weight 1."""
        distillation = Distillation(
            self.student, self.teacher, image_tokens="projected", unit=True, learned_scale=True, pull=False
        )
        return Task(
            module=self.student,
            configs={"clip": self.clip, "bart": self.bart},
            encoder=Encoder(),
            terms=functools.partial(distill_terms, distillation),
            weights={"ttdm": 1.0, "itcl": 1.0, "icti": 1.0},
            read_params=lambda: self.draw(0)[0],
            read_frozen=lambda: self.draw(0)[1],
            example=self.student.example_inputs(),
            teacher=self.teacher,
            new=NEW,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(OPTIMIZER, 1000, NEW)

    def draw(self, seed: int) -> tuple[Params, Frozen]:
        """Random parameters of student and teacher, float32, on the default device."""

        def draw(key: Array) -> tuple[Params, Params]:
            params = self.student.init(key, *self.student.example_inputs())["params"]
            return params, self.teacher.init(jax.random.fold_in(key, 1), *example_inputs(self.clip))["params"]

        params, teacher = jax.jit(draw)(jax.random.key(seed))
        return params, {"clip": teacher}

    def state(self, params: Params) -> TrainState:
        """A train state before its first step."""

        def start(params: Params) -> TrainState:
            zero = jnp.int32(0)
            return TrainState(zero, params, self.optimizer.init(params), zero, zero)

        return jax.jit(start)(params)

    def train_step(self) -> Any:
        """(state, frozen, batch) -> (state, metrics), not yet jitted."""
        return make_train_step(self.task, self.optimizer, 0.0, 0)

    def batch(self, rng: np.random.Generator, rows: int, length: int) -> Batch:
        """Random pictures and captions, padded to `length` BART tokens and CLIP's positions; numpy arrays."""
        positions = self.clip.text.max_position_embeddings
        clip_ids, clip_mask = texts(rng, _lengths(rng, rows, positions), positions, self.clip.text)
        text_ids, text_mask = texts(rng, _lengths(rng, rows, length), length, self.bart)
        source_ids, source_mask = texts(rng, _lengths(rng, rows, length), length, self.bart)
        return Batch(
            pixels=self.pixels(rng, rows),
            clip_ids=clip_ids,
            clip_mask=clip_mask,
            text_ids=text_ids,
            text_mask=text_mask,
            target_mask=text_mask,
            source_ids=source_ids,
            source_mask=source_mask,
        )

    def prompts(self, rng: np.random.Generator, rows: int, ask: bool) -> Prompts:
        """Random pictures, questions (empty unless `ask`) and decoder prefixes, all of one length; numpy arrays."""
        lengths = _lengths(rng, rows, QUESTION) if ask else np.full(rows, 2)
        prefix = rng.integers(3, self.bart.vocab_size, (rows, PREFIX), np.int32)
        prefix[:, :2] = self.bart.decoder_start_token_id, self.bart.bos_token_id
        return Prompts(self.pixels(rng, rows), *texts(rng, lengths, QUESTION, self.bart), prefix)

    def pixels(self, rng: np.random.Generator, rows: int) -> np.ndarray:
        """Random pictures, uint8 [rows, height, width, 3]."""
        size = self.clip.vision.image_size
        return rng.integers(0, 256, (rows, size, size, 3), np.uint8)


def _lengths(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """A quarter of `length` to all of it; the first row has all."""
    lengths = rng.integers(max(length // 4, 3), length + 1, rows)
    lengths[0] = length
    return lengths


def texts(
    rng: np.random.Generator, lengths: np.ndarray, width: int, model: ClipTextConfig | BartConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Random ids, int32 [rows, width], between the model's start and end tokens, and their mask."""
    mask = np.arange(width) < lengths[:, None]
    # CLIP's special tokens are its last two, BART's its first three
    ids = np.where(mask, rng.integers(3, model.vocab_size - 2, mask.shape), model.pad_token_id)
    ids[:, 0] = model.bos_token_id
    ids[np.arange(len(ids)), lengths - 1] = model.eos_token_id
    return ids.astype(np.int32), mask


@functools.partial(jax.jit, static_argnums=(0, 1))
def image_memory(student: Student, teacher: Clip, params: Params, clip_params: Params, pixels: Array) -> Memory:
    """What the decoder reads of pictures."""
    normalised = normalize_pixels(pixels, teacher.config.preprocessing)
    output = teacher.apply({"params": clip_params}, normalised, method="encode_images")
    prefix = student.apply({"params": params}, select_tokens(output, "projected"), method="image_prefix")
    bart = Bart(student.config, dtype=student.dtype)
    return decoding.project_memory(bart, params["bart"], prefix, jnp.ones(prefix.shape[:2], bool))


@functools.partial(jax.jit, static_argnums=(0, 4))
def answer(student: Student, params: Params, image: Memory, prompts: Prompts, options: Decoding) -> Array:
    """The best tokens, int32 [B, max_new_tokens]; `</s>` comes only as the last: every row has as many."""
    bart, params = Bart(student.config, dtype=student.dtype), params["bart"]
    options = dataclasses.replace(options, min_new_tokens=options.max_new_tokens - 1)
    hidden = bart.apply({"params": params}, prompts.source_ids, prompts.source_mask, method="encode")
    memory = decoding.join_memories(image, decoding.project_memory(bart, params, hidden, prompts.source_mask))
    prefix_mask = jnp.ones(prompts.prefix_ids.shape, bool)
    decoder, draws = decoding.make_decoder(bart, params, memory), jnp.zeros(len(prompts.prefix_ids), jnp.int32)
    return decoding.decode(decoder, prompts.prefix_ids, prefix_mask, draws, options)[:, 0]
