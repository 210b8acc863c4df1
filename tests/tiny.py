"""Tiny CLIP and BART directories that know the built-in world's words, and a config that distils between them."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax import predict, sharding
from vlkd_jax.configs import base
from vlkd_jax.decoding import Decoding
from vlkd_jax.hf.save import save_bart, save_clip
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig, ClipVisionConfig
from vlkd_jax.predict import Request
from vlkd_jax.shapes.make_models import train_bart_tokenizer, train_clip_tokenizer
from vlkd_jax.shapes.sources import ShapesPairs, ShapesTexts

IMAGE_SIZE, PATCH, WIDTH, JOINT = 24, 12, 32, 24
POSITIONS = 64
ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@functools.cache
def make_assets(parent: Path) -> Path:
    """Writes `parent/tiny_assets/clip` and `.../bart`, complete Hugging Face directories with random weights, once."""
    directory = parent / "tiny_assets"
    for name in ("clip", "bart"):
        (directory / name).mkdir(parents=True)
    sources = ShapesTexts(0, "train"), ShapesPairs(0, "train")
    texts = [text for i in range(300) for text in (sources[0][i].text, sources[0][i].context) if text]
    size, start, end = train_clip_tokenizer(texts, directory / "clip")
    vision = ClipVisionConfig(WIDTH, 48, 2, 2, IMAGE_SIZE, PATCH)
    text = ClipTextConfig(size, WIDTH, 48, 2, 2, 40, bos_token_id=start, eos_token_id=end, pad_token_id=end)
    clip = ClipConfig(vision, text, JOINT)
    key, ids = jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    pixels = jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3))
    save_clip(directory / "clip", clip, jax.jit(Clip(clip).init)(key, pixels, ids, ids == 0)["params"])
    vocab_size = train_bart_tokenizer(texts, directory / "bart")
    bart = BartConfig(vocab_size, WIDTH, 2, 2, 2, 2, 48, 48, POSITIONS)
    save_bart(directory / "bart", bart, jax.jit(Bart(bart).init)(key, ids, ids == 0, ids)["params"])
    return directory


def write_pictures(directory: Path, count: int) -> list[str]:
    """Writes the built-in world's first training pictures to `directory`; their lines of a captions.tsv."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        record = ShapesPairs(0, "train")[i]
        Image.fromarray(record.image).save(directory / f"{i}.png")
        lines.append(f"{i}.png\t{record.text}")
    return lines


def options(assets: Path) -> dict:
    """What a short run on the tiny models overrides, by dotted name."""
    return {
        "clip": str(assets / "clip"),
        "bart": str(assets / "bart"),
        "steps": 6,
        "batch_size": 8,
        "log_every": 1,
        "save_every": 3,
        "data.text_length": 40,
        "data.source_length": 40,
        "data.context_length": 40,
        "data.replay_length": POSITIONS,
        "data.threads": 1,
        "optim.warmup": 2,
        "eval.every": 0,
        "eval.batches": 1,
        "eval.questions": 4,
        "mesh.data": 1,
    }


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> jax.sharding.Mesh:
    """A mesh of the first fake devices."""
    return sharding.make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "model": model, "slices": 1}))


def tiny_config(assets: Path, **changes) -> ConfigDict:
    """configs/base.py with `options` and `changes`, whose names write `__` for the dot."""
    config = base.get_config()
    config.lock()
    for name, value in (options(assets) | {k.replace("__", "."): v for k, v in changes.items()}).items():
        *parents, last = name.split(".")
        functools.reduce(getattr, parents, config)[last] = value
    return config


def arguments(assets: Path, workdir: Path, **changes) -> list[str]:
    """The same as command-line arguments of `vlkd_jax.train`."""
    values = options(assets) | {k.replace("__", "."): v for k, v in changes.items()}
    return [
        f"--config={ROOT / 'configs' / 'base.py'}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def environment() -> dict[str, str]:
    """For a process that computes as this one: the settings of conftest.py as environment variables."""
    settings = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | settings | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def command_line(module: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs `python -m vlkd_jax.MODULE` to its end."""
    command = [sys.executable, "-m", f"vlkd_jax.{module}", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)


GLOO = re.compile(
    r"\[Gloo\] Rank \d*|\d* ?is connected to \d*|\d* ?peer ranks\. |Expected number of connected peer ranks is : \d*\n?"
)


def without_gloo(output: str) -> list[str]:
    """The lines without what gloo's threads say of their connections: its pieces mix with each other's and with ours.

    A rank may come to stand alone or before a line of ours, which therefore must not begin with a number.
    """
    lines = (line.lstrip(" 0123456789") for line in GLOO.sub("", output).splitlines())
    return [line for line in lines if line]


def generate(model, batch_size, sources, prefixes, max_new_tokens, images=None, image_of=None, contexts=None):
    """What a `VLKD` says, a row for each source; `image_of`: which image each is about, default k about k."""
    image_of = range(len(sources)) if image_of is None else image_of
    requests = [
        Request(
            source,
            prefix,
            None if images is None else images[image_of[k]],
            [] if contexts is None else contexts[k],
        )
        for k, (source, prefix) in enumerate(zip(sources, prefixes, strict=True))
    ]
    return [text for (text,) in predict.generate(model, requests, Decoding(max_new_tokens=max_new_tokens), batch_size)]
