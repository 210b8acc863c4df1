"""Pixels for CLIP: decode, resize, centre crop, as the model says. One path for training and use."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlkd_jax.errors import RecordError
from vlkd_jax.models.preprocessing import Preprocessing

MAX_PIXELS = 64_000_000
"""Pictures with more pixels than this are refused before they are decoded."""
MAX_ASPECT = 20
"""Of longer strips only the middle is used: enlarged whole, 1 x 20,000 pixels would take gigabytes."""

ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
"""The last bytes of a whole file, by Pillow's name of its format."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # its remarks on odd files: what matters is raised below


def open_image(source: str | Path | bytes) -> Image.Image:
    """Reads a picture as RGB, turned upright as its EXIF orientation says; transparency lies on white.

    Raises:
      RecordError: the file is missing, is no picture, is damaged, or holds more than `MAX_PIXELS` pixels.
    """
    image = check_header(source)
    try:
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except Exception as e:  # Pillow's decoders raise nearly anything for damaged data
        raise _damaged(source, e) from e


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, decoded; transparency lies on white."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    elif image.mode.startswith("I") or image.mode == "F":  # 16-bit and deeper: Pillow's own conversion clips
        deep = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        image = Image.fromarray((deep / max(deep.max(), 65535 if deep.max() > 255 else 255) * 255).astype(np.uint8))
    return image.convert("RGB")


def _damaged(source: str | Path | bytes, error: Exception) -> RecordError:
    reason = str(error) or type(error).__name__
    message = f"{_name(source)}: the image does not decode ({reason}); replace the file or drop its line"
    return RecordError("image does not decode", message)


def _name(source: str | Path | bytes) -> str:
    return "the picture" if isinstance(source, bytes) else str(source)


def check_header(source: str | Path | bytes) -> Image.Image:
    """Opens a picture without decoding it.

    Raises:
      RecordError: missing, not a picture, or too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as e:
        message = f"{source}: image file not found; correct the path or drop its line"
        raise RecordError("image not found", message) from e
    except Image.DecompressionBombError as e:  # Pillow's own limit, above ours
        raise _too_large(source, "more pixels than Pillow opens") from e
    except Exception as e:  # as above
        raise _damaged(source, e) from e
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(source, f"{image.width}x{image.height} pixels")
    return image


def _too_large(source: str | Path | bytes, size: str) -> RecordError:
    message = f"{_name(source)}: {size}, more than {MAX_PIXELS}; make the picture smaller"
    return RecordError("image too large", message)


def check_picture(path: str | Path) -> None:
    """Sees that a file is a picture and has its end, without decoding it where its last bytes tell.

    Downloads that broke off keep their header: what lacks its format's last bytes, or is of a format that has none, is
    decoded to see.

    Raises:
      RecordError: as `open_image`.
    """
    with check_header(path) as image:
        ending = ENDINGS.get(image.format or "")
    with open(path, "rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(file.tell() - 16, 0))
        tail = file.read()
    if ending is None or not tail.endswith(ending):
        open_image(path)


def resize_and_crop(image: Image.Image | np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """An RGB picture (uint8, if it is an array) resized and cropped: uint8 [size, size, 3], not normalised yet.

    Source: transformers' `CLIPImageProcessorPil`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    size, resize = preprocessing.size, preprocessing.resize
    if isinstance(resize, int):
        short = min(image.size)
        longest = short * max(MAX_ASPECT, math.ceil(size / resize))
        image = _middle(image, min(image.width, longest), min(image.height, longest))
        width, height = image.size
        resize = (resize, int(resize * width / height)) if height < width else (int(resize * height / width), resize)
    if resize is not None:
        image = image.resize(resize[::-1], Image.Resampling(preprocessing.resample))
    return np.asarray(_middle(image, size, size))


def random_resized_crop(
    image: Image.Image | np.ndarray, preprocessing: Preprocessing, rng: np.random.Generator, smallest: float
) -> np.ndarray:
    """A random part of an RGB picture, resized to the model's square: uint8 [size, size, 3], not normalised yet.

    The part holds `smallest` to 1 of the picture's area, its sides are as 3:4 to 4:3; where ten draws do not fit, it is
    the largest of such a shape in the middle. Source: torchvision's `RandomResizedCrop`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    left, top, width, height = _random_box(*image.size, rng, smallest)
    size = preprocessing.size
    part = image.resize((size, size), Image.Resampling(preprocessing.resample), (left, top, left + width, top + height))
    return np.asarray(part)


def _random_box(width: int, height: int, rng: np.random.Generator, smallest: float) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
