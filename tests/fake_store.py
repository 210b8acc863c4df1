"""An object store for tests: `gs://` and `s3://` lead below a local directory, through the code of epath and fsspec.

As in a real one an object changes when a writer closes it and not before, nothing can be appended to, and there are no
directories to be made: a try to make one fails, for it would make a bucket.
"""

import io
import os
import uuid
from pathlib import Path

from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

ROOT = "FAKE_STORE"
"""The environment variable that names the local directory, also for processes that a test starts."""


class Upload(io.BytesIO):
    """What is written to an object; it takes the object's place when it is closed."""

    def __init__(self, target: Path):
        super().__init__()
        self.target = target

    def close(self):
        if not self.closed:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            uploaded = Path(os.environ[ROOT]) / f".upload-{uuid.uuid4().hex}"
            uploaded.write_bytes(self.getvalue())
            os.replace(uploaded, self.target)
        super().close()


class FakeStore(DirFileSystem):
    """One store for both schemes; `gs://bucket/x` is ROOT/bucket/x."""

    protocol = ("gs", "gcs", "s3")
    cachable = False

    def __init__(self, **_):
        super().__init__(path=os.environ[ROOT], fs=LocalFileSystem())

    def open(self, path, mode="rb", **_):
        if mode == "wb":
            return Upload(Path(self._join(path)))
        assert mode in ("r", "rb"), f"an object cannot be opened as {mode}"
        return super().open(path, mode)

    def mkdir(self, path, *_, **__):
        raise AssertionError(f"a bucket would be made for {path}")

    makedirs = mkdir


def install() -> None:
    """Registers the store in this process; `ROOT` is set."""
    for protocol in ("gcs", "s3"):
        _registry[protocol] = FakeStore
    backend.fsspec_backend._get_filesystem.cache_clear()


def backing(path: str | os.PathLike[str]) -> Path:
    """Where an object, or all below a prefix, really lies."""
    return Path(os.environ[ROOT], os.fspath(path).partition("://")[2])


def uninstall() -> None:
    """Takes the store out again."""
    for protocol in ("gcs", "s3"):
        _registry.pop(protocol, None)
    backend.fsspec_backend._get_filesystem.cache_clear()
