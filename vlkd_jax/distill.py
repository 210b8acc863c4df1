"""What is trained and on which losses: the three objectives, the frozen teacher, and the one train step they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vlkd_jax import losses
from vlkd_jax.config import model_directory
from vlkd_jax.data.pipeline import Corruption, Encoder
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.models.bart import Bart, join_memory, shift_right
from vlkd_jax.models.clip import LEGACY_EOS_TOKEN_ID, Clip
from vlkd_jax.models.configs import BartConfig, ClipTextConfig
from vlkd_jax.models.vlkd import Student
from vlkd_jax.optim import cap_logit_scale
from vlkd_jax.types import Array, Batch, Params, TrainState

Terms = dict[str, tuple[Array, Array]]
"""Loss name -> (sum, count)."""
HIDDEN = {"hidden": "last_hidden_state", "penultimate": "penultimate"}
"""`student.image_tokens` that are states of CLIP's vision tower -> their name in `ClipImageOutput`."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A model to train and what it is trained on.

    Attributes:
      params: what the optimizer changes, at its start.
      frozen: what the losses read beside it and nothing changes: {"clip": the teacher}, {"start": BART's start}.
      terms: (params, frozen, batch, rng) -> loss terms; rng None: no dropout.
      text_terms: the same for a text-only batch (None for CLIP).
      weights: of the terms in the total; a term without a weight is only reported.
      encoder: what a batch holds.
      module: the Flax module of `params`; teacher: the CLIP module of `frozen["clip"]`.
      configs: model configurations by name, as they were read.
    """

    params: Params
    frozen: dict[str, Params]
    terms: Callable[[Params, dict[str, Params], Batch, Array | None], Terms]
    weights: dict[str, float]
    encoder: Encoder
    module: Any
    configs: dict[str, Any]
    text_terms: Callable[[Params, dict[str, Params], Batch, Array | None], Terms] | None = None
    teacher: Clip | None = None
    replay_encoder: Encoder | None = None


def make_objective(config: ConfigDict) -> Objective:
    """Reads the models that a config names and joins them with its losses.

    Raises:
      UserError: an unknown objective or option, a directory that cannot be read, sizes that do not fit together.
    """
    makers = {"vlkd": _vlkd, "clip_contrastive": _clip_contrastive, "bart_denoise": _bart_denoise}
    return _choose(config, "objective", makers)(config)


def _choose(config: ConfigDict, field: str, options: dict[str, Any]) -> Any:
    value = config
    for part in field.split("."):
        value = value[part]
    if value not in options:
        raise UserError(f"config.{field} is {value!r}; it is one of {', '.join(options)}")
    return options[value]


def read_clip(config: ConfigDict):
    """(ClipConfig, parameters, tokenizer) of `config.clip`. Raises UserError, also when tokenizer and model differ."""
    _require(config, "clip")
    directory = model_directory(config.clip)
    clip_config, params = load_clip(directory)
    text = ClipText(directory)
    _check_vocabulary(config.clip, text.vocab_size, clip_config.text.vocab_size)
    _check_clip_end(config.clip, text, clip_config.text)
    return clip_config, params, text


def read_bart(config: ConfigDict):
    """(BartConfig, parameters, tokenizer) of `config.bart`. Raises UserError, also when tokenizer and model differ."""
    _require(config, "bart")
    directory = model_directory(config.bart)
    bart_config, params = load_bart(directory)
    text = BartText(directory)
    _check_vocabulary(config.bart, text.vocab_size, bart_config.vocab_size)
    _check_bart_ids(config.bart, text, bart_config)
    return bart_config, params, text


def _training_rates(bart_config: BartConfig, config: ConfigDict) -> BartConfig:
    """For the module that trains; what is saved keeps the rates of the directory it came from."""
    return dataclasses.replace(bart_config, dropout=config.dropout, attention_dropout=0.0, activation_dropout=0.0)


def _require(config: ConfigDict, field: str) -> None:
    if not config[field]:
        raise UserError(f"config.{field} is empty; set it to a Hugging Face directory: --config.{field}=DIR")


def _check_vocabulary(directory: str, tokens: int, rows: int) -> None:
    if tokens != rows:
        raise UserError(
            f"{directory}: the tokenizer has {tokens} tokens and config.json's vocab_size is {rows}; "
            "put the tokenizer that belongs to this model there"
        )


def _check_clip_end(directory: str, text: ClipText, config: ClipTextConfig) -> None:
    """A sentence is pooled at its end token: where the model looks for another one, it would pool the first token."""
    if config.eos_token_id == LEGACY_EOS_TOKEN_ID:
        if text.eos != config.vocab_size - 1:
            raise UserError(
                f"{directory}: config.json's text_config.eos_token_id is {LEGACY_EOS_TOKEN_ID}, which pools at the "
                f"largest id, and the tokenizer's end token {text.eos} is not the largest ({config.vocab_size - 1}); "
                f"set text_config.eos_token_id to {text.eos}"
            )
    elif text.eos != config.eos_token_id:
        raise UserError(
            f"{directory}: the tokenizer's end token is {text.eos} and config.json's text_config.eos_token_id is "
            f"{config.eos_token_id}; put the tokenizer that belongs to this model there, or correct config.json"
        )


def _check_bart_ids(directory: str, text: BartText, config: BartConfig) -> None:
    """Every special id of config.json is the tokenizer's; the mask is in no config.json, the tokenizer alone has it."""
    names = {text.bos: "<s>", text.pad: "<pad>", text.eos: "</s>"}
    allowed = {
        "bos_token_id": (text.bos,),
        "pad_token_id": (text.pad,),
        "eos_token_id": (text.eos,),
        "decoder_start_token_id": (text.eos, text.bos),
        "forced_bos_token_id": (text.bos, None),
        "forced_eos_token_id": (text.eos, None),
    }
    wrong = [
        f"{field} is {getattr(config, field)}, the tokenizer's {names[ids[0]]} is {ids[0]}"
        for field, ids in allowed.items()
        if getattr(config, field) not in ids
    ]
    if wrong:
        raise UserError(
            f"{directory}: config.json (or generation_config.json) and the tokenizer differ: {'; '.join(wrong)}; "
            "put the tokenizer that belongs to this model there, or correct the file"
        )


def _text_encoder(config: ConfigDict, text: BartText, positions: int, **more) -> Encoder:
    data = config.data
    for field in ("text_length", "source_length", "context_length", "replay_length"):
        if data[field] > positions:
            raise UserError(
                f"config.data.{field} is {data[field]}; the BART in {config.bart} has {positions} positions"
            )
    return Encoder(
        bart_text=text,
        text_length=data.text_length,
        source_length=data.source_length,
        corruption=Corruption(**config.corruption.to_dict()),
        truncate=data.truncate,
        **more,
    )


def teacher_outputs(teacher: Clip, params: Params, batch: Batch, image_tokens: str) -> tuple[Array, Array, Array]:
    """The frozen teacher's (image tokens [B, N, E], image embedding [B, E], text embedding [B, E]); no gradient."""
    params = jax.lax.stop_gradient(params)
    output = teacher.apply({"params": params}, batch.pixels, method="encode_images")
    text = teacher.apply({"params": params}, batch.clip_ids, batch.clip_mask, method="encode_texts")
    return jax.lax.stop_gradient((select_tokens(output, image_tokens), output.embedding, text))


def select_tokens(output, kind: str) -> Array:
    """Image tokens of a `ClipImageOutput`: "projected" [B, N, E], "pooled" [B, 1, E], of `HIDDEN` [B, N, Dv]."""
    if kind in HIDDEN:
        return getattr(output, HIDDEN[kind])
    return output.tokens if kind == "projected" else output.embedding[:, None]


def _vlkd(config: ConfigDict) -> Objective:
    clip_config, clip_params, clip_text = read_clip(config)
    bart_config, bart_params, bart_text = read_bart(config)
    student_options, weights = config.student, config.loss
    image_tokens = student_options.image_tokens
    _choose(config, "student.image_tokens", dict.fromkeys(("projected", *HIDDEN, "pooled")))
    _choose(config, "student.sentence_position", dict.fromkeys(("eos", "bos")))
    learned_scale = _choose(config, "student.logit_scale", {"learned": True, "clip": False})
    unit = _choose(config, "student.ttdm", {"normalised": True, "raw": False})
    dtype = _choose(config, "dtype", {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
    teacher = Clip(clip_config, dtype=dtype)
    student = Student(
        _training_rates(bart_config, config),
        clip_config.projection_dim,
        student_options.sentence_position,
        whiten=bool(student_options.whiten),
        dtype=dtype,
        remat=config.remat,
    )
    width = clip_config.vision.hidden_size if image_tokens in HIDDEN else clip_config.projection_dim
    params = init_student(student, bart_params, width, config.seed)
    frozen = {"clip": clip_params} | ({"start": bart_params} if weights.l2 else {})

    def terms(params: Params, frozen: dict[str, Params], batch: Batch, rng: Array | None) -> Terms:
        tokens, image, text = teacher_outputs(teacher, frozen["clip"], batch, image_tokens)
        clip_scale = jnp.exp(jax.lax.stop_gradient(frozen["clip"]["logit_scale"]))

        def forward(student: Student) -> Terms:
            clean = student.encode(batch.text_ids, batch.text_mask, deterministic=rng is None)
            sentence = student.embed_sentence(clean, batch.text_mask)
            near = sentence if unit else student.embed_sentence(clean, batch.text_mask, unit=False)
            corrupted = student.encode(batch.source_ids, batch.source_mask, deterministic=rng is None)
            memory, mask = student.memory(student.image_prefix(tokens), corrupted, batch.source_mask)
            logits = student.decode_logits(batch.text_ids, memory, mask, deterministic=rng is None)
            terms_by_name = {
                "ttdm": losses.ttdm(near, text),
                "itcl": losses.itcl(image, sentence, student.scale() if learned_scale else clip_scale),
                "icti": losses.icti(logits, batch.text_ids, batch.target_mask),
            }
            if batch.replay is not None:
                terms_by_name["text"] = _denoise(student.bart, batch.replay, rng)["text"]
            return terms_by_name

        terms_by_name = student.apply({"params": params}, rngs=_rngs(rng), method=forward)
        if weights.l2:
            gaps = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), params["bart"], frozen["start"])
            terms_by_name["l2"] = 0.5 * sum(jax.tree.leaves(gaps)), jnp.float32(1)
        return terms_by_name

    def text_terms(params: Params, frozen: dict[str, Params], batch: Batch, rng: Array | None) -> Terms:
        return student.apply({"params": params}, batch, rng, rngs=_rngs(rng), method=lambda s, *a: _denoise(s.bart, *a))

    more = {
        "clip_text": clip_text,
        "clip_length": clip_config.text.max_position_embeddings,
        "image_size": clip_config.vision.image_size,
    }
    positions = bart_config.max_position_embeddings
    return Objective(
        params,
        frozen,
        terms,
        {k: v for k, v in weights.to_dict().items() if v},
        _text_encoder(config, bart_text, positions, **more),
        student,
        {"clip": clip_config, "bart": bart_config},
        text_terms,
        teacher,
        dataclasses.replace(
            _text_encoder(config, bart_text, positions, context_length=config.data.context_length),
            source_length=config.data.replay_length,
        ),
    )


def init_student(student: Student, bart_params: Params, token_width: int, seed: int) -> Params:
    """The student's parameters at its start: BART's as given, the linears and the logit scale drawn from `seed`."""
    ids = jnp.zeros((1, 2), jnp.int32)

    def draw(key: Array) -> Params:
        params = student.init(key, jnp.zeros((1, 1, token_width)), ids, ids == 0, ids)["params"]
        return {name: value for name, value in params.items() if name != "bart"}

    return {"bart": bart_params, **jax.jit(draw)(jax.random.key(seed))}


def _rngs(rng: Array | None) -> dict[str, Array] | None:
    return None if rng is None else {"dropout": rng}


def _denoise(bart: Bart, batch: Batch, rng: Array | None) -> Terms:
    """Text-only infilling with BART: the context, where there is one, stands in the memory where an image would."""
    deterministic = rng is None
    memory, mask = bart.encode(batch.source_ids, batch.source_mask, deterministic=deterministic), batch.source_mask
    if batch.context_ids is not None:
        context = bart.encode(batch.context_ids, batch.context_mask, deterministic=deterministic)
        memory, mask = join_memory((context, batch.context_mask), (memory, mask))
    inputs = shift_right(batch.text_ids, bart.config.decoder_start_token_id)
    logits = bart.logits(bart.decode(inputs, memory, mask, deterministic=deterministic))
    return {
        "text": losses.icti(logits, batch.text_ids, batch.target_mask),
        "token_accuracy": losses.token_accuracy(logits, batch.text_ids, batch.target_mask),
    }


def _bart_denoise(config: ConfigDict) -> Objective:
    bart_config, params, text = read_bart(config)
    dtype = _choose(config, "dtype", {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
    bart = Bart(_training_rates(bart_config, config), dtype=dtype, remat=config.remat)

    def terms(params: Params, frozen: dict[str, Params], batch: Batch, rng: Array | None) -> Terms:
        return bart.apply({"params": params}, batch, rng, rngs=_rngs(rng), method=_denoise)

    encoder = _text_encoder(
        config, text, bart_config.max_position_embeddings, context_length=config.data.context_length
    )
    return Objective(params, {}, terms, {"text": 1.0}, encoder, bart, {"bart": bart_config}, terms, None, encoder)


def _clip_contrastive(config: ConfigDict) -> Objective:
    clip_config, params, text = read_clip(config)
    dtype = _choose(config, "dtype", {"float32": jnp.float32, "bfloat16": jnp.bfloat16})
    clip = Clip(clip_config, dtype=dtype, remat=config.remat)

    def terms(params: Params, frozen: dict[str, Params], batch: Batch, rng: Array | None) -> Terms:
        image, sentence, scale = clip.apply({"params": params}, batch.pixels, batch.clip_ids, batch.clip_mask)
        right = jnp.argmax(image @ sentence.T, 1) == jnp.arange(image.shape[0])
        accuracy = jnp.sum(right, dtype=jnp.float32), jnp.float32(image.shape[0])
        return {"itcl": losses.itcl(image, sentence, scale), "accuracy": accuracy}

    encoder = Encoder(text, clip_config.text.max_position_embeddings, image_size=clip_config.vision.image_size)
    return Objective(params, {}, terms, {"itcl": 1.0}, encoder, clip, {"clip": clip_config})


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, dropout: float, seed: int):
    """The step function (state, frozen, batch) -> (state, metrics); jit it with the state donated.

    An update whose loss or gradient is not finite is not applied: parameters and optimizer state stay as they were,
    bit for bit, and it is counted in `skipped`. `metrics` holds each term's mean, `loss`, `grad_norm`, and `updates`:
    how many the optimizer had applied before, which is where its schedule stands.
    """

    def loss(params: Params, frozen, batch: Batch, rng: Array | None) -> tuple[Array, Terms]:
        terms = objective.terms(params, frozen, batch, rng)
        means = {name: total / jnp.maximum(count, 1) for name, (total, count) in terms.items()}
        return sum(weight * means[name] for name, weight in objective.weights.items()), means

    def step(state: TrainState, frozen, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        (total, means), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, batch, rng)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cap_logit_scale(optax.apply_updates(state.params, updates))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = jnp.where(good, 0, 1).astype(jnp.int32)
        new = TrainState(state.step + 1, params, opt_state, state.skipped + bad, (state.skipped_in_row + bad) * bad)
        told = {"updates": state.step - state.skipped, "skipped_in_row": new.skipped_in_row}
        return new, {"loss": total, **means, "grad_norm": norm, **told}

    return step
