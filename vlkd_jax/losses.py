"""The distillation losses. Each returns (sum, count), so that sharded and padded batches give the one-big-batch mean.

All but `itcl` add up over parts of a batch. Each pair of `itcl` is compared with every other of the batch it is given,
so the sum over two halves is another, easier loss than that of the whole: it always needs the global batch at once.

Sources: method section of Dai et al. 2022 (arXiv 2203.06386) as far as it is known; README.md lists what is our choice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vlkd_jax.types import Array, ArrayLike, Bool, Float, Float32, Int

SumAndCount = tuple[Float32[Array, ""], Float32[Array, ""]]


def ttdm(sentence: Float[ArrayLike, "B E"], text: Float[ArrayLike, "B E"]) -> SumAndCount:
    """Text-text distance minimisation: squared L2 distance of the student's sentence to the teacher's text."""
    distance = jnp.sum(jnp.square(sentence.astype(jnp.float32) - text.astype(jnp.float32)), -1)
    return jnp.sum(distance), jnp.float32(distance.shape[0])


def itcl(image: Float[ArrayLike, "B E"], sentence: Float[ArrayLike, "B E"], scale: Float[ArrayLike, ""]) -> SumAndCount:
    """Image-text contrastive loss: symmetric cross-entropy of `scale * image . sentence^T` over the global batch.

    Args:
      image: L2-normalised.
      sentence: L2-normalised.
      scale: the inverse temperature.
    """
    # scale enlarges the products' rounding a hundredfold; the default is TF32 or bfloat16 on accelerators
    products = jnp.einsum("be,ce->bc", image, sentence, precision="highest", preferred_element_type=jnp.float32)
    logits = scale * products
    diagonal = jnp.diagonal(logits)
    per_pair = 0.5 * (jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)) - diagonal
    return jnp.sum(per_pair), jnp.float32(per_pair.shape[0])


def icti(
    logits: Float[ArrayLike, "B T V"], targets: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> SumAndCount:
    """Infilling loss: cross-entropy of logits against targets, summed where mask is True."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(jnp.where(mask, loss, 0)), jnp.sum(mask, dtype=jnp.float32)


def token_accuracy(
    logits: Float[ArrayLike, "B T V"], targets: Int[ArrayLike, "B T"], mask: Bool[ArrayLike, "B T"]
) -> SumAndCount:
    """How often the teacher-forced argmax of logits is the target, where mask is True."""
    right = jnp.argmax(logits, -1) == targets
    return jnp.sum(right & mask, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)
