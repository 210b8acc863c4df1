"""The sources a config names, and the streams of batches that training and its evaluation read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax.config import record_directories
from vlkd_jax.data.asked import Questions
from vlkd_jax.data.documents import Documents, document_files
from vlkd_jax.data.few_shot import FewShot
from vlkd_jax.data.glue import GLUE, TRAIN, GlueRows, glue_file
from vlkd_jax.data.pipeline import Encode, UnusableRecords, batches
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.data.sources import (
    CaptionTexts,
    FolderPairs,
    Mixture,
    QuestionTexts,
    Subset,
    TextLines,
    TextQuestion,
    counted,
    raise_if_too_many,
)
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.identity import Hashes
from vlkd_jax.shapes import sources as shapes
from vlkd_jax.tasks.parents import choose
from vlkd_jax.tasks.task import Task
from vlkd_jax.types import Batch

LENGTHS_OF = 20_000
"""Records of a source whose lengths are looked at when training starts."""


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """One kind of source: how `config.data.source` or `config.data.replay` is read when it names it.

    Attributes:
      make: (config, split) -> its records for "train" or "validation".
      texts: the same for the text-only records that go with it.
      has_images: whether its records have pictures.
      drawn: its records are drawn in random order by a program: there is no file to shuffle or to look at.
      cache_key: (config, source for "train") -> what its records depend on beside the files that `identity` hashes, as
        JSON values; None: it has too many for a teacher cache.
      text_questions: how many -> that many text-only questions about it, for retention; None: it has none.
    """

    make: Callable[[ConfigDict, str], Any]
    texts: Callable[[ConfigDict, str], Any]
    has_images: bool = True
    drawn: bool = False
    cache_key: Callable[[ConfigDict, Any], dict[str, Any]] | None = None
    text_questions: Callable[[int], list[TextQuestion]] | None = None


def _folder(config: ConfigDict, split: str) -> Subset:
    data = config.data
    for field in ("captions", "images"):
        if not data[field]:
            raise UserError(f"config.data.{field} is empty; set it for your folder (see --config=folder)")
    pairs = FolderPairs(data.captions, data.images, data.max_unusable)
    return Subset(pairs, split == "validation", data.validation_every)


def _records(config: ConfigDict, split: str) -> RecordPairs | Mixture:
    data = config.data
    if not data.directory:
        raise UserError("config.data.directory is empty; set it to a directory that vlkd prepare has written")
    name = data.validation_split if split == "validation" else data.split
    parts = [RecordPairs(directory, name) for directory in record_directories(data)]
    if not data.weights:
        return parts[0]
    numbers = all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in data.weights)
    if not numbers or len(data.weights) != len(parts):
        raise UserError(
            f"config.data.weights is {data.weights}; give each of the {len(parts)} directories in "
            "config.data.directory a number above 0, such as --config.data.weights=3,1"
        )
    return Mixture(parts, data.weights)


def _glue(config: ConfigDict, split: str) -> GlueRows:
    task = choose(config, "data.task", {name: name for name in GLUE})
    name = TRAIN if split == "train" else GLUE[task].validation[0]
    return GlueRows(glue_file(_directory(config, "the folder of one of GLUE's tasks"), name), task)


def _documents(config: ConfigDict, split: str) -> Documents | Subset:
    """Of a folder without files of validation one document in so many is held out."""
    folder = _directory(config, "the folder of train.jsonl or train.parquet (document, summary)")
    files = {name: document_files(folder, name) for name in ("train", "validation")}
    if not files["train"]:
        raise UserError(f"{folder} (config.data.directory): no train.jsonl, train.parquet or train.source there")
    if files["validation"]:
        return Documents(files[split])
    return Subset(Documents(files["train"]), split == "validation", config.data.validation_every)


def _questions(config: ConfigDict, split: str) -> Subset:
    data = config.data
    for field in ("questions", "annotations", "images"):
        if not data[field]:
            raise UserError(f"config.data.{field} is empty; set it for the files that VQA v2 has")
    files = (Path(data[field]) for field in ("questions", "annotations", "images"))
    questions = Questions(*files, data.image_name, data.max_unusable)
    return Subset(questions, split == "validation", data.validation_every)


def _directory(config: ConfigDict, what: str) -> str:
    if not config.data.directory:
        raise UserError(f"config.data.directory is empty; set it to {what}")
    return config.data.directory


def _folder_cache_key(config: ConfigDict, source: Subset) -> dict[str, Any]:
    return {"validation_every": config.data.validation_every, "pictures": source.source.fingerprint()}


def _records_cache_key(config: ConfigDict, source: RecordPairs | Mixture) -> dict[str, Any]:
    return {"split": config.data.split}


SOURCES = {
    "shapes": SourceKind(shapes.pairs, shapes.texts, drawn=True, text_questions=shapes.text_questions),
    "shapes_texts": SourceKind(
        shapes.texts, shapes.texts, has_images=False, drawn=True, text_questions=shapes.text_questions
    ),
    "folder": SourceKind(
        _folder, lambda config, split: CaptionTexts(_folder(config, split)), cache_key=_folder_cache_key
    ),
    "tfds": SourceKind(
        _records, lambda config, split: CaptionTexts(_records(config, split)), cache_key=_records_cache_key
    ),
    "glue": SourceKind(_glue, _glue, has_images=False),
    "documents": SourceKind(_documents, _documents, has_images=False),
    "questions": SourceKind(_questions, lambda config, split: QuestionTexts(_questions(config, split))),
}
"""What `config.data.source` can be; also what `config.data.replay` can be beside a file."""


def source_kind(config: ConfigDict) -> SourceKind:
    """The kind of `config.data.source`. Raises UserError for an unknown one."""
    if config.data.source not in SOURCES:
        raise UserError(f"config.data.source is {config.data.source!r}; it is one of {', '.join(SOURCES)}")
    return SOURCES[config.data.source]


def make_source(config: ConfigDict, split: str) -> Any:
    """The records of `config.data` for "train" or "validation".

    For "train" so many of them as `config.data.examples` says.

    Raises:
      UserError: an unknown source, or a folder that cannot be used; fewer records than that.
    """
    source, few = source_kind(config).make(config, split), config.data.examples
    return FewShot(source, few, config.seed) if few and split == "train" else source


def make_text_source(config: ConfigDict, split: str) -> Any:
    """Texts without pictures: `config.data.replay`, or those that go with the run's own source."""
    replay = config.data.replay
    if replay in ("", "captions"):
        return source_kind(config).texts(config, split)
    if replay in SOURCES:
        return SOURCES[replay].texts(config, split)
    return Subset(TextLines(replay), split == "validation", config.data.validation_every)


