"""What users give: pictures in any form, one or many, questions beside them, and decoding options by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlkd_jax.data.images import open_image, to_rgb
from vlkd_jax.decoding import Decoding
from vlkd_jax.errors import RecordError, UserError

Picture = str | Path | Image.Image | np.ndarray
"""A path, a PIL image, or uint8 [height, width, 3]."""
Pictures = Picture | Sequence[Picture]
"""One picture or several."""


def open_picture(picture: Picture) -> Image.Image | np.ndarray:
    """A picture as `resize_and_crop` takes it. Raises RecordError when it cannot be read, and for an URL."""
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
            told = f"an array {picture.dtype} {list(picture.shape)}"
            raise RecordError("malformed entry", f"{told} is no picture; give uint8 [height, width, 3]")
        return picture
    if isinstance(picture, str) and picture.lower().startswith(("http://", "https://")):
        raise RecordError("image not found", f"{picture}: URLs are opened where asked only: vlkd_jax.fetch(URL)")
    return open_image(picture)


def is_picture(images: Pictures) -> bool:
    """Whether this is one picture, not several."""
    return isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3)


def picture_list(images: Pictures) -> list[Picture]:
    """One picture as a list of one."""
    return [images] if is_picture(images) else list(images)


def paired(pictures: list[Picture], questions: list[str]) -> tuple[list[Picture], list[str]]:
    """As many pictures as questions. Raises UserError where there are several of both, and not as many."""
    if len(pictures) == 1:
        pictures = pictures * len(questions)
    elif len(questions) == 1:
        questions = questions * len(pictures)
    if len(pictures) != len(questions):
        raise UserError(
            f"{len(pictures)} pictures and {len(questions)} questions; give a question for each, or one of either"
        )
    return pictures, questions


def decoding_of(options: dict[str, Any]) -> Decoding:
    """Raises UserError for an option that there is not, that has no meaning, or that the method does not use."""
    known = [field.name for field in dataclasses.fields(Decoding)]
    unknown = [name for name in options if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"no decoding option {unknown[0]}; {meant}")
    decoding = Decoding(**options)
    decoding.check("decoding")
    unused = [name for name in options if name not in decoding.record()]
    if unused:
        raise UserError(f"decoding option {unused[0]} is not used by method={decoding.method!r}; say the method too")
    return decoding
