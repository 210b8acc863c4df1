"""Times well-kept JPEG decoders against Pillow's, alone and with the resizing: `python -m benchmarks.decoders`.

    python -m benchmarks.decoders [--images=DIR] [--count=512] [--rounds=5] [--output=FILE]

simplejpeg and opencv-python-headless have to be installed; what is not there is left out. Pictures are those of
benchmarks.pipeline, as they are (640 x 480) and as `vlkd prepare` keeps them (384 x 288). Scaled decoding takes the
smallest size that libjpeg-turbo has for a short side of 224: of 640 x 480 half, of 384 x 288 seven eighths. Beside the
times: how far the 224 x 224 pixels are from Pillow's, whose numbers are Hugging Face's processor's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import timing
from benchmarks.pipeline import squared, write_pictures
from vlkd_jax.data.prepare import Options, shrink

SIDE = 224
Decoder = Callable[[bytes], Image.Image | np.ndarray]


def pillow(data: bytes) -> Image.Image:
    """What `vlkd train` does."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def pillow_draft(data: bytes) -> Image.Image:
    """Scaled decoding as Pillow offers it: by 2, 4 or 8."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    image.load()
    return image


def decoders() -> dict[str, Decoder]:
    """Those that are installed, by name, Pillow's first."""
    available: dict[str, Decoder] = {"pillow": pillow, "pillow, scaled": pillow_draft}
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        available["simplejpeg"] = simplejpeg.decode_jpeg
        available["simplejpeg, scaled"] = lambda data: simplejpeg.decode_jpeg(data, min_height=SIDE, min_width=SIDE)
    if importlib.util.find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        available["opencv"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return available


def resized(image: Image.Image | np.ndarray) -> np.ndarray:
    """Pillow's bicubic resizing and the middle, of whatever decoder."""
    return np.asarray(squared(Image.fromarray(image) if isinstance(image, np.ndarray) else image))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; default: pictures made here")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            write_pictures(Path(folder), options.count)
        paths = sorted((options.images or Path(folder)).glob("*.jpg"))[: options.count]
        originals = [path.read_bytes() for path in paths]
    small = [shrink(data, Options().short, Options().quality) for data in originals]
    tables = {"as they are": table(originals, options.rounds), "as prepared": table(small, options.rounds)}
    packages = ("pillow", "simplejpeg", "opencv-python-headless")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if _is_there(name)},
        "pictures": len(originals),
        **tables,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def _is_there(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def table(pictures: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """Of each decoder its milliseconds a picture, how many times faster it is, and the distance of its pixels."""
    available = decoders()
    runs = {name: lambda decode=decode: [decode(data) for data in pictures] for name, decode in available.items()}
    whole = {
        name: lambda decode=decode: [resized(decode(data)) for data in pictures] for name, decode in available.items()
    }
    alone, together = timing.alternate(runs, rounds), timing.alternate(whole, rounds)
    first = pictures[:64]
    expected = [resized(pillow(data)).astype(int) for data in first]
    rows = {}
    for name, decode in available.items():
        gaps = [np.abs(resized(decode(data)) - pixels) for data, pixels in zip(first, expected, strict=True)]
        rows[name] = {
            "decoding_ms": 1000 * float(np.median(alone[name])) / len(pictures),
            "decoding_and_resizing_ms": 1000 * float(np.median(together[name])) / len(pictures),
            "times_faster_with_resizing": timing.ratio(together, "pillow", name),
            "mean_pixel_difference": float(np.mean(gaps)),
            "largest_pixel_difference": int(np.max(gaps)),
        }
    return rows


if __name__ == "__main__":
    main()
