"""Write CLIP and BART directories that Hugging Face loads: config.json and model.safetensors, each whole."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vlkd_jax.hf import names
from vlkd_jax.hf.files import CONFIG, GENERATION, PREPROCESSOR, TOKENIZER_FILES, WEIGHTS
from vlkd_jax.models.classifier import ClassifierConfig
from vlkd_jax.models.configs import BartConfig, ClipConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": jnp.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
"""Of written weights."""


def save_clip(directory: str | pathlib.Path, config: ClipConfig, params: dict) -> None:
    """Write a `CLIPModel` directory (created if absent) from a parameter tree of numpy or addressable JAX arrays.

    preprocessor_config.json is written too. Tensors are float32 under Hugging Face's names. Each file is written aside
    and renamed; config.json comes last. ValueError names parameters that the table does not know or that are absent.
    """
    texts = {PREPROCESSOR: config.preprocessing.to_hf(), CONFIG: config.to_hf()}
    _save(pathlib.Path(directory), params, config, texts)


def save_bart(directory: str | pathlib.Path, config: BartConfig, params: dict, dtype: str = "float32") -> None:
    """As `save_clip`, a `BartForConditionalGeneration` directory, with generation_config.json beside it.

    Args:
      dtype: of the weights, a key of `DTYPES`.
    """
    texts = {GENERATION: generation_values(config), CONFIG: config.to_hf() | {"dtype": dtype}}
    _save(pathlib.Path(directory), params, config, texts, dtype)


def save_classifier(
    directory: str | pathlib.Path, config: ClassifierConfig, params: dict, dtype: str = "float32"
) -> None:
    """As `save_bart`, a `BartForSequenceClassification` directory; nothing of it is generated with."""
    bart = {name: value for name, value in params["bart"].items() if name != "final_logits_bias"}
    texts = {CONFIG: config.to_hf() | {"dtype": dtype}}
    _save(pathlib.Path(directory), params | {"bart": bart}, config, texts, dtype)


def generation_values(config: BartConfig) -> dict[str, int]:
    """generation_config.json of a BART."""
    pins = ("bos", "pad", "eos", "decoder_start", "forced_bos", "forced_eos")
    generation = {f"{pin}_token_id": getattr(config, f"{pin}_token_id") for pin in pins}
    return {name: value for name, value in generation.items() if value is not None}


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies the tokenizer's files from one Hugging Face directory to another (created if absent), as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _save(
    directory: pathlib.Path,
    params: dict,
    config: ClipConfig | BartConfig | ClassifierConfig,
    texts: dict[str, dict],
    dtype: str = "float32",
) -> None:
    tensors = names.to_hf(names.rows_for(config), params)
    tensors = {name: value.astype(DTYPES[dtype], copy=False) for name, value in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS, tensors)
    for name, values in texts.items():
        write_json(directory / name, values)


def write_tensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """One safetensors file, whole or not at all."""
    metadata = {"format": "pt"}  # transformers refuses a file that does not say so
    replace(path, lambda aside: safetensors.numpy.save_file(tensors, aside, metadata=metadata))


def write_json(path: pathlib.Path, values: dict) -> None:
    """One JSON file, whole or not at all."""
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    replace(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write through a temporary neighbour, so that `path` is either the old file or the whole new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors writes for the owner alone
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
