"""The frozen teacher's outputs in fewer bytes: bfloat16, or int8 with a scale for every vector."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vlkd_jax.types import Array, DTypeLike, Float, Quantized

DTYPES = ("float32", "bfloat16", "int8")


def compress(x: Float[Array, "*B W"], dtype: str) -> Array | Quantized:
    """`x` as one of `DTYPES`; int8 divides every vector of W numbers by its largest magnitude, which becomes 127."""
    if dtype != "int8":
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    return Quantized(jnp.round(x / jnp.where(scale, scale, 1)).astype(jnp.int8), scale)


def restore(stored: Array | Quantized, dtype: DTypeLike) -> Float[Array, "*B W"]:
    """What `compress` stood for, up to its error."""
    if isinstance(stored, Quantized):
        return (stored.values * stored.scale).astype(dtype)
    return stored.astype(dtype)


def squared_errors(x: Any, stored: Any, mask: Array) -> Any:
    """For each array of `x` float32 [2]: the squared error of `restore` and the squared size, over the masked rows."""

    def of_array(x: Array, stored: Array | Quantized) -> Array:
        x, rows = x.astype(jnp.float32), mask.reshape(-1, *[1] * (x.ndim - 1))
        gaps = restore(stored, jnp.float32) - x
        return jnp.stack([jnp.sum(jnp.square(values), where=rows) for values in (gaps, x)])

    return jax.tree.map(of_array, x, stored)
