"""Where records come from: the built-in world, a user's folder, a file of texts. Random access, so order is arithmetic.

A source has `__len__` and `__getitem__(index) -> Record`; a record is a function of its index alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from vlkd_jax.data import shapes
from vlkd_jax.data.images import check_header
from vlkd_jax.errors import UserError

WORLD_SIZE = 1 << 31
"""The built-in world draws scenes on the fly; this is only how many different indices it has."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One item before tokenisation.

    Attributes:
      text: the clean caption or text.
      image: uint8 [height, width, 3], the path of a picture, or None for a text alone.
      context: a text that the decoder reads beside the corrupted one, where an image would stand (text-only records).
      prompt: a start of `text` that is given: the corrupted text is it and one `<mask>`, and it carries no loss.
      name: what an error message calls this record.
    """

    text: str
    image: np.ndarray | Path | None = None
    context: str = ""
    prompt: str | None = None
    name: str = ""


class ShapesPairs:
    """Picture and caption of the built-in world. There is no question and no answer here."""

    def __init__(self, seed: int, split: str, twins: int = 1, complete: float = 0.0):
        self.seed, self.split, self.twins, self.complete = seed, split, twins, complete

    def __len__(self) -> int:
        return WORLD_SIZE

    def __getitem__(self, index: int) -> Record:
        scene = shapes.make_scene(self.seed, self.split, index, self.twins)
        text = shapes.caption(scene, shapes.generator(self.seed, self.split, index, 3), self.complete)
        return Record(text, shapes.render(scene), name=f"shapes {self.split} {index}")


class ShapesTexts:
    """Texts of the built-in world, never a picture: descriptions, and questions with answers about a description.

    One in twenty is a caption alone, three are captions beside a full description of the same scene, the rest questions
    with their answer beside a full description; what has to be read to answer is always in the context.
    """

    def __init__(self, seed: int, split: str):
        self.seed, self.split = seed, split

    def __len__(self) -> int:
        return WORLD_SIZE

    def __getitem__(self, index: int) -> Record:
        scene = shapes.make_scene(self.seed, self.split, index)
        rng = shapes.generator(self.seed, self.split, index, 4)
        name = f"shapes text {self.split} {index}"
        part = rng.random()
        if part < 0.05:
            return Record(shapes.caption(scene, rng), name=name)
        context = shapes.caption(scene, rng, complete=1.0)
        if part < 0.2:
            return Record(shapes.caption(scene, rng), context=context, name=name)
        question = None
        while question is None:
            question = shapes.ask(scene, shapes.QUESTION_TYPES[int(rng.integers(len(shapes.QUESTION_TYPES)))], rng)
        prompt = f"question: {question.question} answer:"
        return Record(f"{prompt} {question.answer}", context=context, prompt=prompt, name=name)


class TextLines:
    """A file with one text a line (blank lines are passed over), for text-only replay.

    Raises:
      UserError: the file is missing, is not UTF-8 or holds no text.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines = [line for line in _read_text(self.path).splitlines() if line.strip()]
        if not self.lines:
            raise UserError(f"{self.path}: no text in it; give a file with one text a line")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Record:
        return Record(self.lines[index], name=f"{self.path} text {index + 1}")


class FolderPairs:
    """Pictures of a folder and their captions: COCO captions JSON, JSONL (`image`, `caption`) or TSV.

    TSV lines are `image<TAB>caption`. Image paths are relative to `images`. Every line is checked at the start: its
    caption is not empty, its image is there and its header is that of a picture.

    Raises:
      UserError: naming the file, the line or entry, the field and the mend.
    """

    def __init__(self, captions: str | Path, images: str | Path):
        self.path, self.images = Path(captions), Path(images)
        readers = {".json": _coco_pairs, ".jsonl": _jsonl_pairs, ".tsv": _tsv_pairs}
        if self.path.suffix not in readers:
            raise UserError(f"{self.path}: data.captions must end in .json (COCO), .jsonl or .tsv")
        self.pairs = readers[self.path.suffix](self.path)
        if not self.pairs:
            raise UserError(f"{self.path}: no captions in it")
        for where, image, text in self.pairs:
            wrong = [name for name, value in (("image", image), ("caption", text)) if not isinstance(value, str)]
            if wrong:
                raise UserError(f"{self.path} {where}: field {wrong[0]} is not a text; correct the entry")
            if not text.strip():
                raise UserError(f"{self.path} {where}: field caption is empty; write a caption or drop the line")
            path = self.images / image
            if not path.is_file():
                raise UserError(f"{self.path} {where}: image {path} not found; correct data.images or the line")
        for image, where in {image: where for where, image, _ in reversed(self.pairs)}.items():
            try:
                check_header(self.images / image).close()
            except UserError as e:
                raise UserError(f"{self.path} {where}: field image: {e}") from e

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        where, image, text = self.pairs[index]
        return Record(" ".join(text.split()), self.images / image, name=f"{self.path} {where}")


class Subset:
    """Every `every`-th item of a source for validation (`held_out`), or the rest for training.

    Raises:
      UserError: there is none.
    """

    def __init__(self, source, held_out: bool, every: int = 20):
        keep = [i for i in range(len(source)) if (i % every == 0) == held_out]
        if not keep:
            name = getattr(source, "path", "the data")
            raise UserError(f"{name}: {len(source)} item(s) leave none to train on beside the held-out ones; add some")
        self.source, self.indices = source, keep

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); correct the path") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from e


def read_json(path: str | Path):
    """A JSON file's value.

    Raises:
      UserError: missing, not UTF-8, not JSON.
    """
    path = Path(path)
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path} line {e.lineno}: not JSON ({e.msg}); correct the file") from e


def _coco_pairs(path: Path) -> list[tuple[str, str, str]]:
    data = read_json(path)
    try:
        files = {image["id"]: image["file_name"] for image in data["images"]}
        rows = [
            (f"annotation {a.get('id', k)}", a["image_id"], a["caption"]) for k, a in enumerate(data["annotations"])
        ]
        unknown = [where for where, image, _ in rows if image not in files]
    except KeyError as e:
        raise UserError(f"{path}: field {e} is missing; a COCO captions file has images and annotations") from e
    except (TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a COCO captions file ({e}); it has lists of images and of annotations") from e
    if unknown:
        raise UserError(f"{path} {unknown[0]}: its image_id is not among images; correct the entry")
    return [(where, files[image], text) for where, image, text in rows]


def _jsonl_pairs(path: Path) -> list[tuple[str, str, str]]:
    pairs = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((f"line {number}", row["image"], row["caption"]))
        except json.JSONDecodeError as e:
            raise UserError(f"{path} line {number}: not JSON ({e.msg}); correct the line") from e
        except KeyError as e:
            raise UserError(f"{path} line {number}: field {e} is missing; a line has image and caption") from e
        except TypeError as e:
            raise UserError(f'{path} line {number}: not an object; a line is {{"image": ..., "caption": ...}}') from e
    return pairs


def _tsv_pairs(path: Path) -> list[tuple[str, str, str]]:
    pairs = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        row = line.rstrip("\r").split("\t")
        if line.strip() and len(row) != 2:
            raise UserError(f"{path} line {number}: {len(row)} fields, not 2; a line is image<TAB>caption")
        if line.strip():
            pairs.append((f"line {number}", row[0], row[1]))
    return pairs


class CaptionTexts:
    """The captions of pairs, without their pictures: a text-only source."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Record:
        return dataclasses.replace(self.pairs[index], image=None)
