"""BART's own task, text infilling, on texts alone: how the text abilities are learned, kept and measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from vlkd_jax import losses
from vlkd_jax.config import model_directory
from vlkd_jax.hf.load import load_bart
from vlkd_jax.models.bart import Bart, join_memory, shift_right
from vlkd_jax.tasks.parents import DTYPES, choose, read_bart, remat_policy, text_encoder, with_training_rates
from vlkd_jax.tasks.task import Frozen, Rng, Task, Terms
from vlkd_jax.types import Array, ArrayLike, Batch, Bool, ConfigDict, Float, Int, Key, Params


def make_task(config: ConfigDict) -> Task:
    """BART, trained to restore `config.data`'s texts. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    bart_config, text = read_bart(config)
    bart = Bart(
        with_training_rates(bart_config, config), dtype=choose(config, "dtype", DTYPES), remat=remat_policy(config)
    )
    positions, data = bart_config.max_position_embeddings, config.data
    encoder = text_encoder(config, text, positions, context_length=data.context_length)
    ids = jnp.zeros((1, 2), jnp.int32)
    terms = functools.partial(bart_terms, bart)
    return Task(
        module=bart,
        configs={"bart": bart_config},
        encoder=encoder,
        terms=terms,
        weights={"denoise": 1.0},
        read_params=lambda shardings: load_bart(model_directory(config.bart), shardings)[1],
        example=(ids, ids == 0, ids),
        needs_images=False,
        denoise_terms=terms,
        replay_encoder=encoder,
    )


def bart_terms(bart: Bart, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`denoise_terms` with BART's parameters."""
    return bart.apply({"params": params}, batch, rng, rngs=dropout_rngs(rng), method=denoise_terms)


def dropout_rngs(rng: Rng) -> dict[str, Key[Array, ""]] | None:
    """The `rngs` of a Flax module's `apply`; None: no dropout."""
    return None if rng is None else {"dropout": rng}


def denoise_terms(bart: Bart, batch: Batch, rng: Rng) -> Terms:
    """Text-only infilling with a bound BART: the context, where there is one, stands in the memory as an image would.

    Lewis et al. 2020, section 2.2. Terms: `denoise`, the loss, and `token_accuracy`.
    """
    return restoring_terms(bart, batch, bart.encode_all(read_texts(batch), deterministic=rng is None), rng)


def read_texts(batch: Batch) -> list[tuple[Int[ArrayLike, "B _"], Bool[ArrayLike, "B _"]]]:
    """The texts (ids, mask) that the encoder reads of a text-only batch: the corrupted one, and a context if any."""
    context = [] if batch.context_ids is None else [(batch.context_ids, batch.context_mask)]
    return [(batch.source_ids, batch.source_mask), *context]


def restoring_terms(bart: Bart, batch: Batch, states: Sequence[Float[Array, "B _ D"]], rng: Rng) -> Terms:
    """`denoise_terms` from the encoder's states of `read_texts`."""
    memory = states[0], batch.source_mask
    if batch.context_ids is not None:
        memory = join_memory((states[1], batch.context_mask), memory)
    hidden = target_states(bart, batch, memory, rng)
    loss, accuracy = losses.icti(hidden, *bart.output_table(), batch.text_ids, batch.target_mask)
    return {"denoise": loss, "token_accuracy": accuracy}


def target_states(
    bart: Bart, batch: Batch, memory: tuple[Float[ArrayLike, "B M D"], Bool[ArrayLike, "B M"]], rng: Rng
) -> Float[Array, "B T D"]:
    """The decoder's last states of a batch's text, teacher-forced, from what the decoder reads (states, mask)."""
    inputs = shift_right(batch.text_ids, bart.config.decoder_start_token_id)
    return bart.decode(inputs, *memory, deterministic=rng is None)
