"""What every entry point shares: flags read, one line for a user's mistake, the exit codes of `commands.EXIT_CODES`."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags, logging
from ml_collections import config_flags

from vlkd_jax import runtime
from vlkd_jax.commands import PROCESSES, Command, Option, usage
from vlkd_jax.config import config_path
from vlkd_jax.errors import UserError

NEAR = r"Did you mean \"(\w+)\" instead of \"(\w+)\""
"""How ml_collections tells of an unknown key: the nearest, and the one given."""
PATH_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG),
}
"""What the system says of a path that was given wrongly."""


class Diverged(UserError):
    """Too many updates in a row were not finite."""


def run(main: Callable[[], None], command: Command, argv: Sequence[str] | None = None) -> None:
    """Defines and parses the command's flags, calls `main`; one line and exit code 2 (3: diverged) on a user's mistake.

    Flags are defined here and not on import, so that entry points can import one another. With `--help` it prints the
    command's help instead. Ctrl-C and SIGTERM are answered as `vlkd_jax.runtime` says. Where several processes run the
    command together, exit code 4 tells of the loss of another.
    """
    with runtime.watched():
        _run(main, command, argv)


def _run(main: Callable[[], None], command: Command, argv: Sequence[str] | None) -> None:
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that torch is missing
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"} & set(argv[1:]):
        runtime.tell(usage(command, f"python -m {command.module}"))
        return
    if getattr(sys.stdout, "errors", "") == "strict":  # a name that the terminal's encoding lacks must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        define(command.options)
    except flags.Error as e:  # ml_collections looks into a --flagfile here already
        _leave(str(e), 2)
    try:
        required = [option.name for option in command.options if option.required]
        arguments = [option.name for option in command.options if option.kind == "argument"]
        several = next((option for option in command.options if option.kind == "arguments"), None)
        parse(argv, required, arguments, several)
        _start(command)
        main()
        _finish()
    except runtime.Interrupted as e:
        _leave(str(e), e.code, kind="")
    except UserError as e:
        _leave(str(e), 3 if isinstance(e, Diverged) else 2)
    except BrokenPipeError:  # Python would flush once more when it ends
        runtime.leave("error: standard output was closed before the end; send it to a file", 2)
    except Exception as e:
        message = _mistake(e) if isinstance(e, OSError) else None
        if message is not None:
            _leave(message, 2)
        if runtime.process_index() is None:
            raise
        _fail(e)


def _start(command: Command) -> None:
    """Raises UserError when the processes of this run do not come together, or jax finds no device."""
    if not command.needs_device:
        return
    if not set(PROCESSES) <= set(command.options):
        _check_devices()
        return
    from vlkd_jax import cluster

    cluster.initialize(*(flags.FLAGS[option.name].value for option in PROCESSES), _check_devices)
    _check_devices()
    cluster.check_started()


def _finish() -> None:
    if runtime.process_index() is not None:
        from vlkd_jax import cluster

        cluster.finish()


def _fail(error: Exception) -> NoReturn:
    """Leaves one of several processes at once: at its own end JAX would wait for the others."""
    from vlkd_jax import cluster

    lost = cluster.lost_peer(error)
    if lost:
        runtime.leave(str(lost), runtime.LOST)
    traceback.print_exception(error)
    runtime.leave(f"{runtime.whose()}this is a fault of the program; the other processes cannot go on without it", 1)


def _check_devices() -> None:
    """Raises UserError when jax finds no device of the kind it is told to use."""
    import jax

    try:
        jax.devices()
    except Exception as e:  # an AssertionError without a word where the plug-in of the platform is not installed
        asked = os.environ.get("JAX_PLATFORMS")
        cause = f"JAX_PLATFORMS={asked} cannot be used here" if asked else "jax finds no device that it can use"
        reason = f" ({e})" if str(e) else ""
        raise UserError(f"{cause}{reason}; set JAX_PLATFORMS=cpu, or install jax for that device") from e


def _mistake(error: OSError) -> str | None:
    """The line for an error of the system that the user can mend; None for another."""
    if error.errno is None:  # ml_collections tells of a config file it could not load when the config is first used
        return str(error)
    name = error.filename or "a file of this run"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{name}: no space left to write it; free some space and start again"
    if error.errno in PATH_ERRORS and error.filename:
        return f"{name}: {error.strerror}; name another path, or correct its permissions"
    return None


def define(options: Sequence[Option], values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag in `values` for each option.

    Raises:
      flags.Error: a --flagfile on the command line that cannot be read.
    """
    for option in options:
        common = {"name": option.name, "default": option.default, "help": option.help, "flag_values": values}
        match option.kind:
            case "config":
                config_flags.DEFINE_config_file(option.name, help_string=option.help, flag_values=values)
            case "string" | "argument":
                flags.DEFINE_string(**common)
            case "arguments":
                flags.DEFINE_multi_string(**common)
            case "integer":
                flags.DEFINE_integer(**common, lower_bound=option.minimum)
            case "number":
                flags.DEFINE_float(**common, lower_bound=option.minimum)
            case "flag":
                flags.DEFINE_bool(**common | {"default": False})
            case "choice":
                flags.DEFINE_enum(**common, enum_values=option.choices)
            case kind:
                raise ValueError(f"--{option.name} is of unknown kind {kind!r}")


