"""Dense layers and activations whose gradients XLA's CPU compiler runs well; the numbers are the usual ones."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vlkd_jax.sharding import constrain
from vlkd_jax.types import Array, ArrayLike, DTypeLike, Float, Float32, Int


@jax.custom_vjp
def _matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """x times kernel.

    The plain gradient asks for the kernel's cotangent transposed, for which the CPU compiler copies the activations'
    cotangent column by column and recomputes their activation function on the way: 2 to 3 times the time of this one.
    """
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_forward(x: Float[Array, "... D"], kernel: Float[Array, "D F"]):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[Float[Array, "... D"], Float[Array, "D F"]], g: Float[Array, "... F"]):
    x, kernel = saved
    rows, g_rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    dx = lax.dot_general(g_rows, kernel, (((1,), (1,)), ((), ()))).reshape(x.shape)
    return dx, lax.dot_general(rows, g_rows, (((0,), (0,)), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """`lax.dot_general` for the one form that `nn.Dense` asks for; precision is jax.default_matmul_precision's."""
    return _matmul(x, kernel)


Dense = functools.partial(nn.Dense, dot_general=_dot_general)
"""`flax.linen.Dense` with that gradient."""


REMAT_POLICIES = {"nothing": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
"""What of a layer is kept for the backward pass when it is recomputed."""


def remat(layer: type[nn.Module], policy: str | None, static_argnums: tuple[int, ...] = ()) -> type[nn.Module]:
    """A layer that the backward pass recomputes but for what `policy` of `REMAT_POLICIES` keeps; None: the layer."""
    if policy is None:
        return layer
    return nn.remat(layer, prevent_cse=False, static_argnums=static_argnums, policy=REMAT_POLICIES[policy])


def embed_ids(embed: nn.Embed, ids: Int[ArrayLike, "*shape"]) -> Float[Array, "*shape D"]:
    """The rows `ids` of a table, which is gathered first where devices split it.

    `embed(ids)` would lay the rows out as the table is, and their gradient, whole batches of them, everywhere.
    """
    return jnp.take(constrain(embed.embedding).astype(embed.dtype), ids, axis=0)


def l2_normalize(x: Float[ArrayLike, "... E"]) -> Float32[Array, "... E"]:
    """x scaled to unit length over its last axis; a zero vector stays zero, its gradient finite."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def gelu(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Exact GELU, x * Phi(x), through erf (jax.nn.gelu's erfc costs several times as much on a CPU)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # below it, 1 + erf cancels
    return (wide * (0.5 * (1 + lax.erf(wide * 0.7071067811865476)))).astype(x.dtype)


def quick_gelu(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """x * sigmoid(1.702 x), the approximation OpenAI trained CLIP with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATION_FUNCTIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
}


def layer_norm(epsilon: float, dtype: DTypeLike) -> nn.LayerNorm:
    """Layer norm with float32 statistics and output in `dtype`; two-pass variance, as torch computes it."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False)
