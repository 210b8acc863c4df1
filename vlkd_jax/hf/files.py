"""The files of a model's directory in Hugging Face's format: their names, and what is said where they are not there."""

import json
import pathlib
import shlex
from typing import Any

from vlkd_jax.errors import UserError

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
TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt")


def is_open_clip(directory: pathlib.Path) -> bool:
    """Whether a directory holds a CLIP as OpenCLIP keeps it and not, beside that, as Hugging Face does."""
    if not (directory / OPEN_CLIP).is_file():
        return False
    other = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    return not isinstance(other, dict) or other.get("model_type") != "clip"


def files_read(directory: pathlib.Path) -> list[str]:
    """Names of the files that a model, its tokenizer and its preprocessing are read from, those that are there."""
    names_read = (CONFIG, GENERATION, *weight_files(directory), *TOKENIZER_FILES, PREPROCESSOR, PROCESSOR)
    names_read += () if (directory / WEIGHTS).is_file() else (INDEX,)
    names_read += (OPEN_CLIP,) if is_open_clip(directory) else ()
    names_read += tuple(f"{CLIP_TOKENIZER}/{name}" for name in TOKENIZER_FILES)
    return [name for name in names_read if (directory / name).is_file()]


def existing_directory(directory: str | pathlib.Path) -> pathlib.Path:
    """A directory of a whole model. Raises UserError where there is none, and for an adapter."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: not a directory; give one in Hugging Face format (config.json, {WEIGHTS})")
    if (directory / ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise UserError(merge_first(directory / ADAPTER))
    return directory


def merge_first(place: pathlib.Path) -> str:
    """What is said of an adapter."""
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


def weight_files(directory: pathlib.Path) -> list[str]:
    """Names of a directory's safetensors files of weights. Raises UserError where there are none."""
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
        return merge_first(directory / ADAPTER)
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
