"""Vision-language knowledge distillation, CLIP into BART, in JAX: `from vlkd_jax import VLKD`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkd_jax.data.fetch import fetch
    from vlkd_jax.vlkd import VLKD

__all__ = ["VLKD", "fetch"]


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is first used: the command line answers without jax."""
    if name == "VLKD":
        from vlkd_jax.vlkd import VLKD

        return VLKD
    if name == "fetch":
        from vlkd_jax.data.fetch import fetch

        return fetch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
