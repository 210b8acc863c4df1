"""Typed reads from the JSON files of models."""

from __future__ import annotations

import math
from typing import Any

from vlkd_jax.errors import UserError

LARGEST = 2**24
"""Of a whole number; a file with a larger one is damaged, and its arrays would overflow."""
MOST_LAYERS, LARGEST_IMAGE = 2**12, 2**16


class Fields:
    """Typed reads from one JSON object; every complaint names the file and the field."""

    def __init__(self, values: Any, defaults: dict, source: str, prefix: str = ""):
        if not isinstance(values, dict):
            raise UserError(f"{source}: {prefix.rstrip('.') or 'the file'} must be a JSON object; restore the original")
        self.values = {**defaults, **values}
        self.source, self.prefix = source, prefix

    def fail(self, name: str, wanted: str) -> None:
        """Raises UserError: the field has another value than is wanted."""
        raise UserError(f"{self.source}: {self.prefix}{name} is {self.values.get(name)!r}; it must be {wanted}")

    def integer(self, name: str, minimum: int = 1, maximum: int = LARGEST) -> int:
        """A whole number."""
        value = self.values.get(name)
        if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
            value = value[0]  # transformers 5 also writes square sizes and single end tokens as lists
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.fail(name, f"a whole number of at least {minimum}")
        if value > maximum:
            self.fail(name, f"a whole number of at most {maximum}")
        return value

    def optional_integer(self, name: str) -> int | None:
        """A whole number of at least 0, or null."""
        return None if self.values.get(name) is None else self.integer(name, 0)

    def number(self, name: str, below: float | None = None) -> float:
        """A finite number of at least 0."""
        value = self.values.get(name)
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or value < 0 or (below is not None and value >= below):
            self.fail(name, "a number of at least 0" + (f" and below {below:g}" if below is not None else ""))
        return float(value)

    def boolean(self, name: str) -> bool:
        """true or false."""
        if not isinstance(self.values.get(name), bool):
            self.fail(name, "true or false")
        return self.values[name]

    def one_of(self, name: str, options: tuple[str, ...]) -> str:
        """One of some words."""
        if self.values.get(name) not in options:
            self.fail(name, "one of " + ", ".join(options))
        return self.values[name]

    def three_numbers(self, name: str) -> tuple[float, float, float]:
        """Three finite numbers, or one for all three."""
        value = self.values.get(name)
        numbers = value if isinstance(value, list | tuple) else [value] * 3
        valid = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        if len(numbers) != 3 or not valid or not all(map(math.isfinite, numbers)):
            self.fail(name, "three numbers, one for each of red, green and blue")
        return tuple(map(float, numbers))

    def edges(self, name: str, one_is_square: bool) -> int | tuple[int, int]:
        """An image size in pixels: the length of the short side, or (height, width)."""
        value = self.values.get(name)
        if isinstance(value, int):
            value = [value, value] if one_is_square else {"shortest_edge": value}
        if isinstance(value, list | tuple) and len(value) == 2:
            value = dict(zip(("height", "width"), value, strict=True))
        given = {key: length for key, length in value.items() if length is not None} if isinstance(value, dict) else {}
        if all(type(length) is int and length > 0 for length in given.values()):
            if set(given) == {"shortest_edge"}:
                return given["shortest_edge"]
            if set(given) == {"height", "width"}:
                return given["height"], given["width"]
        self.fail(name, 'a whole number of pixels, {"shortest_edge": ...} or {"height": ..., "width": ...}')

    def exactly(self, name: str, wanted: Any, why: str) -> None:
        """Refuses every other value."""
        if self.values.get(name) != wanted:
            self.fail(name, f"{wanted!r} ({why})")

    def divisible(self, name: str, by: str) -> None:
        """Refuses a whole number that is no multiple of another field."""
        if self.integer(name) % self.integer(by):
            self.fail(name, f"a multiple of {by} ({self.values[by]})")


def check_model_type(config: Any, wanted: str, source: str) -> None:
    """Raises UserError for what is no JSON object, or that of another kind of model."""
    if not isinstance(config, dict):
        raise UserError(f"{source}: the file must be a JSON object; restore the original")
    model_type = config.get("model_type")
    if model_type != wanted:
        raise UserError(f"{source}: model_type is {model_type!r}; give a directory that holds a {wanted!r} model")


def part_of(values: Any, name: str, source: str) -> dict:
    """The object `name` of an object. Raises UserError when there is none."""
    part = values.get(name) if isinstance(values, dict) else None
    if not isinstance(part, dict):
        raise UserError(f"{source}: {name} must be a JSON object; restore the original file")
    return part