def train_sources(config: ConfigDict, task: Task) -> tuple[Any, Any]:
    """The records that training reads: pairs (or texts), and the texts mixed in beside them, None where there are none.

    Raises:
      UserError: as `make_source`; a task for pictures and a source without.
    """
    if task.needs_images and not source_kind(config).has_images:
        sources = " or ".join(name for name, kind in SOURCES.items() if kind.has_images)
        raise UserError(f"config.data.source is {config.data.source!r}, which has no pictures; set it to {sources}")
    return make_source(config, "train"), make_text_source(config, "train") if task.mixes_replay else None


def cache_key(config: ConfigDict, task: Task, inputs: Hashes, source: Any) -> dict[str, Any]:
    """What the teacher's outputs for the records of `source` depend on, as JSON values.

    Args:
      inputs: `identity.hash_inputs` of this config.

    Raises:
      UserError: a config whose pictures have nothing that could be computed once.
    """
    kind, data = source_kind(config), config.data
    if task.teacher is None:
        raise UserError(f"config.objective is {config.objective!r}, which has no frozen teacher; a cache is for vlkd")
    if kind.cache_key is None:
        sources = " or ".join(name for name, kind in SOURCES.items() if kind.cache_key)
        raise UserError(f"config.data.source is {data.source!r}, whose records never end; a cache is for {sources}")
    if data.smallest_crop < 1 or data.flip:
        raise UserError(
            "config.data.smallest_crop and config.data.flip change pictures at random; a cache needs 1, False"
        )
    key = {
        "clip": inputs["clip"],
        "preprocessing": dataclasses.asdict(task.teacher.config.preprocessing),
        "image_tokens": config.student.image_tokens,
        "dtype": config.dtype,
        "truncate": data.truncate,
        "source": data.source,
        "records": len(source),
        "files": [list(inputs.get(f"data.{field}", {}).values()) for field in ("captions", "directory")],
        **kind.cache_key(config, source),
    }
    return json.loads(json.dumps(key))


