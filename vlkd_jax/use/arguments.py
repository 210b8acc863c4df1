"""What is given to a command that uses a student: pictures and texts, in whatever order, and how to decode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlkd_jax.errors import UserError
from vlkd_jax.evals.captioned import PICTURES

DECODING = ("method", "beams", "max_new_tokens", "returns", "seed")
"""Options of these commands that are `Decoding`'s fields."""
AT_ONCE = 64


def sort_arguments(arguments: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The pictures, which are files, and the texts, which are not.

    Raises:
      UserError: what is named like a picture and is not there, or a folder.
    """
    pictures, texts = [], []
    for argument in arguments:
        path = Path(argument)
        if len(argument) < 4096 and path.is_dir():
            raise UserError(f"{argument}: a folder; name its pictures, such as {path / '*.jpg'}")
        if len(argument) < 4096 and path.is_file():
            pictures.append(path)
        elif path.suffix.lower() in PICTURES:
            raise UserError(f"{argument}: no such picture; correct the path")
        else:
            texts.append(argument)
    return pictures, texts


def chosen_decoding(values: SimpleNamespace) -> dict[str, Any]:
    """The decoding options that were given."""
    return {name: value for name in DECODING if (value := getattr(values, name)) is not None}


def listed(said: Any, returns: int) -> list[Any]:
    """The texts of one item."""
    return said if returns > 1 else [said]


def in_portions(items: list[Any]) -> Iterator[list[Any]]:
    """The items in blocks, so that what is done can be told."""
    return (items[first : first + AT_ONCE] for first in range(0, len(items), AT_ONCE))
