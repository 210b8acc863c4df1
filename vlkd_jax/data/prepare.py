"""Pairs as users have them into record files that training reads: `vlkd prepare SOURCE --output=DIR`.

How the files come about, and that a run that was cut off goes on, is builder.py's.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from vlkd_jax.commands import COMMANDS
from vlkd_jax.console import aside
from vlkd_jax.data.builder import Written, build
from vlkd_jax.data.images import MAX_ASPECT, check_header, open_image
from vlkd_jax.data.inputs import Columns, Part, Sample, parts, read
from vlkd_jax.errors import RecordError, UserError

MAX_CAPTION = 4096
"""Characters of a caption that is kept; the longest of CC3M has some 200."""
VERSION = 1
ORIENTATION = 0x0112
"""EXIF's tag."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides what the records are.

    Attributes:
      name, split: of the data set.
      short: pixels of a picture's shorter side at most; a smaller picture stays as it is.
      quality: of JPEG.
      rows: pairs of a table in one record file; a tar shard is one file.
    """

    name: str = "pairs"
    split: str = "train"
    short: int = 288
    quality: int = 90
    rows: int = 10_000


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures with a caption each, a `builder.Kind`."""

    source: Path
    columns: Columns
    options: Options

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def split(self) -> str:
        return self.options.split

    def features(self) -> Any:
        """The fields of a record."""
        import tensorflow_datasets as tfds

        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "caption": tfds.features.Text(),
                "key": tfds.features.Text(),
            }
        )

    def samples(self, part: Part) -> Iterator[Sample | RecordError]:
        """The pairs of a part, and in the place of what is none, why."""
        return read(part, self.columns)

    def record(self, sample: Sample) -> Written:
        """The picture made smaller, the caption on one line. Raises RecordError where that cannot be."""
        caption, image = caption_of(sample), read_picture(sample.image, sample.key)
        small = shrink(image, self.options.short, self.options.quality)
        return Written({"image": io.BytesIO(small), "caption": caption, "key": sample.key}, image, small, caption)

    def described(self) -> dict[str, Any]:
        """What the records depend on."""
        files = sorted(p for p in self.source.iterdir() if p.is_file()) if self.source.is_dir() else [self.source]
        try:
            sizes = {path.name: path.stat().st_size for path in files}
        except OSError as error:
            raise UserError(f"{self.source}: cannot be read ({error.strerror}); correct the path") from error
        return {
            "version": VERSION,
            "source": {"path": str(self.source.absolute()), "files": sizes},
            "columns": dataclasses.asdict(self.columns),
            "options": dataclasses.asdict(self.options),
        }


def shrink(image: bytes, short: int, quality: int) -> bytes:
    """A picture as JPEG, RGB, upright, its shorter side `short` pixels at most.

    A JPEG that is all this already keeps its bytes. Of longer strips than `MAX_ASPECT` to one the middle is kept.

    Raises:
      RecordError: as `images.open_image`.
    """
    header, picture = check_header(image), open_image(image)
    width, height = picture.size
    is_plain = header.format == "JPEG" and header.mode == "RGB" and header.getexif().get(ORIENTATION, 1) == 1
    if is_plain and min(width, height) <= short and max(width, height) <= MAX_ASPECT * min(width, height):
        return image
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        picture = picture.crop((left, top, left + min(width, longest), top + min(height, longest)))
        width, height = picture.size
    if min(width, height) > short:
        scale = short / min(width, height)
        size = max(short, round(width * scale)), max(short, round(height * scale))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else -1)
    return buffer.getvalue()


def caption_of(sample: Sample) -> str:
    """The caption on one line, without control characters.

    Raises:
      RecordError: nothing is left, or more than `MAX_CAPTION` characters.
    """
    text = sample.caption.encode("utf-8", "replace").decode()  # half an emoji is no UTF-8
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text:
        raise RecordError("caption empty", f"{sample.key}: its caption is empty")
    if len(text) > MAX_CAPTION:
        raise RecordError("caption too long", f"{sample.key}: {len(text)} characters, more than {MAX_CAPTION}")
    return text


def read_picture(image: bytes | Path, key: str) -> bytes:
    """A picture's bytes. Raises RecordError for a file that cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise RecordError("image not found", f"{key}: {image} cannot be read ({error.strerror})") from error


def prepare(
    source: Path,
    output: Path,
    columns: Columns,
    options: Options,
    workers: int = 2,
    max_unusable: float = 0.5,
    beam: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Makes the data set of a source; see `builder.build`. Raises UserError as that does, and for bad `columns`."""
    columns.check()
    kind = Pairs(source, columns, options)
    return build(kind, lambda: parts(source, columns, options.rows), output, workers, max_unusable, beam)


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    columns = Columns(values.image, values.caption, values.images, values.names)
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(values, name) for name in names})
    output = Path(values.output)
    beam = None if values.beam is None else shlex.split(values.beam)
    source = Path(values.source)
    with aside(values.json):
        manifest = prepare(source, output, columns, options, values.workers, values.max_unusable, beam)
    if values.json:
        print(json.dumps(manifest))
        return
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in manifest["skipped"].items()) or "none"
    print(f"{output}: {manifest['out']:,} of {manifest['in']:,} pairs ({manifest['coverage']:.1%}); skipped: {skipped}")


if __name__ == "__main__":
    from vlkd_jax import entry

    entry.run(main, COMMANDS["prepare"])
