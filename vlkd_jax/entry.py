"""What every entry point shares: flags read, one line for a user's mistake, documented exit codes.

Exit codes: 0 done, 1 a fault of the program (traceback), 2 a mistake in what the user gave, 3 training diverged.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from vlkd_jax.errors import UserError


class Diverged(UserError):
    """Too many updates in a row were not finite."""


def run(
    main: Callable[[], None],
    define_flags: Callable[[], None],
    required: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Defines and parses the flags, calls `main`; one line and exit code 2 (3: diverged) on a user's mistake.

    Flags are defined here and not on import, so that entry points can import one another. With `--help` it prints the
    module's docstring and its flags instead.
    """
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that torch is missing
    argv, others = sys.argv if argv is None else argv, set(flags.FLAGS)
    define_flags()
    if {"-h", "--help"} & set(argv[1:]):
        print(_usage(main.__globals__["__doc__"], [name for name in flags.FLAGS if name not in others], required))
        return
    try:
        parse(argv, required)
        main()
    except UserError as e:
        _leave(str(e), 3 if isinstance(e, Diverged) else 2)
    except OSError as e:
        if e.errno is None:  # ml_collections tells of a config file it could not load when the config is first used
            _leave(str(e), 2)
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _leave(f"{e.filename or 'a file of this run'}: no space left to write it; free some space and start again", 2)


def _usage(description: str, names: Sequence[str], required: Sequence[str]) -> str:
    lines = [f"  --{name}=...  {flags.FLAGS[name].help}{' (required)' * (name in required)}" for name in names]
    return "\n".join([description.strip(), "", *lines])


def _leave(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    os._exit(code) if "jax" in sys.modules and _has_threads() else sys.exit(code)


def _has_threads() -> bool:
    import threading

    return any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate())


def parse(argv: Sequence[str], required: Sequence[str] = ()) -> None:
    """Parses absl flags.

    Raises:
      UserError: an unknown flag or config key (with the nearest name), a wrong value, a missing flag.
    """
    try:
        rest = flags.FLAGS(list(argv))
        missing = [name for name in required if flags.FLAGS[name].value is None]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as e:
        raise UserError(_explain(str(e), argv)) from e
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options are written --name=value")
    if missing:
        raise UserError(f"missing --{missing[0]}=...; see --help")


def _explain(message: str, argv: Sequence[str]) -> str:
    near = re.search(r"Did you mean \"(\w+)\" instead of \"(\w+)\"", message)
    named = [a.split("=")[0] for a in argv if near and near[2] in a.split("=")[0].split(".")]
    if named:  # ml_collections names only the last part of the key
        meant = ".".join(near[1] if part == near[2] else part for part in named[0].split("."))
        return f"unknown config key {named[0]}; did you mean {meant}?"
    unknown = re.search(r"Unknown command line flag '(config\.[\w.]+)'", message)
    if unknown:
        known = [name for name in flags.FLAGS if name.startswith("config.")]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return f"unknown config key --{unknown[1]}" + (f"; did you mean --{close[0]}?" if close else "")
    return message.replace("\n", " ")
