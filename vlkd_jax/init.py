"""A config for one's own pictures: `vlkd init DIR --captions=FILE --images=DIR --clip=DIR --bart=DIR`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.config import BUILTIN, HUB
from vlkd_jax.configs import folder
from vlkd_jax.console import say
from vlkd_jax.data.sources import FolderPairs
from vlkd_jax.data.streams import LENGTHS_OF
from vlkd_jax.data.text import BartText
from vlkd_jax.errors import UserError
from vlkd_jax.storage import write_atomic
from vlkd_jax.tasks.parents import read_bart, read_clip
from vlkd_jax.workdir import output_directory

EPOCHS = 10
MANY = 200_000
"""Pairs from which on record files are the better form."""

TEXT = '''"""Distillation on {pictures}: vlkd train --config={path} --workdir={workdir}

Any field can be set on the command line too: --config.steps=500. All of them, with comments: vlkd_jax.configs.base.
"""

from vlkd_jax.configs import folder


def get_config():
    config = folder.get_config()
    config.clip = {clip!r}  # the teacher, which stays as it is
    config.bart = {bart!r}  # where the student starts
    config.data.captions = {captions!r}
    config.data.images = {images!r}
    # {count:,} pairs; the longest caption that was looked at has {longest} tokens, half of them at most {median}
    config.data.text_length = {room}
    config.data.source_length = {room}
    config.data.replay_length = {room}
    config.data.truncate = {truncate}  # True cuts captions that are longer, False passes over them
    # {epochs} times through the pairs. What a step takes of memory: vlkd doctor --config={path}
    config.batch_size = {batch_size}
    config.steps = {steps}
    config.optim.warmup = {warmup}
    # A small rate keeps what BART can do on texts; the two new linears learn faster.
    config.optim.lr = {lr}
    config.optim.lr_linears = {lr_linears}
    # Held-out losses, and what became of the text abilities (retention); one picture in {held_out} is held out.
    config.eval.every = {every}
    config.save_every = {every}
    config.data.validation_every = {held_out}
    # On one GPU or TPU, where there is one: half the memory of activations.
    # config.dtype = "bfloat16"
    # To keep more of the text abilities: texts (one a line, of the kinds BART was made of) beside the pairs, best of
    # all; a pull to the start; or a stop.
    # config.loss.denoise, config.data.replay = 0.1, "texts.txt"
    # config.loss.l2 = 1e-2
    # config.early_stop.metric = "retention/token_accuracy"
    return config
'''


class Lengths(NamedTuple):
    """Of captions in tokens of BART, `<s>` and `</s>` included: half of them have `median` at most."""

    median: int
    longest: int


def write_config(directory: Path, captions: Path, images: Path, clip: str, bart: str) -> tuple[Path, int, Lengths]:
    """Writes `directory`/config.py for these pairs and models, and returns its path, how many pairs there are, lengths.

    Raises:
      UserError: captions, pictures or models that cannot be read, or a config that is there already.
    """
    path = directory / "config.py"
    if path.exists():
        raise UserError(f"{path}: there already; edit it, or name another directory")
    given = ConfigDict({"clip": _absolute(clip), "bart": _absolute(bart)})
    read_clip(given)
    bart_config, text = read_bart(given)
    pairs = FolderPairs(captions, images, max_unusable=folder.get_config().data.max_unusable)
    lengths = _lengths(pairs, text)
    positions = bart_config.max_position_embeddings
    room = min(-(-lengths.longest // 8) * 8, positions)
    held_out = folder.get_config().data.validation_every
    batch_size = min(64, 1 << max(len(pairs) // 20, 8).bit_length() - 1)
    steps = max(EPOCHS * len(pairs) // batch_size, 20)
    config = TEXT.format(
        pictures=images.name,
        path=shlex.quote(os.fspath(path)),
        workdir=shlex.quote(os.fspath(directory / "run")),
        clip=given.clip,
        bart=given.bart,
        captions=os.fspath(captions.absolute()),
        images=os.fspath(images.absolute()),
        count=len(pairs),
        **lengths._asdict(),
        room=room,
        truncate=lengths.longest > positions,
        epochs=EPOCHS,
        batch_size=batch_size,
        steps=steps,
        warmup=max(steps // 20, 1),
        lr=folder.get_config().optim.lr,
        lr_linears=folder.get_config().optim.lr_linears,
        every=max(steps // 10, 1),
        held_out=held_out,
    )
    output_directory(directory, "DIR")
    write_atomic(path, config.encode())
    return path, len(pairs), lengths


def _lengths(pairs: FolderPairs, text: BartText) -> Lengths:
    """Of captions that can be used, evenly spread over them."""
    tokens = []
    for index in range(0, len(pairs), -(-len(pairs) // LENGTHS_OF)):
        if index not in pairs.faults:
            tokens.append(len(text.wrap(text.encode(pairs.pairs[index][2]))))
    return Lengths(int(np.median(tokens)), max(tokens))


def _absolute(model: str) -> str:
    return model if model.startswith((BUILTIN, HUB)) else os.path.abspath(model)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    directory = Path(values.directory)
    path, count, lengths = write_config(directory, Path(values.captions), Path(values.images), values.clip, values.bart)
    say(f"wrote {path}: {count:,} pairs, captions of {lengths.median} tokens (median; longest {lengths.longest})")
    if count > MANY:
        say("so many pairs are read faster from record files: vlkd prepare --help")
    config, run = (shlex.quote(os.fspath(place)) for place in (path, directory / "run"))
    say("look at it, then:")
    for command in (
        f"doctor --config={config} --workdir={run}",
        f"train --config={config} --workdir={run}",
        f"serve --model={run}",
        f"export --checkpoint={run} --output={shlex.quote(os.fspath(directory / 'export'))}",
    ):
        say(f"  vlkd {command}")


if __name__ == "__main__":
    entry.run(main, COMMANDS["init"])
