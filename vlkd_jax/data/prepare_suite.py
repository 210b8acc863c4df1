"""Evaluation sets from their official files into record files: `vlkd prepare-suite --config=suites:NAME --output=DIR`.

A record is a picture, as it is in its file, with all its captions or questions. `config.NAME.records=DIR` evaluates
from it to the same items, and `vlkd leakage --eval=DIR` compares it with what a training set holds.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import aside
from vlkd_jax.data.builder import Written, build
from vlkd_jax.data.images import open_image
from vlkd_jax.data.inputs import Part
from vlkd_jax.data.prepare import read_picture
from vlkd_jax.errors import UserError

KINDS = ("caption", "retrieval", "vqa")
"""Of suites that have pictures with texts."""
ROWS = 1000
"""Pictures in one record file."""
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture's file with what is asked or said of it: JSON values of `id`, `domain`, `captions`, `questions`."""

    key: str
    file: Path
    told: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of a suite, a `builder.Kind`.

    Attributes:
      source: where the suite's files lie.
      files: sha256 of each of the suite's files by its field.
    """

    source: Path
    suite: str
    split: str
    images: Path
    files: dict[str, str]

    @property
    def name(self) -> str:
        return re.sub(r"\W", "_", self.suite)

    def features(self) -> Any:
        """The fields of a record."""
        import tensorflow_datasets as tfds

        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        fields = {"image": tfds.features.Image(), "caption": text, "key": text, "id": text, "domain": text}
        return tfds.features.FeaturesDict({**fields, "captions": texts, "questions": texts})

    def samples(self, part: Part) -> Iterator[Picture]:
        """The pictures of a part."""
        for key, told, _ in part.rows:
            yield Picture(key, self.images / key, json.loads(told))

    def record(self, sample: Picture) -> Written:
        """The picture as it is in its file. Raises RecordError for one that cannot be used."""
        image, told = read_picture(sample.file, sample.key), sample.told
        open_image(image)
        questions = [json.dumps(question) for question in told["questions"]]
        first = [*told["captions"], *(question["question"] for question in told["questions"]), ""][0]
        fields = {"image": io.BytesIO(image), "caption": first, "key": sample.key, "id": json.dumps(told["id"])}
        fields |= {"domain": told["domain"], "captions": told["captions"], "questions": questions}
        return Written(fields, image, image, json.dumps(told, sort_keys=True))

    def described(self) -> dict[str, Any]:
        """What the records depend on."""
        source = {"path": str(self.source.absolute()), "files": self.files}
        return {"version": VERSION, "source": source, "options": {"suite": self.suite, "split": self.split}}


def prepare_suite(
    config: ConfigDict, output: Path, workers: int = 2, beam: Sequence[str] | None = None
) -> dict[str, Any]:
    """Makes the data set of a suite from its official files; returns its manifest.

    Args:
      config: of configs/suites.py with one suite.

    Raises:
      UserError: none or several suites, one without pictures and texts, files that cannot be used, more pictures than
        the suite's `max_unusable` allows that cannot be; see `builder.build`.
    """
    from vlkd_jax.evals.prepared import told_pictures

    if len(config.suites) != 1:
        raise UserError(f"--config names {len(config.suites)} suites; a directory holds one, such as suites:vqav2")
    suite = config[config.suites[0]]
    if suite.kind not in KINDS:
        raise UserError(f"suite {suite.name} is of kind {suite.kind}; record files hold {', '.join(KINDS)}")
    pictures, files, images = told_pictures(suite)
    split = re.sub(r"\W", "_", suite.split)
    rows = [(name, json.dumps(told), None) for name, told in pictures.items()]

    def parts() -> list[Part]:
        return [
            Part("suite", suite.name, first, 0, len(block), tuple(block))
            for first in range(0, len(rows), ROWS)
            if (block := rows[first : first + ROWS])
        ]

    kind = Pictures(Path(suite.root), suite.name, split, images, files)
    return build(kind, parts, output, workers, suite.max_unusable, beam)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    beam = None if values.beam is None else shlex.split(values.beam)
    with aside(values.json):
        manifest = prepare_suite(values.config, Path(values.output), values.workers, beam)
    if values.json:
        print(json.dumps(manifest))
        return
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in manifest["skipped"].items()) or "none"
    print(f"{values.output}: {manifest['out']:,} of {manifest['in']:,} pictures; skipped: {skipped}")
    name = manifest["options"]["suite"]
    print(f"evaluate with --config=suites:{name} --config.{name}.records={values.output}")


if __name__ == "__main__":
    from vlkd_jax import entry

    entry.run(main, COMMANDS["prepare-suite"])
