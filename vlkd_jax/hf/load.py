"""Read CLIP and BART directories in Hugging Face format: every tensor used, none missing, all shapes right."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vlkd_jax.errors import UserError, few
from vlkd_jax.hf import names
from vlkd_jax.hf.files import (
    CONFIG,
    GENERATION,
    OPEN_CLIP,
    PREPROCESSOR,
    PROCESSOR,
    existing_directory,
    is_open_clip,
    read_json,
)
from vlkd_jax.hf.tensors import Tensors
from vlkd_jax.models.configs import BartConfig, ClipConfig
from vlkd_jax.models.preprocessing import Preprocessing

FLOATS = {"F64", "F32", "F16", "BF16"}
# Tensors Hugging Face files carry beside the parameters.
BART_VERSIONS = ("model.encoder.version", "model.decoder.version")
BART_TIED = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
BART_EMBEDDING = "model.shared.weight"
CLIP_POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
BLOCK = 4096
"""Rows of a table that are compared at a time with those of a copy."""
Bounds = tuple[tuple[int, int], ...]
"""(start, stop) along each axis."""


def read_clip_config(directory: str | pathlib.Path) -> ClipConfig:
    """The configuration of a `CLIPModel` directory; no weights are read.

    Its preprocessing is that of processor_config.json, or else of preprocessor_config.json, as transformers chooses;
    where there is neither, OpenAI's. A CLIP with a residual network is read as OpenCLIP keeps it, from `OPEN_CLIP`.
    Raises UserError when a file cannot be used.
    """
    directory = existing_directory(directory)
    if is_open_clip(directory):
        return ClipConfig.from_open_clip(read_json(directory / OPEN_CLIP), str(directory / OPEN_CLIP))
    config = ClipConfig.from_hf(read_json(directory / CONFIG), str(directory / CONFIG))
    return dataclasses.replace(config, preprocessing=read_preprocessing(directory, config.vision.image_size))


def read_preprocessing(directory: pathlib.Path, image_size: int) -> Preprocessing | None:
    """What a directory says of it; None: nothing. Raises UserError when a file cannot be used."""
    path = directory / PROCESSOR
    whole = read_json(path) if path.is_file() else None
    if isinstance(whole, dict) and whole.get("image_processor") is not None:
        return Preprocessing.from_hf(whole["image_processor"], image_size, str(path), "image_processor.")
    path = directory / PREPROCESSOR
    return Preprocessing.from_hf(read_json(path), image_size, str(path)) if path.is_file() else None


def read_bart_config(directory: str | pathlib.Path) -> BartConfig:
    """The configuration of a BART directory; no weights are read.

    `forced_*` ids and `decoder_start_token_id` of generation_config.json win over config.json. Raises UserError when a
    file cannot be used.
    """
    directory = existing_directory(directory)
    values = read_json(directory / CONFIG)
    config = BartConfig.from_hf(values, str(directory / CONFIG))
    if (directory / GENERATION).is_file():
        generation = read_json(directory / GENERATION)
        pins = ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id")
        chosen = {name: generation[name] for name in pins if generation.get(name) is not None}
        config = BartConfig.from_hf({**values, **chosen}, str(directory / GENERATION))
    return config


def load_clip(directory: str | pathlib.Path, shardings: Any = None) -> tuple[ClipConfig, dict]:
    """Config and parameters (nested dict, float32) of a `CLIPModel` directory.

    Args:
      shardings: a `jax.sharding.Sharding` for each parameter (a nested dict of the same names) or one for all: the
        parameters are global jax arrays, of which a process reads what its devices hold and nothing else. None: they
        are whole numpy arrays.

    Raises UserError when the directory, its config.json or its weights cannot be used; unused, missing and mis-shaped
    tensors are all named in one message, before any parameter is read.
    """
    directory, config = existing_directory(directory), read_clip_config(directory)
    tensors = Tensors(directory)
    if is_open_clip(directory):
        tensors.name_as_hugging_face()
    complaints = []
    for name in CLIP_POSITION_IDS:
        if name in tensors and not _counts_up(tensors.read(name)):
            complaints.append(f"{name} does not count 0, 1, 2, ...")
        tensors.discard(name)
    return config, _assemble(config, tensors, shardings, complaints)


def load_bart(directory: str | pathlib.Path, shardings: Any = None) -> tuple[BartConfig, dict]:
    """Config and parameters of a BART directory, as `load_clip` gives them. Raises UserError as it does.

    Both `BartForConditionalGeneration` and the base `BartModel` (names without "model.") are read; an absent
    `final_logits_bias` is zero, as in Hugging Face.
    """
    directory, config = existing_directory(directory), read_bart_config(directory)
    tensors = Tensors(directory, _with_model_prefix)
    for name in BART_VERSIONS:
        tensors.discard(name)
    copies = [name for name in BART_TIED if name in tensors]
    if BART_EMBEDDING not in tensors and copies:
        tensors.rename(copies.pop(0), BART_EMBEDDING)
    complaints = []
    if BART_EMBEDDING in tensors:
        for name in copies:
            if not _equal(tensors, name, BART_EMBEDDING):
                complaints.append(f"{name} differs from {BART_EMBEDDING}, which must be the same table")
            tensors.discard(name)
    return config, _assemble(config, tensors, shardings, complaints, {"final_logits_bias": np.float32(0)})


def _with_model_prefix(name: str) -> str:
    return f"model.{name}" if name.startswith(("shared.", "encoder.", "decoder.")) else name


def _counts_up(ids: np.ndarray) -> bool:
    return np.array_equal(ids.reshape(-1), np.arange(ids.size))


def _equal(tensors: Tensors, name: str, other: str) -> bool:
    """Whether two tensors hold the same, of which some rows at a time are read."""
    shape = tensors.header(name)[1]
    if shape != tensors.header(other)[1]:
        return False
    blocks = [(slice(k, min(k + BLOCK, shape[0])),) for k in range(0, shape[0], BLOCK)] if shape else [()]
    return all(np.array_equal(tensors.read(name, block), tensors.read(other, block)) for block in blocks)


def _part(row: names.Row, bounds: Bounds, tensors: Tensors, defaults: dict) -> np.ndarray:
    """A part of one Flax parameter, allocated once and filled layer by layer, of which only this part is read."""
    value = np.empty([stop - start for start, stop in bounds], np.float32)
    index, stored, targets = tuple(slice(*bound) for bound in bounds), row.names(), [value]
    if row.layers is not None:
        stored, targets, index = stored[index[0]], value, index[1:]
    transform = names.TRANSFORMS[row.transform]
    wanted, inside = transform.reads(index)
    for name, target in zip(stored, targets, strict=True):
        target[...] = transform.to_flax(tensors.read(name, wanted))[inside] if name in tensors else defaults[name]
    return value


def _sharded(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, part: Callable[[Bounds], np.ndarray]
) -> jax.Array:
    """One parameter as a global array; a part that several devices of this process hold is read once."""
    read = functools.cache(part)
    return jax.make_array_from_callback(shape, sharding, lambda index: read(_bounds(index, shape)))


def _bounds(index: names.Index, shape: tuple[int, ...]) -> Bounds:
    return tuple(along.indices(size)[:2] for along, size in zip(index, shape, strict=True))


def _faults(config, shapes: dict, tensors: Tensors, optional: dict) -> Iterator[str]:
    """Missing, mis-shaped and unused tensors, one phrase each."""
    wanted = {}
    for row in names.rows_for(config):
        shape = names.hf_shape(row, names.leaf(shapes, row.path).shape)
        wanted |= dict.fromkeys(row.names(), shape)
    missing = sorted(name for name in wanted if name not in tensors and name not in optional)
    unused = sorted(name for name in tensors.files if name not in wanted)
    if missing:
        yield "missing: " + few(missing)
    if unused:
        yield "unused: " + few([tensors.files[name].name for name in unused])
    unfit = []
    for name, shape in wanted.items():
        if name in tensors:
            dtype, stored = tensors.header(name)
            if stored != shape:
                unfit.append(f"{name} is {list(stored)}, {CONFIG} asks for {list(shape)}")
            elif dtype not in FLOATS:
                unfit.append(f"{name} holds {dtype}, not floating-point numbers")
    if unfit:
        yield few(unfit, "; ")


def assemble(config: names.ModelConfig, directory: pathlib.Path, shardings: Any, parts: tuple[str, ...]) -> dict:
    """The parameters of a directory whose tensors are all in the name table, of the tree's top level these parts.

    Raises UserError as `load_clip` does.
    """
    return _assemble(config, Tensors(existing_directory(directory)), shardings, [], parts=parts)


def _assemble(
    config,
    tensors: Tensors,
    shardings: Any,
    complaints: list[str],
    defaults: dict | None = None,
    parts: tuple[str, ...] | None = None,
) -> dict:
    """The nested parameter dict, of its top level `parts` alone (None: all), or one UserError with every complaint."""
    defaults = defaults or {}
    shapes = names.parameter_shapes(config)
    complaints = [*complaints, *_faults(config, shapes, tensors, defaults)]
    if complaints:
        raise UserError(
            f"{tensors.directory}: the weights do not fit {CONFIG}: {'; '.join(complaints)}. "
            "Use the config.json these weights were saved with"
        )
    shapes = {name: shape for name, shape in shapes.items() if parts is None or name in parts}
    if shardings is not None:
        shardings = jax.tree.broadcast(shardings, shapes)
    params: dict = {}
    for row in names.rows_for(config):
        if row.path[0] not in shapes:
            continue
        node = params
        for name in row.path[:-1]:
            node = node.setdefault(name, {})
        shape = names.leaf(shapes, row.path).shape
        part = functools.partial(_part, row, tensors=tensors, defaults=defaults)
        if shardings is None:
            node[row.path[-1]] = part(tuple((0, size) for size in shape))
        else:
            node[row.path[-1]] = _sharded(shape, names.leaf(shardings, row.path), part)
    return params
