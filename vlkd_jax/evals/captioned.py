"""Pictures and their captions, from every form of file that suites read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlkd_jax.data.files import image_files, read_json
from vlkd_jax.data.sources import FolderPairs, raise_if_too_many
from vlkd_jax.errors import RecordError, UserError, few
from vlkd_jax.evals.files import NONE, check_pictures, check_places, place

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


@dataclasses.dataclass
class CaptionedImage:
    """A picture with its captions.

    Attributes:
      name: its path below the suite's folder of pictures.
      id: what the benchmark calls it; where it has no other, its name.
      captions: all of the file.
      domain: of nocaps, such as in-domain.
    """

    name: str
    id: Any
    captions: list[str]
    domain: str = ""


def read_captioned(suite: ConfigDict) -> list[CaptionedImage]:
    """What `suite.captions` names: Karpathy's splits (of these `suite.split`, several with + between), COCO captions
    JSON, JSONL, TSV, or `none` for every picture of the folder. Pictures are looked at, not decoded.

    Raises:
      UserError: see `FolderPairs`; a file or folder that is not there or holds nothing; more entries than
        `suite.max_unusable` allows that cannot be used.
    """
    check_places(suite, "captions", "images")
    if suite.captions == NONE:
        return _folder_images(suite)
    path = place(suite, "captions")
    data = read_json(path) if path.suffix == ".json" else {}
    if _is_karpathy(data):
        images = _karpathy_images(path, data, suite.split, f"config.{suite.name}.split")
        check_pictures(suite, [image.name for image in images], path)
        return images
    images = _coco_images(path, data) if path.suffix == ".json" else {}
    if not images or data.get("annotations"):
        _add_captions(suite, path, images)
    check_pictures(suite, [image.name for image in images.values() if not image.captions], path)
    return list(images.values())


def read_references(path: Path, data: Any, split: str) -> dict[Any, CaptionedImage]:
    """{image id: its captions and domain} of a file's value, COCO's form or Karpathy's, without any pictures.

    Raises:
      UserError: another form; an entry that cannot be used; a caption of an image that is not there.
    """
    if _is_karpathy(data):
        return {image.id: image for image in _karpathy_images(path, data, split, "--split")}
    if not isinstance(data, dict) or not isinstance(data.get("annotations"), list):
        raise UserError(f"{path}: no list 'annotations'; give COCO's captions, nocaps' or Karpathy's splits")
    images = {image.id: image for image in _coco_images(path, data).values()} if data.get("images") else None
    references = images or {}
    for number, entry in enumerate(data["annotations"]):
        fields = (entry.get("image_id"), entry.get("caption")) if isinstance(entry, dict) else (None, None)
        if not isinstance(fields[0], (int, str)) or not isinstance(fields[1], str):
            raise UserError(f"{path}: annotations[{number}] is no image_id with a caption; give a captions file")
        if images is not None and fields[0] not in images:
            raise UserError(f"{path}: annotations[{number}]: image {fields[0]} is not among images; correct the entry")
        references.setdefault(fields[0], CaptionedImage("", fields[0], [])).captions.append(fields[1])
    return references


def _folder_images(suite: ConfigDict) -> list[CaptionedImage]:
    folder = place(suite, "images")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not names:
        raise UserError(f"{folder}: no pictures there; correct config.{suite.name}.images")
    check_pictures(suite, names, folder)
    return [CaptionedImage(name, name, []) for name in names]


def _is_karpathy(data: Any) -> bool:
    images = data.get("images") if isinstance(data, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def _karpathy_images(path: Path, data: dict[str, Any], split: str, field: str) -> list[CaptionedImage]:
    chosen = split.split("+")
    try:
        there = sorted({str(image["split"]) for image in data["images"]})
        images = [_karpathy_image(path, image) for image in data["images"] if image["split"] in chosen]
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not a file of Karpathy's splits ({type(e).__name__}: {e}); each of its images has split, "
            "filename and sentences, each of these raw"
        ) from e
    unknown = [name for name in chosen if name not in there]
    if unknown:
        raise UserError(f"{path}: no images of split {unknown[0]!r}; {field} is of {few(there)}")
    return images


def _karpathy_image(path: Path, image: dict[str, Any]) -> CaptionedImage:
    parts = [image["filepath"], image["filename"]] if image.get("filepath") else [image["filename"]]
    captions = [sentence["raw"] for sentence in image["sentences"]]
    wrong = [text for text in [*parts, *captions] if not isinstance(text, str) or not text.strip()]
    name = "/".join(map(str, parts))
    if wrong:
        raise UserError(f"{path}: image {name}: {wrong[0]!r} is no caption and no file name; correct the entry")
    return CaptionedImage(name, image.get("cocoid", image.get("imgid", name)), captions)


def _coco_images(path: Path, data: Any) -> dict[str, CaptionedImage]:
    try:
        ids = {name: image_id for image_id, name in image_files(path, data).items()}
        if not all(isinstance(name, str) for name in ids):
            raise TypeError("a file_name is not a text")
        domains = {image["file_name"]: str(image.get("domain", "")) for image in data["images"]}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: images are not a list of objects with id and file_name ({e}); correct it") from e
    return {name: CaptionedImage(name, image_id, [], domains[name]) for name, image_id in ids.items()}


def _add_captions(suite: ConfigDict, path: Path, images: dict[str, CaptionedImage]) -> None:
    pairs = FolderPairs(path, place(suite, "images"), max_unusable=1.0)  # the suite's own limit is the next line's
    raise_if_too_many([*pairs.faults.values()], len(pairs), suite.max_unusable, f"config.{suite.name}.max_unusable")
    for pair in pairs.pairs:
        if not isinstance(pair, RecordError) and isinstance(pair[1], str):
            image = images.setdefault(pair[1], CaptionedImage(pair[1], pair[1], []))
            image.captions += [pair[2]] if isinstance(pair[2], str) and pair[2].strip() else []
