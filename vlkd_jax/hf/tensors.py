"""The tensors of a directory of safetensors files, by name, read part by part."""

import collections
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import safetensors

from vlkd_jax.console import say
from vlkd_jax.errors import UserError, few
from vlkd_jax.hf import names
from vlkd_jax.hf.files import INDEX, merge_first, weight_files

WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and torch's data parallelism put before every name."""
ADAPTER_WRAPPER = "base_model.model."
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


class _Stored(NamedTuple):
    """Where a tensor is: a file, its name there, of which rows (None: all), and whether the file has it transposed."""

    file: str
    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False


class Tensors:
    """The tensors of a directory by name, read part by part."""

    def __init__(self, directory: pathlib.Path, canonical: Callable[[str], str] = str):
        self.directory = directory
        self.opened = {file: _open(directory / file) for file in weight_files(directory)}
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

    def discard(self, name: str) -> None:
        """Forgets a tensor, where there is one of that name."""
        self.files.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name."""
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
        raise UserError(merge_first(directory) + f" (the weights are named {few(in_adapter)})")
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
