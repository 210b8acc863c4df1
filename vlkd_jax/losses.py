"""The distillation losses. Each returns (sum, count), so that sharded and padded batches give the one-big-batch mean.

All but `itcl` add up over parts of a batch. Each pair of `itcl` is compared with every other of the batch it is given,
so the sum over two halves is another, easier loss than that of the whole: it always needs the global batch at once.

Sources: method section of Dai et al. 2022 (arXiv 2203.06386) as far as it is known; README.md lists what is our choice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from vlkd_jax.types import Array


def ttdm(sentence: Array, text: Array) -> tuple[Array, Array]:
    """Text-text distance minimisation: squared L2 distance of sentence [B, E] to the teacher's text [B, E]."""
    distance = jnp.sum(jnp.square(sentence.astype(jnp.float32) - text.astype(jnp.float32)), -1)
    return jnp.sum(distance), jnp.float32(distance.shape[0])


def itcl(image: Array, sentence: Array, scale: Array) -> tuple[Array, Array]:
    """Image-text contrastive loss: symmetric cross-entropy of `scale * image . sentence^T` over the global batch.

    Args:
      image: float [B, E], L2-normalised.
      sentence: float [B, E], L2-normalised.
      scale: float [], the inverse temperature.
    """
    # scale enlarges the products' rounding a hundredfold; the default is TF32 or bfloat16 on accelerators
    products = jnp.einsum("be,ce->bc", image, sentence, precision="highest", preferred_element_type=jnp.float32)
    logits = scale * products
    diagonal = jnp.diagonal(logits)
    per_pair = 0.5 * (jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)) - diagonal
    return jnp.sum(per_pair), jnp.float32(per_pair.shape[0])


def icti(logits: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    """Infilling loss: cross-entropy of logits [B, T, V] against targets [B, T], summed where mask [B, T] is True."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(jnp.where(mask, loss, 0)), jnp.sum(mask, dtype=jnp.float32)


def token_accuracy(logits: Array, targets: Array, mask: Array) -> tuple[Array, Array]:
    """How often the teacher-forced argmax of logits [B, T, V] is the target [B, T], where mask [B, T] is True."""
    right = jnp.argmax(logits, -1) == targets
    return jnp.sum(right & mask, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32)
