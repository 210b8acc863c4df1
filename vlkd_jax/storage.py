"""Files in a local directory or in an object store (`gs://bucket/run`), through `etils.epath` either way.

Tests run all of this over a made-up store below a local directory, with fsspec's and epath's own code in between.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import TypeVar

from etils import epath

from vlkd_jax.errors import UserError

COPY_SECONDS = 30.0  # how often, at most, growing files are copied to an object store
BACKENDS = {"gs": ("gcs", "etils[epath-gcs]"), "s3": ("s3", "etils[epath-s3]")}
"""{scheme: (its name in fsspec, what pip installs for it)} of the object stores that Orbax writes checkpoints to."""

AnyPath = epath.Path | Path
Place = TypeVar("Place", epath.Path, Path)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in an object store: whole objects change at once; there is no appending and no lock."""
    return "://" in os.fspath(path)


def locate(path: str | os.PathLike[str]) -> epath.Path:
    """The absolute path of a local file or directory, or the URL of one in an object store.

    Raises:
      UserError: a store that checkpoints cannot be written to, and a local directory that epath takes for a store.
    """
    text = re.sub(r"^(gs|s3):/(?=[^/])", r"\1://", os.fspath(path))  # pathlib drops a slash of gs://bucket
    if not is_remote(text):
        place = epath.Path(Path(text).absolute())  # epath's own would take a/link/.. for a
        if is_remote(place):
            raise UserError(f"{path}: stands for {place} here; reach a local directory of that name through a link")
        return place
    scheme = text.partition("://")[0]
    if scheme not in BACKENDS:
        raise UserError(f"{path}: a place is a local directory or begins with {', '.join(f'{s}://' for s in BACKENDS)}")
    _never_list_from_memory(BACKENDS[scheme][0])
    return epath.Path(text)


def _never_list_from_memory(protocol: str) -> None:
    """What other processes have written or deleted would go unseen: fsspec's stores keep their listings for good."""
    from fsspec.config import conf

    conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def check_reachable(place: epath.Path) -> None:
    """Raises UserError for an object store whose packages are missing or that does not answer; asks it once."""
    if not is_remote(place):
        return
    scheme = os.fspath(place).partition("://")[0]
    try:
        place.exists()
    except ImportError as error:
        package = BACKENDS[scheme][1]
        raise UserError(f"{place}: {scheme}:// needs a package; pip install '{package}' ({error})") from error
    except Exception as error:  # of the store's own library: no credentials, no network, no right to read
        raise UserError(f"{place}: cannot be reached ({error}); check the address and your credentials") from error


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` to `path` so that a reader or a crash sees the old file or the new one, never a part.

    Raises OSError as the file system does; the temporary file is removed then.
    """
    if is_remote(path):
        epath.Path(path).write_bytes(data)  # object stores replace an object when all of it has come
        return
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


def make_directory(place: Place, flag: str = "--workdir") -> Place:
    """Makes a place of `locate` if need be. Raises UserError when it cannot be made or written in; the flag named it.

    An object store has no directories, and is not asked for one: a name with a slip would become a new bucket.
    """
    if is_remote(place):
        check_reachable(place)
        return place
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise unusable(place, flag, error) from error
    return place


def unusable(path: AnyPath, flag: str, error: OSError) -> UserError:
    """The mistake of naming, with a flag, a path that cannot be used."""
    return UserError(f"{path}: cannot be used as {flag} ({error.strerror or error}); choose another {flag}")


class Mirror:
    """A local directory, `local`, whose files stand in `target`: `target` itself, or for an object store a copy.

    Objects cannot be appended to: files that grow are written in a temporary directory, and those that have changed are
    copied whole, at most every `COPY_SECONDS` and on leaving the `with` block, also by an exception. A file that
    was copied and is gone is deleted in the store. A killed process loses what it wrote since the last copy.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = epath.Path(target)
        self.remote = is_remote(target)
        self.local = Path(tempfile.mkdtemp(prefix="vlkd-") if self.remote else target)
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of change of what stands in the store
        self._last = time.monotonic()

    def fetch(self, name: str) -> None:
        """Brings a file of the store that is to grow, if it is there."""
        if self.remote and (self.target / name).is_file():
            (self.local / name).write_bytes((self.target / name).read_bytes())

    def due(self) -> bool:
        """Whether there is a store, and time for a copy."""
        return self.remote and time.monotonic() - self._last >= COPY_SECONDS

    def copy(self) -> None:
        """Copies what has changed to the store, if there is one."""
        if not self.remote:
            return
        files = [file for file in self.local.rglob("*") if file.is_file()]
        now = {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
        for file in files:
            if self._copied.get(file) != now[file]:
                with open(file, "rb") as source, (self.target / file.relative_to(self.local)).open("wb") as copied:
                    shutil.copyfileobj(source, copied, 1 << 20)
        for file in self._copied.keys() - now:
            (self.target / file.relative_to(self.local)).unlink(missing_ok=True)
        self._copied, self._last = now, time.monotonic()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.copy()
        finally:
            if self.remote:
                shutil.rmtree(self.local, ignore_errors=True)
