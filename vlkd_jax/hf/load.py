"""Read CLIP and BART directories in Hugging Face format: every tensor used, none missing, all shapes right."""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from vlkd_jax.console import say
from vlkd_jax.errors import UserError, few
from vlkd_jax.hf import names
from vlkd_jax.models.configs import BartConfig, ClipConfig, Preprocessing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
CLIP_TOKENIZER = "clip_tokenizer"
"""In an exported student the folder of the teacher's tokenizer; the student's own lies beside the weights."""
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
ADAPTER = "adapter_config.json"
WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and torch's data parallelism put before every name."""
ADAPTER_WRAPPER = "base_model.model."
TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt")
FLOATS = {"F64", "F32", "F16", "BF16"}
# Tensors Hugging Face files carry beside the parameters.
BART_VERSIONS = ("model.encoder.version", "model.decoder.version")
BART_TIED = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
BART_EMBEDDING = "model.shared.weight"
CLIP_POSITION_IDS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
OPEN_CLIP_NAMES = (
    (r"visual\.(.*)", r"vision_model.\1"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"text_model.encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.ln_(\d)\.(\w+)", r"text_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"text_model.encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"text_model.encoder.layers.\1.mlp.fc2.\2"),
    (r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
)
"""Names that OpenAI gave CLIP's tensors, and OpenCLIP kept, as regular expressions -> Hugging Face's."""
OPEN_CLIP_UNREAD = {"num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size"}
"""Last parts of names in such files that are no parameters."""
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
    directory = _directory(directory)
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
    directory = _directory(directory)
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
    directory, config = _directory(directory), read_clip_config(directory)
    tensors = _Tensors(directory)
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
    directory, config = _directory(directory), read_bart_config(directory)
    tensors = _Tensors(directory, _with_model_prefix)
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


def is_open_clip(directory: pathlib.Path) -> bool:
    """Whether a directory holds a CLIP as OpenCLIP keeps it and not, beside that, as Hugging Face does."""
    if not (directory / OPEN_CLIP).is_file():
        return False
    other = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    return not isinstance(other, dict) or other.get("model_type") != "clip"


def files_read(directory: pathlib.Path) -> list[str]:
    """Names of the files that a model, its tokenizer and its preprocessing are read from, those that are there."""
    names_read = (CONFIG, GENERATION, *_weight_files(directory), *TOKENIZER_FILES, PREPROCESSOR, PROCESSOR)
    names_read += () if (directory / WEIGHTS).is_file() else (INDEX,)
    names_read += (OPEN_CLIP,) if is_open_clip(directory) else ()
    names_read += tuple(f"{CLIP_TOKENIZER}/{name}" for name in TOKENIZER_FILES)
    return [name for name in names_read if (directory / name).is_file()]


def _with_model_prefix(name: str) -> str:
    return f"model.{name}" if name.startswith(("shared.", "encoder.", "decoder.")) else name


def _counts_up(ids: np.ndarray) -> bool:
    return np.array_equal(ids.reshape(-1), np.arange(ids.size))


def _equal(tensors: "_Tensors", name: str, other: str) -> bool:
    """Whether two tensors hold the same, of which some rows at a time are read."""
    shape = tensors.header(name)[1]
    if shape != tensors.header(other)[1]:
        return False
    blocks = [(slice(k, min(k + BLOCK, shape[0])),) for k in range(0, shape[0], BLOCK)] if shape else [()]
    return all(np.array_equal(tensors.read(name, block), tensors.read(other, block)) for block in blocks)


def _directory(directory: str | pathlib.Path) -> pathlib.Path:
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory; give one in Hugging Face format (config.json, {WEIGHTS})")
    if (directory / ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise UserError(_merge_first(directory / ADAPTER))
    return directory


def _merge_first(place: pathlib.Path) -> str:
    return (
        f"{place}: an adapter (LoRA or another of peft), not a whole model; merge it into its model first: load both "
        "with peft, then `merge_and_unload().save_pretrained(DIR)`, and give DIR"
    )


def read_json(path: pathlib.Path) -> Any:
    """A JSON file's value. Raises UserError when it is missing or not JSON."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a directory in Hugging Face format (config.json, {WEIGHTS})")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore the original file") from error


class _Stored(NamedTuple):
    """Where a tensor is: a file, its name there, of which rows (None: all), and whether the file has it transposed."""

    file: str
    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


class _Tensors:
    """The tensors of a directory by name, read part by part."""

    def __init__(self, directory: pathlib.Path, canonical: Callable[[str], str] = str):
        self.directory = directory
        self.opened = {file: _open(directory / file) for file in _weight_files(directory)}
        self.files: dict[str, _Stored] = {}
        wrapper = _wrapper(directory, [name for handle in self.opened.values() for name in handle.keys()])  # noqa: SIM118
        for file, handle in self.opened.items():
            for stored in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                name = canonical(stored.removeprefix(wrapper))
                if name in self.files:
                    other = "/".join(self.files[name][:2])
                    raise UserError(f"{directory / file}: {stored} is the same tensor as {other}; keep one of the two")
                self.files[name] = _Stored(file, stored)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype as safetensors writes it, shape), from the header alone."""
        stored = self.files[name]
        header = self.opened[stored.file].get_slice(stored.name)
        shape = tuple(header.get_shape())
        shape = shape[::-1] if stored.transposed else shape
        if stored.rows:
            shape = (stored.rows[1] - stored.rows[0], *shape[1:])
        return header.get_dtype(), shape

    def read(self, name: str, index: names.Index = ()) -> np.ndarray:
        """The part of a tensor that `index` (slices with both ends, of its first axes) says; nothing else is read."""
        stored = self.files[name]
        if stored.rows:
            first, *others = index or (slice(0, stored.rows[1] - stored.rows[0]),)
            index = (slice(stored.rows[0] + first.start, stored.rows[0] + first.stop), *others)
        try:
            tensor = self.opened[stored.file].get_slice(stored.name)
            if not stored.transposed:
                return tensor[index]
            whole = tuple(slice(0, size) for size in reversed(tensor.get_shape()))
            return tensor[(*index, *whole[len(index) :])[::-1]].T
        except (safetensors.SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
            # numpy knows bfloat16 through jax, but no name for the format's rarer types
            place = self.directory / stored.file
            raise UserError(f"{place}: {stored.name} cannot be read ({error}); copy it again") from error

    def name_as_hugging_face(self) -> None:
        """Gives the tensors of an OpenCLIP file the names that Hugging Face's have; none is copied or dropped."""
        for name in list(self.files):
            if name.split(".")[-1] in OPEN_CLIP_UNREAD:
                self.discard(name)
            elif fused := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
                width = self.header(name)[1][0] // 3
                stored = self.files.pop(name)
                for k, part in enumerate("qkv"):
                    new = f"text_model.encoder.layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}"
                    self.files[new] = stored._replace(rows=(k * width, (k + 1) * width))
            elif name == "text_projection":
                self.files["text_projection.weight"] = self.files.pop(name)._replace(transposed=True)
            else:
                new = next((re.sub(old, new, name) for old, new in OPEN_CLIP_NAMES if re.fullmatch(old, name)), name)
                self.rename(name, new)

    def discard(self, name: str):
        self.files.pop(name, None)

    def rename(self, old: str, new: str):
        self.files[new] = self.files.pop(old)


def _wrapper(directory: pathlib.Path, stored: list[str]) -> str:
    """What stands before every name and is no part of it; said in one line where there is something."""
    wrapper = ""
    while inner := [name for name in WRAPPERS if stored and all(n.startswith(wrapper + name) for n in stored)]:
        wrapper += inner[0]
    if wrapper:
        say(f"{directory}: every weight's name begins with {wrapper}, which is passed over")
    inside = [name.removeprefix(wrapper) for name in stored]
    in_adapter = [name for name in inside if name.startswith(ADAPTER_WRAPPER) or ".lora_" in name]
    if in_adapter:
        raise UserError(_merge_first(directory) + f" (the weights are named {few(in_adapter)})")
    return wrapper


def _open(path: pathlib.Path) -> Any:
    try:
        opened = safetensors.safe_open(path, framework="numpy")
        _check_names(path)
        return opened
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, though {INDEX} names it; copy it again") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def _check_names(path: pathlib.Path) -> None:
    """Raises UserError for a header in which a name stands twice: readers differ in which of the two they take."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))  # safetensors has found its length to be true

    def check(pairs: list[tuple[str, Any]]) -> dict:
        twice = {name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1}
        if twice:
            raise UserError(f"{path}: {few(sorted(twice))} stands twice in its header; get the original file")
        return dict(pairs)

    json.loads(header, object_pairs_hook=check)


def _weight_files(directory: pathlib.Path) -> list[str]:
    if is_open_clip(directory) and (directory / OPEN_CLIP_WEIGHTS).is_file():
        return [OPEN_CLIP_WEIGHTS]
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        valid = isinstance(shards, dict) and all(isinstance(file, str) for file in shards.values())
        if not valid or not shards:
            raise UserError(f"{directory / INDEX}: weight_map must map tensor names to files; restore the original")
        files = sorted(set(shards.values()))
        for file in files:
            if pathlib.PurePath(file).name != file:
                raise UserError(f"{directory / INDEX}: weight_map names {file!r}; shards must lie beside the index")
        return files
    raise UserError(_no_weights(directory))


def pickled_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """A directory's files of pickled weights, of one kind."""
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if files := sorted(path for path in directory.glob(pattern) if path.name not in TRAINER_FILES):
            return files
    return []


def _no_weights(directory: pathlib.Path) -> str:
    """Why there is nothing to read, with the command that converts what is there."""
    if (directory / ADAPTER).is_file() and not any(directory.glob("pytorch_model*")):
        return _merge_first(directory / ADAPTER)
    if files := pickled_files(directory):
        command = f"vlkd convert {shlex.quote(str(directory))}"
        return f"{files[0]}: pickled weights are not read; convert them once with: {command}"
    for file in ("flax_model.msgpack", "tf_model.h5"):
        if (directory / file).is_file():
            origin = "from_flax" if file.endswith("msgpack") else "from_tf"
            script = (
                "import json, transformers as t; "
                f"path = {str(directory)!r}; "
                "name = json.load(open(path + '/config.json'))['architectures'][0]; "
                f"getattr(t, name).from_pretrained(path, {origin}=True).save_pretrained(path)"
            )
            return (
                f"{directory / file}: only {WEIGHTS} is read; convert it once with transformers 4: "
                f"python -c {shlex.quote(script)}"
            )
    return f"{directory}: no {WEIGHTS} and no {INDEX}; copy the weights there"


def _part(row: names.Row, bounds: Bounds, tensors: _Tensors, defaults: dict) -> np.ndarray:
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


def _faults(config, shapes: dict, tensors: _Tensors, optional: dict) -> Iterator[str]:
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
    return _assemble(config, _Tensors(_directory(directory)), shardings, [], parts=parts)


def _assemble(
    config,
    tensors: _Tensors,
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
