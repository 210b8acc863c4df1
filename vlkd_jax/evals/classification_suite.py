"""The suite of zero-shot classification: ImageNet's validation pictures, or a user's own in a folder for each class."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlkd_jax import predict
from vlkd_jax.data.files import read_json, read_text
from vlkd_jax.data.images import open_image
from vlkd_jax.errors import UserError
from vlkd_jax.evals.captioned import PICTURES
from vlkd_jax.evals.files import NONE, check_choice, check_pictures, check_places, filled, if_unusable, place
from vlkd_jax.evals.statistics import interval
from vlkd_jax.evals.suite import Picture, Row, Suite, with_pictures
from vlkd_jax.vlkd import VLKD

METRICS = ("accuracy",)
TOP = 5


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a suite: their names, and the texts of each, as many for all."""

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture to classify; `row["label"]` is the number of its class."""

    row: Row
    classes: Classes
    open_image: Callable[[], Picture]


def classification_items(suite: ConfigDict) -> Iterator[Shown]:
    """Every picture of the folders in `suite.images`, one for each class, or of the one folder that `labels` tells of.

    Raises:
      UserError: files that are not there or cannot be used, a class without a name or a name without a class.
    """
    check_choice(suite, "metric", METRICS)
    check_places(suite, "images", "classes")
    pictures = _in_folders(suite) or _in_labels(suite)
    folders, names = _classes(suite, sorted({folder for _, folder in pictures}))
    number = {folder: k for k, folder in enumerate(folders)}
    unnamed = sorted({folder for _, folder in pictures} - number.keys())
    if unnamed:
        raise UserError(f"{place(suite, 'classes')}: class {unnamed[0]} has no name there; add its line")
    texts = tuple(tuple(filled(suite, "templates", text, name=name) for text in suite.templates) for name in names)
    classes = Classes(names, texts)
    check_pictures(suite, [name for name, _ in pictures], place(suite, "images"))
    for name, folder in pictures:
        row = {
            "task": "classification",
            "id": name,
            "image": name,
            "label": number[folder],
            "name": names[number[folder]],
        }
        opened = functools.partial(open_image, place(suite, "images") / name)
        yield Shown(row | if_unusable(suite), classes, opened)


def _in_folders(suite: ConfigDict) -> list[tuple[str, str]]:
    """(picture below the folder of pictures, its own folder)."""
    folder = place(suite, "images")
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in PICTURES)
    return [(str(path.relative_to(folder)), path.parent.name) for path in files]


def _in_labels(suite: ConfigDict) -> list[tuple[str, str]]:
    """(picture, class) by a CSV file with the columns ImageId and PredictionString, whose first word is the class."""
    check_places(suite, "labels")
    path, pictures = place(suite, "labels"), []
    for number, line in enumerate(csv.DictReader(read_text(path).splitlines()), 2):
        words = (line.get("PredictionString") or "").split()
        if not line.get("ImageId") or not words:
            raise UserError(f"{path} line {number}: no ImageId and PredictionString; correct the line")
        pictures.append((_file_name(suite, line["ImageId"]), words[0]))
    if not pictures:
        raise UserError(f"{path}: no pictures in it, and {place(suite, 'images')} has no folders of pictures")
    return sorted(pictures)


def _file_name(suite: ConfigDict, image_id: str) -> str:
    return filled(suite, "image_name", suite.image_name, image_id=image_id)


def _classes(suite: ConfigDict, folders: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(folders, names) of the classes, in the order of the file `suite.classes`."""
    if suite.classes == NONE:
        return tuple(folders), tuple(folder.replace("_", " ") for folder in folders)
    path = place(suite, "classes")
    data = read_json(path) if path.suffix == ".json" else _lines(path)
    if isinstance(data, list):
        if len(data) != len(folders):
            raise UserError(f"{path}: {len(data)} names for {len(folders)} folders; a list has one for each, in order")
        data = dict(zip(folders, data, strict=True))
    if not isinstance(data, dict) or not all(isinstance(name, str) and name.strip() for name in data.values()):
        raise UserError(
            f"{path}: config.{suite.name}.classes takes {{folder: name}} or a list of names, in JSON or lines"
        )
    return tuple(data), tuple(name.strip() for name in data.values())


def _lines(path: Path) -> dict[str, str]:
    """`n01440764 tench, Tinca tinca` a line: of several names the first."""
    pairs = [line.partition(" ") for line in read_text(path).split("\n") if line.strip()]
    return {folder: names.partition(",")[0] for folder, _, names in pairs}


def classify(model: VLKD, items: list[Shown], batch_size: int, tower: str) -> Iterator[Row]:
    """Rows with `rank`, that of the right class, and `best`, the names of the five nearest.

    Of classes that are equally near the first counts as nearer, as with argmax: ImageNet has names that occur twice.
    The embedding of a class is the mean of its texts' L2-normalised ones, normalised again (Radford et al. 2021).
    """
    embed = {"student": predict.embed_texts, "clip": predict.embed_texts_clip}[tower]
    classes, shown, faulty = items[0].classes, deque(), []
    texts = embed(model, [text for texts in classes.texts for text in texts], batch_size)
    means = texts.reshape(len(classes.names), -1, texts.shape[-1]).mean(1)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)

    def pictures() -> Iterator[Picture]:
        for item, picture in with_pictures(items, faulty):
            shown.append(item.row)
            yield picture

    for embeddings in predict.image_embeddings(model, pictures(), batch_size):
        for similarity in embeddings @ means.T:
            row = shown.popleft()
            order = np.argsort(-similarity, kind="stable").tolist()
            best = [classes.names[k] for k in order[:TOP]]
            yield row | {"rank": 1 + order.index(row["label"]), "best": best, "raw": best[0]}
    yield from faulty


def judge_class(row: Row) -> Row:
    """Whether the right class is the nearest; what has no rank is wrong."""
    return {"score": float(row.get("rank") == 1)}


def score_classes(rows: list[Row]) -> dict[str, Any]:
    """Top-1 and top-5 accuracy with intervals, and the mean over classes of top-1."""
    labels, metrics = np.array([row["label"] for row in rows]), {}
    for k in (1, TOP):
        hits = np.array([row.get("rank", np.inf) <= k for row in rows], float)
        metrics |= {f"top_{k}": float(hits.mean()), f"top_{k}_interval": interval(hits, range(len(hits)))}
    first = np.array([row["score"] for row in rows])
    per_class = [float(first[labels == label].mean()) for label in np.unique(labels)]
    return metrics | {"mean_per_class": float(np.mean(per_class)), "classes": len(per_class), "n": len(rows)}


SUITE = Suite(classification_items, judge_class, score_classes, predict=classify)