def _leave(message: str, code: int, kind: str = "error: ") -> None:
    if runtime.process_index() is not None or ("jax" in sys.modules and _has_threads()):
        runtime.leave(kind + message, code)
    print(f"{kind}{' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _has_threads() -> bool:
    import threading

    return any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate())


def parse(
    argv: Sequence[str], required: Sequence[str] = (), arguments: Sequence[str] = (), several: Option | None = None
) -> None:
    """Parses absl flags; `--config=` takes what `vlkd_jax.config.config_path` takes.

    Args:
      arguments: flags that are given in this order, without their names.
      several: the option of all the rest that is given so.

    Raises:
      UserError: an unknown flag, config or config key (with the nearest name), a wrong value, a missing flag, a config
        file that fails.
    """
    configs: list[str] = []
    try:
        rest = flags.FLAGS(_with_config_paths(argv, configs))[1:]
        for name, value in zip(arguments, rest):
            flags.FLAGS[name].value = value
        rest = rest[len(arguments) :]
        if several and rest:
            flags.FLAGS[several.name].value, rest = rest, []
        missing = [name for name in required if flags.FLAGS[name].value is None]
        empty = [name for name in flags.FLAGS if "." not in name and flags.FLAGS[name].present and _is_empty(name)]
        wrong = [path for path in configs if not callable(getattr(flags.FLAGS["config"].value, "lock", None))]
    except UserError:
        raise
    except Exception as e:
        fault = _fault_in(configs, e)
        if not fault and not isinstance(e, (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)):
            raise
        raise UserError(fault or _explain(str(e), argv, configs)) from e
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --name=value")
    if wrong:
        raise UserError(f"{wrong[0]}: its get_config() returns no ConfigDict; start from vlkd_jax.configs.base")
    if empty:
        raise UserError(f"--{empty[0]} is empty; give a value: --{empty[0]}=...")
    if missing:
        if several and missing[0] == several.name:
            raise UserError(f"missing {several.value}; see --help")
        name = missing[0].upper() if missing[0] in arguments else f"--{missing[0]}=..."
        raise UserError(f"missing {name}; see --help")


def _is_empty(name: str) -> bool:
    value = flags.FLAGS[name].value
    return isinstance(value, str) and not value


def _with_config_paths(argv: Sequence[str], configs: list[str]) -> list[str]:
    """The arguments with flag files read and the value of every `--config` a path; `configs` receives those files."""
    argv = [_underscored(argument) for argument in flags.FLAGS.read_flags_from_files(list(argv))]
    for i, argument in enumerate(argv):
        if argument == "--" or "config" not in flags.FLAGS:
            break
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config") or (not equals and i + 1 == len(argv)):
            continue
        path = config_path(value if equals else argv[i + 1])
        argv[i if equals else i + 1] = f"{flag}={path}" if equals else path
        configs.append(path.partition(":")[0])
    return argv


def _underscored(argument: str) -> str:
    """`--allow-partial` is `--allow_partial`."""
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _fault_in(configs: Sequence[str], error: BaseException | None) -> str | None:
    """Which line of a config file raised this exception, or one behind it, and what; None: no line did."""
    fault, files = None, [os.path.abspath(path) for path in configs]
    while error is not None:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            lines.append((error.filename or "", error.lineno))
        near = re.search(NEAR, str(error))
        what = f"no field {near[2]}; did you mean {near[1]}?" if near else getattr(error, "msg", error)
        for file, line in lines:
            if os.path.abspath(file) in files:
                fault = f"{file} line {line}: {type(error).__name__}: {what}"
        error = error.__cause__ or error.__context__
    return fault


def _explain(message: str, argv: Sequence[str], configs: Sequence[str]) -> str:
    near = re.search(NEAR, message)
    key = near[2] if near else message.strip("'\"")  # ml_collections names only the part of the key that is unknown
    named = [a.split("=")[0] for a in argv if key in a.split("=")[0].split(".")]
    if named and not near:
        return f"unknown config key {named[0]}"
    if named:
        meant = ".".join(near[1] if part == near[2] else part for part in named[0].split("."))
        return f"unknown config key {named[0]}; did you mean {meant}?"
    unknown = re.search(r"Unknown command line flag '(config\.[\w.]+)'", message)
    if unknown:
        known = [name for name in flags.FLAGS if name.startswith("config.")]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return f"unknown config key --{unknown[1]}" + (f"; did you mean --{close[0]}?" if close else "")
    if configs and "get_config" in message:  # none there, or called with other arguments; a traceback is before it
        return f"{configs[-1]}: {message.strip().splitlines()[-1]}"
    return message.replace("\n", " ")
