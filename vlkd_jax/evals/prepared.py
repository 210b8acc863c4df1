"""A suite's pictures and texts: from its official files, and from the record files that vlkd prepare-suite makes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

from vlkd_jax.data.builder import MANIFEST
from vlkd_jax.data.files import read_json
from vlkd_jax.data.images import open_image
from vlkd_jax.data.records import RecordPairs
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals.captioned import CaptionedImage, read_captioned
from vlkd_jax.evals.files import NONE, place
from vlkd_jax.evals.vqa_questions import read_asked
from vlkd_jax.manifest import file_sha256


def told_pictures(suite: ConfigDict) -> tuple[dict[str, dict[str, Any]], dict[str, str], Path]:
    """{name of a picture: its id, domain, captions, questions}, the sha256 of the files, the folder of the pictures.

    Raises:
      UserError: see `read_captioned` and `read_asked`.
    """
    pictures: dict[str, dict[str, Any]] = {}
    if suite.kind == "vqa":
        for entry in sorted(read_asked(suite), key=lambda entry: entry["image"]):
            empty = {"id": None, "domain": "", "captions": [], "questions": []}
            pictures.setdefault(entry["image"], empty)["questions"].append(entry)
    else:
        for image in read_captioned(suite):
            told = {"id": image.id, "domain": image.domain, "captions": image.captions, "questions": []}
            pictures[image.name] = told
    fields = [field for field in ("questions", "annotations", "captions") if suite.get(field, NONE) != NONE]
    return pictures, {field: file_sha256(place(suite, field)) for field in fields}, place(suite, "images")


class PreparedSuite:
    """The record files of a suite.

    Raises:
      UserError: none there, or those of another suite or split.
      RecordError (on reading): a damaged record.
    """

    def __init__(self, suite: ConfigDict):
        self.path = place(suite, "records")
        if not (self.path / MANIFEST).is_file():
            raise UserError(
                f"{self.path}: no {MANIFEST} in it; config.{suite.name}.records takes an --output of vlkd prepare-suite"
            )
        options = read_json(self.path / MANIFEST).get("options", {})
        self._check(suite, options)
        self.pairs = RecordPairs(self.path, options["split"])
        self.rows = [self._row(index) for index in range(len(self.pairs))]

    def _check(self, suite: ConfigDict, options: dict[str, Any]) -> None:
        base = options.get("suite")
        if base is None:
            raise UserError(f"{self.path}: made by vlkd prepare, not by vlkd prepare-suite; it is no evaluation set")
        if base != suite.name:
            raise UserError(f"{self.path}: made of suite {base}, and this is {suite.name}; give the suite's own")

    def _row(self, index: int) -> dict[str, Any]:
        fields = self.pairs.fields(index)
        try:
            texts = {name: [text.decode() for text in fields[name]] for name in ("captions", "questions")}
            name, domain = fields["key"].decode(), fields["domain"].decode()
            picture_id, questions = json.loads(fields["id"]), [json.loads(text) for text in texts["questions"]]
        except (KeyError, ValueError, AttributeError) as error:
            raise RecordError("record damaged", f"{self.path} record {index}: {error}; copy the file again") from error
        row = {"name": name, "id": picture_id, "domain": domain, "captions": texts["captions"]}
        return row | {"questions": questions}

    def picture(self, index: int) -> Image.Image:
        """Raises RecordError as `images.open_image`."""
        return open_image(self.pairs[index].image)


def captioned(suite: ConfigDict) -> list[tuple[CaptionedImage, Callable[[], Image.Image]]]:
    """The pictures of a suite of captions, each with what opens it. Raises UserError: see `read_captioned`."""
    if suite.records == NONE:
        images = read_captioned(suite)
        return [(image, functools.partial(open_image, place(suite, "images") / image.name)) for image in images]
    prepared = PreparedSuite(suite)
    return [
        (CaptionedImage(row["name"], row["id"], row["captions"], row["domain"]), functools.partial(prepared.picture, k))
        for k, row in enumerate(prepared.rows)
    ]


def asked(suite: ConfigDict) -> list[tuple[dict[str, Any], Callable[[], Image.Image]]]:
    """The questions of a suite, those of a picture behind one another, each with what opens its picture.

    An entry has `id`, `question`, `image`, `answers` and, where they are known, the types of question and answer.

    Raises:
      UserError: see `read_asked`.
    """
    if suite.records == NONE:
        entries = sorted(read_asked(suite), key=lambda entry: entry["image"])
        folder = place(suite, "images")
        return [(entry, functools.partial(open_image, folder / entry["image"])) for entry in entries]
    prepared = PreparedSuite(suite)
    return [
        (entry, functools.partial(prepared.picture, k))
        for k, row in enumerate(prepared.rows)
        for entry in row["questions"]
    ]


def picture_named(suite: ConfigDict, name: str) -> Image.Image:
    """The picture of an item. Raises RecordError as `images.open_image`, and where there is none of that name."""
    if suite.get("records", NONE) == NONE:
        return open_image(place(suite, "images") / name)
    prepared = _opened(suite.name, suite.split, suite.root, suite.records)
    numbers = [k for k, row in enumerate(prepared.rows) if row["name"] == name]
    if not numbers:
        raise RecordError("image not found", f"{prepared.path}: no picture {name}")
    return prepared.picture(numbers[0])


@functools.lru_cache(maxsize=2)
def _opened(name: str, split: str, root: str, records: str) -> PreparedSuite:
    return PreparedSuite(ConfigDict({"name": name, "split": split, "root": root, "records": records}))
