"""Write and read a whole student in Hugging Face format: what `modeling_vlkd.VLKDForConditionalGeneration` loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlkd_jax.data.text import PROMPT_FIELDS, check_template
from vlkd_jax.errors import UserError
from vlkd_jax.hf import names
from vlkd_jax.hf.files import CONFIG, INDEX, PROCESSOR, WEIGHTS, read_json
from vlkd_jax.hf.load import assemble, read_preprocessing
from vlkd_jax.hf.save import DTYPES, generation_values, write_json, write_tensors
from vlkd_jax.models.configs import BartConfig, ClipConfig
from vlkd_jax.models.vlkd import HIDDEN, StudentConfig

MODEL_TYPE = "vlkd"
MODELING = "modeling_vlkd"
SHARD_BYTES = 5 * 10**9
"""More than so many bytes of weights are spread over several files."""
CHOICES = {
    "image_tokens": ("projected", *HIDDEN, "pooled"),
    "whiten": (False, True),
    "sentence_position": ("eos", "bos"),
    "contrastive_scale": ("learned", "clip"),
    "ttdm": ("normalised", "raw"),
}
"""Fields of `StudentConfig` beside the models, and what they may be."""


def config_values(config: StudentConfig, token_count: int, dtype: str) -> dict[str, Any]:
    """config.json of a student; ids from `token_count` on have no token."""
    classes = {"AutoConfig": "VLKDConfig", "AutoModel": "VLKDForConditionalGeneration"}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["VLKDForConditionalGeneration"],
        "auto_map": {name: f"{MODELING}.{value}" for name, value in classes.items()},
        "dtype": dtype,
        "is_encoder_decoder": True,
        "clip_config": config.clip.to_hf(),
        "bart_config": config.bart.to_hf(),
        "token_count": token_count,
        "start_token_ids": [config.bart.decoder_start_token_id, config.bart.bos_token_id],
        **{name: getattr(config, name) for name in CHOICES},
    }


def processor_values(prompts: Mapping[str, str]) -> dict[str, Any]:
    """processor_config.json of a student with these prompts."""
    return {
        "processor_class": "VLKDProcessor",
        "auto_map": {"AutoProcessor": f"{MODELING}.VLKDProcessor"},
        **prompts,
    }


def read_prompts(directory: str | Path) -> dict[str, str]:
    """The prompts of an exported student. Raises UserError when there are none that can be used."""
    path = Path(directory) / PROCESSOR
    values = read_json(path)
    prompts = {name: values.get(name) if isinstance(values, dict) else None for name in PROMPT_FIELDS}
    for name, prompt in prompts.items():
        if not isinstance(prompt, str):
            raise UserError(f"{path}: {name} is {prompt!r}; it must be a prompt, as vlkd export writes them")
        check_template(f"{path}: {name}", prompt, PROMPT_FIELDS[name])
    return prompts


def save_student(
    directory: Path,
    config: StudentConfig,
    params: dict,
    token_count: int,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights and config.json, last, into `directory` (created if absent).

    Args:
      params: {"student": ..., "clip": ...} of numpy or addressable jax arrays.
      dtype: of the weights, a key of `DTYPES`; the whitening and the logit scales stay float32.
      shard_bytes: see `SHARD_BYTES`.
    """
    tensors = names.to_hf(names.student_rows(config), params)
    kept = {name for name in tensors if name.startswith("image_whitening.") or name.endswith("logit_scale")}
    tensors = {name: value if name in kept else value.astype(DTYPES[dtype]) for name, value in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_tensors(directory / WEIGHTS, tensors)
    else:
        files = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
        for file, some in zip(files, shards, strict=True):
            write_tensors(directory / file, {name: tensors[name] for name in some})
        weight_map = {name: file for file, some in zip(files, shards, strict=True) for name in some}
        total = sum(value.nbytes for value in tensors.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(directory / "generation_config.json", generation_values(config.bart))
    write_json(directory / "preprocessor_config.json", config.clip.preprocessing.to_hf())
    write_json(directory / CONFIG, config_values(config, token_count, dtype))


def _shards(tensors: dict[str, np.ndarray], limit: int) -> list[list[str]]:
    """Names of the tensors of each file, in their order, as many as fit; one that is larger stands alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in tensors.items():
        if shards[-1] and size + value.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    return shards


def is_student(directory: str | Path) -> bool:
    """Whether a directory says that it holds an exported student."""
    try:
        return json.loads((Path(directory) / CONFIG).read_bytes()).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def read_student_config(directory: str | Path) -> StudentConfig:
    """The configuration of an exported student; no weights are read. Raises UserError when a file cannot be used."""
    path = Path(directory) / CONFIG
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        raise UserError(f"{path}: not an exported student; vlkd export writes one")
    for name, choices in CHOICES.items():
        if values.get(name) not in choices:
            raise UserError(f"{path}: {name} is {values.get(name)!r}; it is one of {', '.join(map(str, choices))}")
    clip = ClipConfig.from_hf(values.get("clip_config"), f"{path}: clip_config")
    preprocessing = read_preprocessing(Path(directory), clip.vision.image_size)
    return StudentConfig(
        bart=BartConfig.from_hf(values.get("bart_config"), f"{path}: bart_config"),
        clip=dataclasses.replace(clip, preprocessing=preprocessing),
        **{name: values[name] for name in CHOICES},
    )


def load_student(
    directory: str | Path, shardings: Any = None, parts: tuple[str, ...] = ("student", "clip")
) -> tuple[StudentConfig, dict]:
    """Config and float32 parameters {"student": ..., "clip": ...}, placed as `load.load_clip` does.

    Args:
      parts: which of the two; the others are not read.

    Raises UserError as `load.load_clip` does.
    """
    config = read_student_config(directory)
    return config, assemble(config, Path(directory), shardings, parts)
