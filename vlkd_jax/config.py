"""Names and paths of configs and of the models that come with the package; the configs of older runs."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlkd_jax.errors import UserError

BUILTIN = "builtin:"
"""What the name of a shipped model begins with, such as `builtin:shapes/clip`."""
HUB = "hf:"
"""What the name of a model on the hub begins with, such as `hf:facebook/bart-base`."""

CONFIG_VERSION = 2
"""Of the fields in `configs/base.py`, raised when one gets another name or meaning; 2: loss.text is loss.denoise."""


def config_path(name: str) -> str:
    """The file that a `--config=` value means, with the `:ARGUMENT` that it may end in.

    `shapes_vlkd` and `suites:shapes` are configs of the package; a value with a slash or an ending in `.py` before the
    colon is a path, and a path is never looked for in the package.

    Raises:
      UserError: no config of that name, no file at that path.
    """
    place, colon, argument = name.partition(":")
    known = {file.stem: file for file in _shipped_configs()}
    if "/" in place or place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UserError(f"{place}: no such config file; {_meant(path.stem, known, colon + argument)}")
    elif place in known:
        path = known[place]
    else:
        raise UserError(f"--config={name}: no config of that name; {_meant(place, known, colon + argument)}")
    return f"{path}{colon}{argument}"


def _shipped_configs() -> list[Path]:
    folder = Path(str(files("vlkd_jax.configs")))
    return sorted(file for file in folder.glob("*.py") if file.stem != "__init__")


def _meant(name: str, known: dict[str, Path], argument: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean --config={near[0]}{argument}, which comes with the package?"
    return f"give the path of your own file, FILE.py, or one that comes with the package: {', '.join(known)}"


def model_directory(name: str) -> Path:
    """The Hugging Face directory that `config.clip` or `config.bart` means: `builtin:shapes/clip`, `hf:...`, or a path.

    Raises:
      UserError: no shipped model of that name, none on the hub (see `hf.hub`); a path is not looked at.
    """
    if name.startswith(HUB):
        from vlkd_jax.hf.hub import snapshot

        return snapshot(name)
    if not name.startswith(BUILTIN):
        return Path(name)
    shapes = Path(str(files("vlkd_jax.shapes"))) / "models"
    known = {f"{BUILTIN}shapes/{directory.name}": directory for directory in sorted(shapes.iterdir())}
    if name not in known:
        raise UserError(f"{name}: no such model in the package; there are {', '.join(known)}")
    return known[name]


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration as it was written, with the default of every field that did not exist then."""
    from vlkd_jax.configs import base

    if "text" in values.get("loss", {}):  # version 1
        values = values | {"loss": {("denoise" if k == "text" else k): v for k, v in values["loss"].items()}}
    return _filled(base.get_config().to_dict(), values)


def _filled(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Raises TypeError where a group of fields is none."""
    nested = {k: _filled(d, values[k]) for k, d in defaults.items() if isinstance(d, dict) and k in values}
    return defaults | values | nested


def record_directories(data: Any) -> list[str]:
    """The directories of `config.data.directory`: with `config.data.weights` several, separated by commas."""
    return data.directory.split(",") if data.weights else [data.directory]
