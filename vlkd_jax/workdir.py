"""The working directory of a run: one writer at a time, one configuration for its whole life."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkd_jax.errors import UserError

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
BEAT_SECONDS = 10.0  # how often the owner touches the lock file
STALE_SECONDS = 60.0  # a lock left by another machine is stale when no touch is seen for this long

_claimed: set[Path] = set()  # fcntl locks do not exclude a second claim by the same process
_ABSENT = "(absent)"


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path` so that a reader or a crash sees the old file or the new one, never a part.

    Raises OSError as the file system does; the temporary file is removed then.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def output_directory(path: str | os.PathLike[str], flag: str = "--workdir") -> Path:
    """The directory that a flag names, made if need be. Raises UserError when it cannot be made or written in."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unusable(path, flag, error) from error
    return path


def _unusable(path: Path, flag: str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be used as {flag} ({error.strerror}); choose another {flag}")


@contextlib.contextmanager
def claim(
    workdir: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    allowed: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Holds `workdir` for one run: `with claim(workdir, config, allowed=("steps",)) as workdir: ...`

    The first claim writes `fingerprint` (the configuration as JSON values) to `workdir/config.json`. A later claim must
    bring the same values; only the fields named in `allowed` (dotted names; a name covers everything below it) may
    differ; config.json then takes their new values, and a line tells. `defaults` are the values of fields that an older
    config.json may lack. In a run of several processes only process 0 claims.

    While the block runs, `workdir/run.lock` names the owner and keeps others out. The lock of a killed run never stands
    in the way: on the same machine the kernel drops it, and one left by another machine is taken over after
    `STALE_SECONDS` without a sign of life.

    Yields the absolute path of the directory. Raises UserError when another run holds the directory, when a field
    differs (every such field is listed), or when the directory or its config.json cannot be used.
    """
    workdir = output_directory(Path(workdir).absolute())
    try:
        lock = _Lock(workdir / LOCK_FILE)
    except OSError as error:
        raise _unusable(workdir, "--workdir", error) from error
    try:
        _check_config(workdir / CONFIG_FILE, json.loads(json.dumps(fingerprint)), allowed, dict(defaults or {}))
        yield workdir
    finally:
        lock.release()


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.width": 96, ...}: one entry per leaf of a nested dict; an empty dict is a leaf of its own."""
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in _flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def _check_config(path: Path, new: dict[str, Any], allowed: Sequence[str], defaults: dict[str, Any]) -> None:
    """Writes `new` to `path`, or compares it with what is there; see `claim`."""
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
            if not isinstance(old, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            raise UserError(
                f"{path}: not readable as the configuration of this run ({error}); restore it or use another --workdir"
            ) from error
        before, after = _flatten(defaults) | _flatten(old), _flatten(new)
        names = [name for name in sorted(before | after) if before.get(name, _ABSENT) != after.get(name, _ABSENT)]
        refused = [name for name in names if not any(name == a or name.startswith(f"{a}.") for a in allowed)]
        if refused:
            changes = ", ".join(f"{n}: {_show(before, n)} -> {_show(after, n)}" for n in refused)
            raise UserError(
                f"{path}: started with another configuration ({changes}); use another --workdir or the old values"
            )
        if not names:
            return
        print(f"{path}: " + ", ".join(f"{n}: {_show(before, n)} -> {_show(after, n)}" for n in names), flush=True)
    write_atomic(path, (json.dumps(new, indent=2, sort_keys=True) + "\n").encode())


def _show(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else _ABSENT


class _Lock:
    """An exclusive lock file; raises UserError when it is held, OSError when it cannot be made.

    The kernel's lock on the file decides wherever the file system has one. What is written in the file (host, process,
    start) is for the message, and for file systems whose locks do not reach other machines: there a live owner shows by
    touching it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path in _claimed:
            raise UserError(f"{path.parent}: this process already runs there; use another --workdir")
        self._fd, kernel_locked = self._open()
        try:
            self._refuse_live_owner(kernel_locked)
            owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(owner).encode(), 0)
        except BaseException:
            os.close(self._fd)
            raise
        _claimed.add(path)
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._touch, name="workdir-lock", daemon=True)
        self._beat.start()

    def _open(self) -> tuple[int, bool]:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _owner(fd)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(fd)
                    raise self._held(owner) from error
                return fd, False  # no locks on this file system: the touches alone must tell
            if self._is_current(fd):
                return fd, True
            os.close(fd)  # its owner released it between our open and our lock: take the new file

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _refuse_live_owner(self, kernel_locked: bool) -> None:
        owner = _owner(self._fd)
        if not owner or (kernel_locked and owner.get("host") == socket.gethostname()):
            return
        print(f"{self.path}: left by {_name(owner)}; watching {STALE_SECONDS:.0f} s for a sign of life", flush=True)
        seen = os.fstat(self._fd).st_mtime_ns
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            if not self._is_current(self._fd) or os.fstat(self._fd).st_mtime_ns != seen:
                raise self._held(owner)

    def _held(self, owner: Mapping[str, Any]) -> UserError:
        return UserError(
            f"{self.path.parent}: {_name(owner)} is running there; wait for it, stop it, or use another --workdir"
        )

    def _touch(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a touch that fails once is made up for by the next
                os.utime(self._fd)

    def release(self) -> None:
        """Removes the lock file. Safe to call again."""
        if self.path not in _claimed:
            return
        self._stop.set()
        self._beat.join()
        with contextlib.suppress(FileNotFoundError):  # somebody tidied the directory: nothing left to release
            if self._is_current(self._fd):
                self.path.unlink()
        os.close(self._fd)
        _claimed.discard(self.path)


def _owner(fd: int) -> dict[str, Any]:
    """What the lock file says of its owner; {} for a new, released or half-written file."""
    try:
        owner = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: Mapping[str, Any]) -> str:
    pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
    return f"process {pid} on {host} (since {since})"
