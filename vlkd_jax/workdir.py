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
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from vlkd_jax import processes
from vlkd_jax.errors import UserError
from vlkd_jax.runtime import leave
from vlkd_jax.storage import is_remote, locate, make_directory, unusable, write_atomic

CONFIG_FILE = "config.json"
LOCK_FILE = "run.lock"
BEAT_SECONDS = 10.0  # how often the owner gives a sign of life
STALE_SECONDS = 60.0  # a lock left by another machine is stale when no sign of life is seen for this long
SETTLE_SECONDS = 2.0  # what runs that start together need at most to write their locks to an object store

_claimed: set[epath.Path] = set()  # fcntl locks do not exclude a second claim by the same process
_ABSENT = "(absent)"


def output_directory(path: str | os.PathLike[str], flag: str = "--workdir") -> Path:
    """The local directory that a flag names, made if need be. Raises UserError for a URL and as `make_directory`."""
    if is_remote(path):
        raise UserError(f"{path}: {flag} is a local directory here; write to one and copy it")
    return make_directory(Path(path), flag)


def new_directory(path: Path) -> Path:
    """As `output_directory` of `--output`; what has files in it is refused."""
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path}: not empty; name another --output, so that nothing is lost")
    return output_directory(path, "--output")


@contextlib.contextmanager
def claim(
    workdir: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    allowed: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[epath.Path]:
    """Holds `workdir` for one run: `with claim(workdir, config, allowed=("steps",)) as workdir: ...`

    The first claim writes `fingerprint` (the configuration as JSON values) to `workdir/config.json`. A later claim must
    bring the same values; only the fields named in `allowed` (dotted names; a name covers everything below it) may
    differ; config.json then takes their new values, and a line tells. `defaults` are the values of fields that an older
    config.json may lack. Every process of a run calls this; process 0 does it, and an error there is one on each.

    While the block runs, `workdir/run.lock` names the owner and keeps others out. The lock of a killed run never stands
    in the way: on the same machine the kernel drops it, and one left by another machine, or in an object store, is
    taken over after `STALE_SECONDS` without a sign of life.

    Yields the absolute path of the directory, or its URL. Raises UserError when another run holds the directory, when
    a field differs (every such field is listed), or when the directory or its config.json cannot be used.
    """
    lock: _Lock | None = None

    def take() -> str:
        nonlocal lock
        place = make_directory(locate(workdir))
        try:
            lock = _Lock(place / LOCK_FILE)
        except OSError as error:
            raise unusable(place, "--workdir", error) from error
        _check_config(place / CONFIG_FILE, json.loads(json.dumps(fingerprint)), allowed, dict(defaults or {}))
        return os.fspath(place)

    try:
        yield epath.Path(processes.on_first(take))
    finally:
        if lock is not None:
            lock.release()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.width": 96, ...}: one entry per leaf of a nested dict; an empty dict is a leaf of its own."""
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value}
    return {
        name: leaf
        for key, child in value.items()
        for name, leaf in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def _check_config(path: epath.Path, new: dict[str, Any], allowed: Sequence[str], defaults: dict[str, Any]) -> None:
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
        before, after = flatten(defaults) | flatten(old), flatten(new)
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

    What is written in the file (host, process, start) is for the message. Whether its owner lives is told by the
    kernel's lock where there is one, and else by the owner's signs of life: see `_LockFile` and `_LockObject`.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        if path in _claimed:
            raise UserError(f"{path.parent}: this process already runs there; use another --workdir")
        self._file = _LockObject(path) if is_remote(path) else _LockFile(path)
        try:
            self._refuse_live_owner()
            self._file.write(
                {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            )
        except BaseException:
            self._file.close()
            raise
        _claimed.add(path)
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._show_life, name="workdir-lock", daemon=True)
        self._beat.start()

    def _refuse_live_owner(self) -> None:
        owner = self._file.owner()
        if not owner or (self._file.kernel_locked and owner.get("host") == socket.gethostname()):
            return
        print(f"{self.path}: left by {_name(owner)}; watching {STALE_SECONDS:.0f} s for a sign of life", flush=True)
        seen = self._file.sign()
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            if self._file.sign() != seen:
                raise _held(self.path, owner)

    def _show_life(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a beat that fails once is made up for by the next
                self._file.beat()

    def release(self) -> None:
        """Removes the lock file. Safe to call again."""
        if self.path not in _claimed:
            return
        self._stop.set()
        self._beat.join()
        self._file.remove()
        self._file.close()
        _claimed.discard(self.path)


class _LockFile:
    """A local lock file, held open. The kernel's lock on it decides wherever the file system has one.

    There are file systems without, and some whose locks do not reach other machines: there a live owner shows by
    touching the file.
    """

    def __init__(self, path: epath.Path) -> None:
        self._path = path
        self._fd, self.kernel_locked = self._open()

    def _open(self) -> tuple[int, bool]:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _parse_owner(os.pread(fd, 4096, 0))
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(fd)
                    raise _held(self._path, owner) from error
                return fd, False  # no locks on this file system: the touches alone must tell
            if self._is_current(fd):
                return fd, True
            os.close(fd)  # its owner released it between our open and our lock: take the new file

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def owner(self) -> dict[str, Any]:
        return _parse_owner(os.pread(self._fd, 4096, 0))

    def sign(self) -> int | None:
        """What changes while the owner lives."""
        return os.fstat(self._fd).st_mtime_ns if self._is_current(self._fd) else None

    def write(self, owner: Mapping[str, Any]) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(owner).encode(), 0)

    def beat(self) -> None:
        os.utime(self._fd)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # somebody tidied the directory: nothing left to release
            if self._is_current(self._fd):
                self._path.unlink()

    def close(self) -> None:
        os.close(self._fd)


class _LockObject:
    """A lock in an object store, where nothing can be locked: a live owner shows by counting on in the object.

    Of several that write it at once the last one has it. An owner that stood still for so long that another took the
    lock over (a suspended process, a network gone) ends when it finds that out: two must not write to one directory.
    """

    kernel_locked = False

    def __init__(self, path: epath.Path) -> None:
        self._path, self._owner, self._beats = path, {"run": uuid.uuid4().hex}, 0

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""

    def owner(self) -> dict[str, Any]:
        return _parse_owner(self._read())

    def sign(self) -> bytes:
        return self._read()

    def write(self, owner: Mapping[str, Any]) -> None:
        self._owner |= owner
        self._write()
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours(last := self.owner()):
            raise _held(self._path, last)

    def _write(self) -> None:
        write_atomic(self._path, json.dumps(self._owner | {"beats": self._beats}).encode())

    def _is_ours(self, owner: Mapping[str, Any]) -> bool:
        return owner.get("run") == self._owner["run"]

    def beat(self) -> None:
        if (owner := self.owner()) and not self._is_ours(owner):
            leave(f"error: {self._path.parent}: {_name(owner)} took it over while this process stood still", 2)
        self._beats += 1
        self._write()

    def remove(self) -> None:
        if self._is_ours(self.owner()):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing is held open."""


def _held(path: epath.Path, owner: Mapping[str, Any]) -> UserError:
    return UserError(f"{path.parent}: {_name(owner)} is running there; wait for it, stop it, or use another --workdir")


def _parse_owner(content: bytes) -> dict[str, Any]:
    """What a lock file says of its owner; {} for a new, released or half-written file."""
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _name(owner: Mapping[str, Any]) -> str:
    pid, host, since = (owner.get(key, "?") for key in ("pid", "host", "since"))
    return f"process {pid} on {host} (since {since})"
