"""The models that a task starts from: configurations and tokenizers as their directories have them, and whether these
belong together."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from vlkd_jax.config import model_directory
from vlkd_jax.data.pipeline import Corruption, Encoder
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import read_bart_config, read_clip_config
from vlkd_jax.models.clip import LEGACY_EOS_TOKEN_ID
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig
from vlkd_jax.models.layers import REMAT_POLICIES
from vlkd_jax.types import ConfigDict

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""`config.dtype` -> the dtype of activations."""
PADDING = 1024
"""Fewer embedding rows than this may have no token; where there are more, the tokenizer is another model's."""


def choose(config: ConfigDict, field: str, options: dict[str, Any]) -> Any:
    """The option that `config.FIELD` names. Raises UserError with the names there are."""
    value = config
    for part in field.split("."):
        value = value[part]
    if value not in options:
        raise UserError(f"config.{field} is {value!r}; it is one of {', '.join(options)}")
    return options[value]


def remat_policy(config: ConfigDict) -> str | None:
    """What is kept of layers that the backward pass recomputes; None: they are not. Raises UserError: see `choose`."""
    policy = choose(config, "remat_policy", {name: name for name in REMAT_POLICIES})
    return policy if config.remat else None


def read_clip(config: ConfigDict) -> tuple[ClipConfig, ClipText]:
    """Configuration and tokenizer of `config.clip`. Raises UserError, also when the two differ."""
    require(config, "clip")
    directory = model_directory(config.clip)
    clip_config, text = read_clip_config(directory), ClipText(directory)
    _check_vocabulary(config.clip, text.vocab_size, clip_config.text.vocab_size)
    _check_clip_end(config.clip, text, clip_config.text)
    return clip_config, text


def read_bart(config: ConfigDict) -> tuple[BartConfig, BartText]:
    """Configuration and tokenizer of `config.bart`. Raises UserError, also when the two differ."""
    require(config, "bart")
    directory = model_directory(config.bart)
    bart_config, text = read_bart_config(directory), BartText(directory)
    if text.mask >= bart_config.vocab_size:
        raise UserError(
            f"{config.bart}: config.json's vocab_size is {bart_config.vocab_size}, without a row for <mask> "
            f"(id {text.mask}), as in bart-large-cnn and bart-large-xsum: this BART cannot infill; set config.bart to "
            "facebook/bart-large or facebook/bart-base"
        )
    _check_vocabulary(config.bart, text.vocab_size, bart_config.vocab_size)
    _check_bart_ids(config.bart, text, bart_config)
    return bart_config, text


def with_training_rates(bart_config: BartConfig, config: ConfigDict) -> BartConfig:
    """For the module that trains; what is saved keeps the rates of the directory it came from."""
    return dataclasses.replace(bart_config, dropout=config.dropout, attention_dropout=0.0, activation_dropout=0.0)


def text_encoder(config: ConfigDict, text: BartText, positions: int, **options: Any) -> Encoder:
    """What a batch holds of BART's texts; `options` are other fields of `Encoder`.

    Raises:
      UserError: `config.data` has room for more tokens than BART has positions.
    """
    data = config.data
    check_lengths(config, positions)
    return Encoder(
        bart_text=text,
        text_length=data.text_length,
        source_length=data.source_length,
        corruption=Corruption(**config.corruption.to_dict()),
        truncate=data.truncate,
        **options,
    )


def check_lengths(config: ConfigDict, positions: int) -> None:
    """Raises UserError when `config.data` has room for more tokens than BART has positions."""
    for field in ("text_length", "source_length", "context_length", "replay_length"):
        if config.data[field] > positions:
            source = config.bart or config.start
            raise UserError(
                f"config.data.{field} is {config.data[field]}; the BART in {source} has {positions} positions"
            )


def require(config: ConfigDict, field: str, what: str = "a Hugging Face directory") -> None:
    """Raises UserError where the field that names a model is empty."""
    if not config[field]:
        raise UserError(f"config.{field} is empty; set it to {what}: --config.{field}=DIR")


def _check_vocabulary(directory: str, tokens: int, rows: int) -> None:
    """Embeddings may be padded with rows that no token has: no text holds them and `predict` never gives them.

    The losses' softmax runs over all rows, as Hugging Face's does: what training started from depends on it, and as no
    target is such a row, their probability only falls.
    """
    if not 0 <= rows - tokens < PADDING:
        raise UserError(
            f"{directory}: the tokenizer has {tokens} tokens and config.json's vocab_size is {rows}; "
            "put the tokenizer that belongs to this model there"
        )


def _check_clip_end(directory: str, text: ClipText, config: ClipTextConfig) -> None:
    """A sentence is pooled at its end token: where the model looks for another one, it would pool the first token."""
    if config.eos_token_id == LEGACY_EOS_TOKEN_ID:
        if text.eos != text.vocab_size - 1:
            raise UserError(
                f"{directory}: config.json's text_config.eos_token_id is {LEGACY_EOS_TOKEN_ID}, which pools at the "
                f"largest id, and the tokenizer's end token {text.eos} is not the largest ({text.vocab_size - 1}); "
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
