"""What every entry point shares: options read, one line for a mistake, the exit codes of `options.EXIT_CODES`."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NoReturn

import click
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vlkd_jax import compile_cache, runtime
from vlkd_jax.commands import PROCESSES
from vlkd_jax.config import config_path
from vlkd_jax.errors import UserError
from vlkd_jax.options import CONFIG, Command, mistake

NEAR = r"Did you mean \"(\w+)\" instead of \"(\w+)\""
"""How ml_collections tells of an unknown key: the nearest, and the one given."""
FIELD = re.compile(rf"--?(no)?{CONFIG}\.|-[\d.]")
"""A field of the config, or its value where that is a number below zero."""
PATH_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG),
}
"""What the system says of a path that was given wrongly."""


class Diverged(UserError):
    """Too many updates in a row were not finite."""


def run(main: Callable[[SimpleNamespace], None], command: Command, argv: Sequence[str] | None = None) -> None:
    """Reads the command's options and calls `main` with them, as `execute` does; a wrong one is a user's mistake.

    Args:
      argv: the program's name and its arguments; default: those of the process.
    """
    argv = sys.argv if argv is None else argv
    with runtime.watched():
        try:
            context = command.make_context(f"python -m {command.module}", list(argv[1:]))
        except click.exceptions.Exit:  # after its help
            return
        except click.ClickException as e:
            _leave(mistake(e), 2)
        execute(main, context)


def execute(main: Callable[[SimpleNamespace], None], context: click.Context) -> None:
    """Calls `main` with the values of a command's options; one line and exit code 2 (3: diverged) on a user's mistake.

    A `config` among them is the ConfigDict with the fields of the command line. Ctrl-C and SIGTERM are answered as
    `vlkd_jax.runtime` says. Where several processes run the command together, exit code 4 tells of the loss of another.
    """
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell that torch is missing
    if getattr(sys.stdout, "errors", "") == "strict":  # a name that the terminal's encoding lacks must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    with runtime.watched():
        try:
            values = read_values(context)
            _start(context.command, values)
            main(values)
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


def _start(command: Command, values: SimpleNamespace) -> None:
    """Raises UserError when the processes of this run do not come together, or jax finds no device."""
    if not command.needs_device:
        return
    if not set(PROCESSES) <= set(command.params):
        compile_cache.use_cache()
        _check_devices()
        return
    from vlkd_jax import cluster

    cluster.initialize(*(getattr(values, option.name) for option in PROCESSES), _check_devices)
    if runtime.process_index() is None:  # several processes need one that all of them see
        compile_cache.use_cache()
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


def _leave(message: str, code: int, kind: str = "error: ") -> None:
    if runtime.process_index() is not None or ("jax" in sys.modules and _has_threads()):
        runtime.leave(kind + message, code)
    print(f"{kind}{' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def _has_threads() -> bool:
    import threading

    return any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate())


def read_values(context: click.Context) -> SimpleNamespace:
    """The values of a command's options, by name.

    Raises:
      UserError: an empty value, an unknown option, config or config key (with the nearest name), a wrong value of
        one, a config file that fails.
    """
    empty = [name for name, value in context.params.items() if value == ""]
    if empty and empty[0] != CONFIG:  # which tells what there is
        raise UserError(f"--{empty[0]} is empty; give a value: --{empty[0]}=...")
    values = SimpleNamespace(**context.params)
    if context.command.takes_config:
        values.config = _read_config(context)
    return values


def _read_config(context: click.Context) -> ConfigDict | None:
    """What `--config` names (as `config_path` takes it), with the fields of the command line; None: no `--config`."""
    name, fields = context.params[CONFIG], context.args
    for option in (argument.partition("=")[0] for argument in fields):
        if option.startswith("-") and not FIELD.match(option):
            near = difflib.get_close_matches(option, [f"--{param.name}" for param in context.command.params], n=1)
            meant = f"; did you mean {near[0]}?" if near else f" ({context.command_path} --help)"
            raise UserError(f"no such option {option}{meant}")
    if name is None:
        if fields:
            raise UserError(f"{fields[0]}: a field of a config, and no --config is given")
        return None
    path = config_path(name)
    argv = [context.command_path, f"--{CONFIG}={path}", *fields]
    values, file = flags.FlagValues(), path.partition(":")[0]
    config_flags.DEFINE_config_file(CONFIG, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
        config, is_config = values.config, callable(getattr(values.config, "lock", None))
    except UserError:
        raise
    except Exception as e:
        fault = _fault_in(file, e)
        if not fault and not isinstance(e, (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)):
            raise
        raise UserError(fault or _explain(str(e), values, argv, file)) from e
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; options are written --name=value")
    if not is_config:
        raise UserError(f"{file}: its get_config() returns no ConfigDict; start from vlkd_jax.configs.base")
    return config


def _fault_in(config_file: str, error: BaseException | None) -> str | None:
    """Which line of a config file raised this exception, or one behind it, and what; None: no line did."""
    fault = None
    while error is not None:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            lines.append((error.filename or "", error.lineno))
        near = re.search(NEAR, str(error))
        what = f"no field {near[2]}; did you mean {near[1]}?" if near else getattr(error, "msg", error)
        for file, line in lines:
            if os.path.abspath(file) == os.path.abspath(config_file):
                fault = f"{file} line {line}: {type(error).__name__}: {what}"
        error = error.__cause__ or error.__context__
    return fault


def _explain(message: str, values: flags.FlagValues, argv: Sequence[str], config_file: str) -> str:
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
        known = [name for name in values if name.startswith("config.")]
        close = difflib.get_close_matches(unknown[1], known, n=1)
        return f"unknown config key --{unknown[1]}" + (f"; did you mean --{close[0]}?" if close else "")
    if "get_config" in message:  # none there, or called with other arguments; a traceback is before it
        return f"{config_file}: {message.strip().splitlines()[-1]}"
    return message.replace("\n", " ")
