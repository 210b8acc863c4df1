"""What a student is asked: prompts of questions and captions, and texts with masks in them, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vlkd_jax.data.text import BartText
from vlkd_jax.predict import Request
from vlkd_jax.use.given import Picture, open_picture


def prompts(
    text: BartText,
    templates: Mapping[str, str],
    pictures: Sequence[Picture],
    fields: Sequence[dict[str, str]],
    name: str,
) -> Iterator[Request]:
    """Prompts about pictures; what is one object several times in a row is opened once.

    Args:
      templates: `VLKD.prompts`.
      fields: what is filled into the template about each picture.
      name: question or caption.

    Raises:
      RecordError: a picture that cannot be read.
    """
    last, opened = None, None
    for number, (picture, values) in enumerate(zip(pictures, fields, strict=True)):
        if number == 0 or picture is not last:
            last, opened = picture, open_picture(picture)
        source, prefix = (
            text.encode_template(templates[f"{name}_{part}"], **values) for part in ("encoder", "decoder")
        )
        yield Request(source, prefix, opened, draw=number)


def with_masks(text: BartText, given: str) -> list[int]:
    """Ids of a text in which `<mask>` is the mask, which takes the space before it, and nothing else is special."""
    *parts, last = given.split("<mask>")
    fields = {f"part{number}": part.rstrip(" ") for number, part in enumerate(parts)}
    template = "".join(f"{{{name}}}<mask>" for name in fields) + "{last}"
    return text.encode_template(template, **fields, last=last)
