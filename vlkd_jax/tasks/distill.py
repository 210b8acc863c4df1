"""The distillation: a frozen CLIP teaches a BART to understand images, with three losses on image-caption pairs.

Source: Dai et al. 2022 (arXiv 2203.06386), section 3; README.md lists what is our choice.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vlkd_jax import compression, losses
from vlkd_jax.config import model_directory
from vlkd_jax.data.pipeline import Encoder
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.models.clip import Clip, ClipImageOutput, normalize_pixels
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipResNetConfig
from vlkd_jax.models.layers import l2_normalize
from vlkd_jax.models.vlkd import HIDDEN, NEW, Student, StudentConfig
from vlkd_jax.tasks.denoise import denoise_terms, dropout_rngs, read_texts, restoring_terms
from vlkd_jax.tasks.parents import DTYPES, choose, read_bart, read_clip, remat_policy, text_encoder, with_training_rates
from vlkd_jax.tasks.task import TEACHER, Frozen, Rng, Shardings, Task, Terms
from vlkd_jax.types import (
    Array,
    ArrayLike,
    Batch,
    ConfigDict,
    DTypeLike,
    Float,
    Float32,
    Key,
    Params,
    TeacherOutputs,
    UInt8,
)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What the terms are computed with; all of it is static.

    Attributes:
      image_tokens: which of the teacher's tokens the student reads: see `select_tokens`.
      unit: whether TTDM compares L2-normalised vectors.
      learned_scale: whether ITCL takes the student's own scale instead of the teacher's.
      pull: whether BART's parameters are pulled to their start.
    """

    student: Student
    teacher: Clip
    image_tokens: str
    unit: bool
    learned_scale: bool
    pull: bool


LOSSES = ("ttdm", "itcl", "icti", "denoise", "l2")
"""Of `config.loss`."""


def make_task(config: ConfigDict) -> Task:
    """The student, trained on image-caption pairs. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    clip_config, clip_text = read_clip(config)
    bart_config, bart_text = read_bart(config)
    encode = functools.partial(text_encoder, config, bart_text, bart_config.max_position_embeddings)
    encoder = encode(
        clip_text=clip_text,
        clip_length=clip_config.text.max_position_embeddings,
        preprocessing=clip_config.preprocessing,
    )
    return task_of(config, clip_config, bart_config, encoder, encode(context_length=config.data.context_length))


def task_of(
    config: ConfigDict,
    clip_config: ClipConfig,
    bart_config: BartConfig,
    encoder: Encoder | None = None,
    replay_encoder: Encoder | None = None,
) -> Task:
    """The task of two models' configurations; without encoders nothing can be read, and a plan reads nothing.

    Raises:
      UserError: an option of `config` that there is not, or no loss.
    """
    distillation = _distillation(config, clip_config, bart_config)
    weights = {name: config.loss[name] for name in LOSSES if config.loss[name]}
    if not weights:
        raise UserError("every weight in config.loss is 0; give at least one of them a weight")
    abstract = {"clip": parameter_shapes(clip_config)}
    abstract |= {"start": parameter_shapes(bart_config)} if distillation.pull else {}
    if replay_encoder:
        replay_encoder = dataclasses.replace(replay_encoder, source_length=config.data.replay_length)
    return Task(
        module=distillation.student,
        configs={"clip": clip_config, "bart": bart_config},
        encoder=encoder,
        terms=functools.partial(distill_terms, distillation),
        weights=weights,
        read_params=functools.partial(_read_params, config, distillation.student),
        read_frozen=functools.partial(_read_frozen, config, distillation.pull),
        abstract_frozen=abstract,
        example=distillation.student.example_inputs(),
        teacher=distillation.teacher,
        student=StudentConfig(
            bart_config,
            clip_config,
            distillation.image_tokens,
            whiten=bool(config.student.whiten),
            sentence_position=config.student.sentence_position,
            contrastive_scale=config.student.logit_scale,
            ttdm=config.student.ttdm,
        ),
        denoise_terms=functools.partial(student_denoise_terms, distillation.student),
        replay_encoder=replay_encoder,
        mixes_replay=bool(config.loss.denoise),
        new=NEW,
        fixed=("image_whitening",),
        whiten=config.student.whiten,
    )


def _distillation(config: ConfigDict, clip_config: ClipConfig, bart_config: BartConfig) -> Distillation:
    image_tokens = choose(config, "student.image_tokens", {name: name for name in ("projected", *HIDDEN, "pooled")})
    if image_tokens == "penultimate" and isinstance(clip_config.vision, ClipResNetConfig):
        raise UserError(
            "config.student.image_tokens is 'penultimate', which a residual network does not have; set it to "
            "projected, hidden or pooled"
        )
    position = choose(config, "student.sentence_position", {"eos": "eos", "bos": "bos"})
    dtype = choose(config, "dtype", DTYPES)
    student = Student(
        with_training_rates(bart_config, config),
        clip_config.projection_dim,
        clip_config.vision.hidden_size if image_tokens in HIDDEN else clip_config.projection_dim,
        sentence_position=position,
        whiten=bool(config.student.whiten),
        dtype=dtype,
        remat=remat_policy(config),
    )
    return Distillation(
        student,
        Clip(clip_config, dtype=dtype),
        image_tokens,
        unit=choose(config, "student.ttdm", {"normalised": True, "raw": False}),
        learned_scale=choose(config, "student.logit_scale", {"learned": True, "clip": False}),
        pull=bool(config.loss.l2),
    )


def _read_params(config: ConfigDict, student: Student, shardings: Shardings) -> Params:
    """BART's parameters as given; the linears and the logit scale are drawn from `config.seed`."""

    def draw(key: Key[Array, ""]) -> Params:
        params = student.init(key, *student.example_inputs())["params"]
        return {name: value for name, value in params.items() if name != "bart"}

    drawn = dict(shardings or {})
    bart = load_bart(model_directory(config.bart), drawn.pop("bart", None))[1]
    return {"bart": bart, **jax.jit(draw, out_shardings=drawn or None)(jax.random.key(config.seed))}


