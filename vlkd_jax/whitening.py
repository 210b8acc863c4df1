"""Fixed whitening of the teacher's image tokens, in front of the student's image linear.

A CLIP's tokens have a large mean and a few directions thousands of times stronger than the rest; a linear trained by
first-order steps learns the strong ones first and what tells objects apart late. Here the tokens' mean and covariance
on the first training images give a ZCA transform that nothing changes afterwards (Kessy, Lewin and Strimmer 2018). It
is a reparametrisation: a linear with a bias can say the same. It lies in the student's parameters, so that a
checkpoint is whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vlkd_jax import processes, sharding
from vlkd_jax.models.clip import normalize_pixels
from vlkd_jax.tasks.distill import select_tokens
from vlkd_jax.tasks.task import Task
from vlkd_jax.types import Array, Batch, Float, Float32, Params, UInt8

FLOOR = 1e-3
"""Added to every variance, as a share of their mean: directions far below it are not blown up."""


def estimate(task: Task, clip_params: Params, stream: Iterator[Batch], mesh: jax.sharding.Mesh) -> Params:
    """{"mean" [D], "matrix" [D, D]} float32 from the image tokens of the first `task.whiten` images or a few more.

    Args:
      task: a distillation; clip_params: its teacher's, on the devices.
      stream: this process's batches.
      mesh: the devices the work is spread over.
    """

    def sums(
        params: Params, pixels: UInt8[Array, "B height width 3"]
    ) -> tuple[Float32[Array, " D"], Float32[Array, "D D"]]:
        normalised = normalize_pixels(pixels, task.teacher.config.preprocessing)
        output = task.teacher.apply({"params": params}, normalised, method="encode_images")
        tokens = select_tokens(output, task.student.image_tokens).astype(jnp.float32)
        outer = jnp.einsum("bnd,bne->de", tokens, tokens, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(tokens, (0, 1)) / tokens.shape[1], outer / tokens.shape[1]

    compiled = jax.jit(sums, out_shardings=sharding.replicated(mesh))
    seen, total, outer = 0, 0.0, 0.0
    while seen < task.whiten:
        pixels = sharding.put(mesh, next(stream).pixels)
        batch_sums = jax.device_get(compiled(clip_params, pixels))  # replicated: every process has all of it
        total, outer = total + batch_sums[0].astype(np.float64), outer + batch_sums[1].astype(np.float64)
        seen += pixels.shape[0]
    mean = total / seen
    statistics = {"mean": mean.astype(np.float32), "matrix": zca(outer / seen - np.outer(mean, mean))}
    return processes.broadcast(statistics)  # two machines' eigenvectors may differ in their last bits


def zca(covariance: Float[np.ndarray, "D D"]) -> Float32[np.ndarray, "D D"]:
    """The symmetric inverse root of a covariance, every variance raised by `FLOOR` of their mean: float32."""
    variances, axes = np.linalg.eigh(covariance)
    raised = np.maximum(variances, 0) + FLOOR * variances.mean()
    return (axes / np.sqrt(raised) @ axes.T).astype(np.float32)
