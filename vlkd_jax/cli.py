"""The `vlkd` command: `vlkd train ...` is `python -m vlkd_jax.train ...`, and so on.

Only the entry point is found here, and help is answered without importing jax.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from vlkd_jax.commands import COMMANDS, overview, usage
from vlkd_jax.runtime import tell, watched


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command with the arguments after its name; leaves with exit code 2 on an unknown one or none.

    Args:
      argv: arguments without the program's name; default: those of the process.
    """
    command, *rest = (list(sys.argv[1:] if argv is None else argv)) or [""]
    if command in ("-h", "--help"):
        tell(overview())
    elif command == "--version":
        tell(f"vlkd {_version()}")
    elif command not in COMMANDS:
        _refuse(_unknown(command))
    elif {"-h", "--help"} & set(rest):
        tell(usage(COMMANDS[command], f"vlkd {command}"))
    else:
        sys.argv = [f"vlkd {command}", *rest]
        with watched():  # from here on, as the imports take seconds
            runpy.run_module(COMMANDS[command].module, run_name="__main__", alter_sys=True)


def _version() -> str:
    try:
        return version("vlkd_jax")
    except PackageNotFoundError:
        _refuse("the package vlkd_jax is not installed, so it has no version; pip install -e . in the checkout")


def _unknown(command: str) -> str:
    if not command:
        return f"no command given; it is one of {', '.join(COMMANDS)} (vlkd --help)"
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(COMMANDS)}"
    return f"unknown command {command!r}; {meant} (vlkd --help)"


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