def train_stream(
    config: ConfigDict,
    task: Task,
    start: int,
    unusable: UnusableRecords | None = None,
    sources: tuple[Any, Any] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless training batches from step `start` on, with `replay` in them where the config mixes texts in.

    `unusable` counts the records that are passed over; default: a count of its own. `sources` are those of
    `train_sources` where they have been read already. `share`: (index, count) of this process's part of every batch.
    """
    pairs, replay = train_sources(config, task) if sources is None else sources
    unusable = UnusableRecords(config.data.max_unusable) if unusable is None else unusable
    options = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "start": start,
        # the built-in world's order is random already, and its twins stay together
        "shuffle": not source_kind(config).drawn,
        "share": share,
        "threads": config.data.threads,
        "workers": config.data.workers,
        "unusable": unusable,
    }
    encode = task.encoder
    if encode.preprocessing:
        encode = dataclasses.replace(encode, smallest_crop=config.data.smallest_crop, flip=config.data.flip)
    stream = batches(pairs, encode, **options)
    if replay is None:
        return stream
    # of one seed with the pairs, the captions of a folder would come in the pairs' order with the pairs' corruption
    options |= {"seed": derived_seed(config.seed, "replay"), "shuffle": True}
    texts = batches(replay, task.replay_encoder, **options)
    return (pair.replace(replay=text.replace(index=None)) for pair, text in zip(stream, texts, strict=True))


def text_lengths(config: ConfigDict, task: Task, sources: tuple[Any, Any]) -> list[str]:
    """A line for each of the user's own `train_sources`: how many records, how long their texts are in tokens.

    Looks at `LENGTHS_OF` records, evenly spread, at most. The built-in world's are left out: they fit.

    Raises:
      UserError: more records than `config.data.max_unusable` allows cannot be used, texts that are too long among them.
    """
    names, encoders = ("pairs", "replayed texts"), (task.encoder, task.replay_encoder)
    return [
        _told_lengths(config, name, source, encode)
        for name, source, encode in zip(names, sources, encoders, strict=True)
        if source is not None and len(source) < shapes.WORLD_SIZE
    ]


def _told_lengths(config: ConfigDict, name: str, source, encode: Encode) -> str:
    faults, lengths, rng = [], [], np.random.default_rng(0)
    encode = dataclasses.replace(encode, preprocessing=None)  # pictures are not decoded for this
    chosen = range(0, len(source), -(-len(source) // LENGTHS_OF))
    for index in chosen:
        try:
            record = source[index]
            lengths.append(encode.lengths(record))
            encode(record, rng)
        except RecordError as e:
            faults.append(e)
    raise_if_too_many(faults, len(chosen), config.data.max_unusable)
    parts = [f"{len(source):,} {name} to train on"]
    parts += [f"{len(chosen):,} of them looked at"] if len(chosen) < len(source) else []
    for vocabulary, limit in encode.limits().items() if lengths else ():
        tokens = np.array([row[vocabulary] for row in lengths])
        middle, most = np.percentile(tokens, (50, 99), method="closest_observation")
        told = f"median {middle}, 99% up to {most}, longest {tokens.max()}, room for {limit}"
        parts.append(f"{vocabulary} tokens: {told}")
    if faults:
        parts.append(f"passed over: {counted(Counter(e.reason for e in faults))}")
    return "; ".join(parts)


def derived_seed(seed: int, purpose: str) -> int:
    """A seed that has nothing to do with `seed` itself but is the same for the same `purpose`."""
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0])


def held_out(config: ConfigDict, task: Task, texts: bool = False) -> list[Batch]:
    """The first `config.eval.batches` batches of the held-out pairs (or texts): the same ones at every evaluation."""
    source = (make_text_source if texts else make_source)(config, "validation")
    encode = task.replay_encoder if texts else task.encoder
    size = min(config.batch_size, len(source))
    unusable = UnusableRecords(config.data.max_unusable)
    stream = batches(source, encode, batch_size=size, seed=0, shuffle=False, threads=1, unusable=unusable)
    return [next(stream).replace(index=None) for _ in range(config.eval.batches)]
