"""Where the files of a suite lie, and what becomes of its pictures that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlkd_jax.data.images import check_picture
from vlkd_jax.data.sources import raise_if_too_many
from vlkd_jax.errors import RecordError, UserError
from vlkd_jax.evals.suite import LEFT_OUT, MISS, Row

NONE = "none"
"""In the place of a file: there is none."""


def place(suite: ConfigDict, field: str) -> Path:
    """The path in `field`, its `{split}` filled in; below `suite.root` unless it is absolute."""
    return Path(suite.root) / suite[field].replace("{split}", suite.split)


def check_places(suite: ConfigDict, *fields: str) -> None:
    """Raises UserError naming all files and folders of these fields that are not there; `none` needs none."""
    places = {field: place(suite, field) for field in fields if suite[field] != NONE}
    absent = [f"{path} (config.{suite.name}.{field})" for field, path in places.items() if not path.exists()]
    if absent:
        raise UserError(
            f"not there: {', '.join(absent)}; --config.root=DIR tells the folder that a suite's files lie below, "
            f"and --config.{suite.name}.FIELD=PATH where one of them lies"
        )


def check_choice(suite: ConfigDict, field: str, choices: Iterable[str]) -> None:
    """Raises UserError when the field has none of these values."""
    if suite[field] not in choices:
        raise UserError(f"config.{suite.name}.{field} is {suite[field]!r}; it is one of {', '.join(choices)}")


def check_pictures(suite: ConfigDict, names: Iterable[str], file: Path | str) -> None:
    """Looks at each picture of the folder `suite.images` once, without decoding it.

    Raises:
      UserError: more of those that `file` names than `suite.max_unusable` allows are missing, cut off or no pictures;
        an unknown `suite.unusable`.
    """
    check_choice(suite, "unusable", (LEFT_OUT, MISS))
    names, faults = list(dict.fromkeys(names)), []
    for name in names:
        try:
            check_picture(place(suite, "images") / name)
        except RecordError as e:
            faults.append(RecordError(e.reason, f"{file}: {e}"))
    raise_if_too_many(faults, len(names), suite.max_unusable, f"config.{suite.name}.max_unusable")


def if_unusable(suite: ConfigDict) -> Row:
    """What an item's row says where its picture is to count as a miss if it cannot be used."""
    return {"unusable": MISS} if suite.unusable == MISS else {}


def filled(suite: ConfigDict, field: str, template: str, **values: Any) -> str:
    """The template with these values. Raises UserError naming the field when they do not fit."""
    try:
        return template.format(**values)
    except (LookupError, ValueError, TypeError, AttributeError) as e:
        given = ", ".join(f"{name} {value!r}" for name, value in values.items())
        holds = " and ".join(f"{{{name}}}" for name in values)
        raise UserError(
            f"config.{suite.name}.{field} {template!r} does not fit {given} ({e}); it can hold {holds}"
        ) from e
