"""The sources a config names, and the streams of batches that training and its evaluation read."""

from __future__ import annotations

from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vlkd_jax.data.pipeline import batches
from vlkd_jax.data.sources import CaptionTexts, FolderPairs, ShapesPairs, ShapesTexts, Subset, TextLines
from vlkd_jax.distill import Objective
from vlkd_jax.errors import UserError
from vlkd_jax.types import Batch


def make_source(config: ConfigDict, split: str):
    """The records of `config.data` for "train" or "validation".

    Raises:
      UserError: an unknown source, or a folder that cannot be used.
    """
    data = config.data
    if data.source == "shapes":
        held_out = split == "validation"
        return ShapesPairs(0, split, 1 if held_out else data.twins, 1.0 if held_out else data.complete)
    if data.source == "shapes_texts":
        return ShapesTexts(0, split)
    if data.source == "folder":
        for field in ("captions", "images"):
            if not data[field]:
                raise UserError(f"config.data.{field} is empty; set it for your folder (see --config=folder)")
        return Subset(FolderPairs(data.captions, data.images), split == "validation", data.validation_every)
    raise UserError(f"config.data.source is {data.source!r}; it is one of shapes, shapes_texts, folder")


def make_text_source(config: ConfigDict, split: str):
    """Texts without pictures: `config.data.replay`, or this run's own captions."""
    replay = config.data.replay
    if replay == "shapes_texts" or (not replay and config.data.source in ("shapes", "shapes_texts")):
        return ShapesTexts(0, split)
    if replay in ("", "captions"):
        return CaptionTexts(make_source(config, split))
    return Subset(TextLines(replay), split == "validation", config.data.validation_every)


def train_stream(config: ConfigDict, objective: Objective, start: int) -> Iterator[Batch]:
    """Endless training batches from step `start` on, with `replay` in them where the config mixes texts in."""
    options = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "start": start,
        # the built-in world's order is random already, and its twins stay together
        "shuffle": config.data.source == "folder",
        "process": (jax.process_index(), jax.process_count()),
        "threads": config.data.threads,
    }
    stream = batches(make_source(config, "train"), objective.encoder, **options)
    if not config.loss.text or config.objective != "vlkd":
        return stream
    texts = batches(make_text_source(config, "train"), objective.replay_encoder, **options | {"shuffle": True})
    return (pair.replace(replay=text.replace(index=None)) for pair, text in zip(stream, texts, strict=True))


def held_out(config: ConfigDict, objective: Objective, texts: bool = False) -> list[Batch]:
    """The first `config.eval.batches` batches of the held-out pairs (or texts): the same ones at every evaluation."""
    source = (make_text_source if texts else make_source)(config, "validation")
    encode = objective.replay_encoder if texts else objective.encoder
    size = min(config.batch_size, len(source))
    stream = batches(source, encode, batch_size=size, seed=0, shuffle=False, threads=1)
    return [next(stream).replace(index=None) for _ in range(config.eval.batches)]