def _read_frozen(config: ConfigDict, pull: bool, shardings: Shardings) -> Frozen:
    of_model = shardings or {}
    frozen = {"clip": load_clip(model_directory(config.clip), of_model.get("clip"))[1]}
    return frozen | ({"start": load_bart(model_directory(config.bart), of_model.get("start"))[1]} if pull else {})


def teacher_outputs(teacher: Clip, params: Params, batch: Batch, image_tokens: str) -> TeacherOutputs:
    """What the frozen teacher makes of a batch, without a gradient, under the name `TEACHER` (see task.py)."""
    projected = teacher_projections(teacher, params, batch, image_tokens)
    image, text = l2_normalize(projected.image), l2_normalize(projected.text)
    tokens = image[:, None] if projected.tokens is None else projected.tokens
    return checkpoint_name(jax.lax.stop_gradient(TeacherOutputs(tokens, image, text)), TEACHER)


def teacher_projections(teacher: Clip, params: Params, batch: Batch, image_tokens: str) -> TeacherOutputs:
    """`teacher_outputs` before normalisation, `tokens` None where they are "pooled"; of a batch from a cache, its own.

    These come out of matrix products, with which no compiler fuses what follows: a step that reads them from a cache
    computes with the same bits as one that runs the teacher.
    """
    if batch.teacher is not None:
        tokens, image, text = batch.teacher
        tokens = None if tokens is None else compression.restore(tokens, teacher.dtype)
        return TeacherOutputs(tokens, *(compression.restore(x, jnp.float32) for x in (image, text)))
    params = jax.lax.stop_gradient(params)
    output = encode_pixels(teacher, params, batch.pixels)
    text = teacher.apply({"params": params}, batch.clip_ids, batch.clip_mask, method="project_texts")
    tokens = None if image_tokens == "pooled" else select_tokens(output, image_tokens)
    return TeacherOutputs(tokens, *(_widened(x, teacher.dtype) for x in (output.tokens[:, 0], text)))


def _widened(x: Float[Array, "B E"], dtype: DTypeLike) -> Float32[Array, "B E"]:
    """x in float32, rounded to its `dtype`: compilers leave the rounding out where they see both conversions."""
    wide, info = x.astype(jnp.float32), jnp.finfo(dtype)
    return wide if dtype == jnp.float32 else jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def encode_pixels(teacher: Clip, params: Params, pixels: UInt8[ArrayLike, "B h w 3"]) -> ClipImageOutput:
    """What the teacher's image tower makes of pictures as a batch holds them."""
    normalised = normalize_pixels(pixels, teacher.config.preprocessing)
    return teacher.apply({"params": params}, normalised, method="encode_images")


def select_tokens(output: ClipImageOutput, kind: str) -> Float[Array, "B N W"]:
    """Image tokens of CLIP's output: "projected" [B, N, E], "pooled" [B, 1, E], of `HIDDEN` [B, N, CLIP's width]."""
    if kind in HIDDEN:
        return getattr(output, HIDDEN[kind])
    return output.tokens if kind == "projected" else output.embedding[:, None]


def distill_terms(distillation: Distillation, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`ttdm`, `itcl`, `icti`; with a text-only batch in it `denoise`; with a pull to the start `l2`."""
    teacher = teacher_outputs(distillation.teacher, frozen["clip"], batch, distillation.image_tokens)
    clip_scale = jnp.exp(jax.lax.stop_gradient(frozen["clip"]["logit_scale"]))
    terms = distillation.student.apply(
        {"params": params},
        distillation,
        batch,
        teacher,
        clip_scale,
        rng,
        rngs=dropout_rngs(rng),
        method=_student_terms,
    )
    if distillation.pull:
        gaps = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), params["bart"], frozen["start"])
        terms["l2"] = 0.5 * sum(jax.tree.leaves(gaps)), jnp.float32(1)
    return terms


def _student_terms(
    student: Student,
    distillation: Distillation,
    batch: Batch,
    teacher: TeacherOutputs,
    clip_scale: Float32[Array, ""],
    rng: Rng,
) -> Terms:
    """The terms of a bound student."""
    tokens, image, text = teacher
    texts = [(batch.text_ids, batch.text_mask), (batch.source_ids, batch.source_mask)]
    texts += read_texts(batch.replay) if batch.replay is not None else []
    clean, corrupted, *replayed = student.bart.encode_all(texts, deterministic=rng is None)
    sentence = student.embed_sentence(clean, batch.text_mask)
    near = sentence if distillation.unit else student.embed_sentence(clean, batch.text_mask, unit=False)
    memory, mask = student.memory(student.image_prefix(tokens), corrupted, batch.source_mask)
    hidden = student.decode(batch.text_ids, memory, mask, deterministic=rng is None)
    scale = student.scale() if distillation.learned_scale else clip_scale
    terms = {
        "ttdm": losses.ttdm(near, text),
        "itcl": losses.Pairs(image, sentence, scale),
        "icti": losses.icti(hidden, *student.bart.output_table(), batch.text_ids, batch.target_mask)[0],
    }
    if batch.replay is not None:
        terms["denoise"] = restoring_terms(student.bart, batch.replay, replayed, rng)["denoise"]
    return terms


def student_denoise_terms(student: Student, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`denoise_terms` of the student's BART."""

    def forward(student: Student) -> Terms:
        return denoise_terms(student.bart, batch, rng)

    return student.apply({"params": params}, rngs=dropout_rngs(rng), method=forward)
