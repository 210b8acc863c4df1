"""Compiled programs kept between runs, in the user's cache directory, as far as nothing else is asked for."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

SETTING = "JAX_COMPILATION_CACHE_DIR"
"""jax's own: another directory, or, empty, none."""
BYTES = 4 * 2**30
"""Beyond which the programs that were not used for longest go."""
SECONDS = 0.5
"""What compiles faster is not kept."""


def use_cache() -> None:
    """Lets jax keep what it compiles in `~/.cache/vlkd_jax`; not where `SETTING` is set, or it cannot be written."""
    if SETTING in os.environ:
        return
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return
    if not os.access(directory, os.W_OK):
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_compilation_cache_max_size", BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def cache_directory() -> Path:
    """Programs for a CPU fit its kind alone, and several kinds may share a home. Raises RuntimeError without a home."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vlkd_jax" / f"programs-{_processor()}"


def _processor() -> str:
    """What tells kinds of processor apart: on Linux the model and its features."""
    told = [platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
