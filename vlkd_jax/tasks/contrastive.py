"""CLIP's own task (Radford et al. 2021): how the built-in world's teacher was trained."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlkd_jax import losses
from vlkd_jax.config import model_directory
from vlkd_jax.data.pipeline import Encoder
from vlkd_jax.hf.load import load_clip
from vlkd_jax.models.clip import Clip, example_inputs, normalize_pixels
from vlkd_jax.tasks.parents import DTYPES, choose, read_clip
from vlkd_jax.tasks.task import Frozen, Rng, Task, Terms
from vlkd_jax.types import Batch, Params


def make_task(config: ConfigDict) -> Task:
    """CLIP, trained to match pictures and captions. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    clip_config, text = read_clip(config)
    clip = Clip(clip_config, dtype=choose(config, "dtype", DTYPES), remat=config.remat)
    return Task(
        module=clip,
        configs={"clip": clip_config},
        encoder=Encoder(text, clip_config.text.max_position_embeddings, preprocessing=clip_config.preprocessing),
        terms=functools.partial(clip_terms, clip),
        weights={"itcl": 1.0},
        read_params=lambda: load_clip(model_directory(config.clip))[1],
        example=example_inputs(clip_config),
        new=("logit_scale",),
    )


def clip_terms(clip: Clip, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`itcl` of CLIP's two towers, and `accuracy`: how often a picture's own caption is the nearest of the batch."""
    pixels = normalize_pixels(batch.pixels, clip.config.preprocessing)
    image, sentence, scale = clip.apply({"params": params}, pixels, batch.clip_ids, batch.clip_mask)
    right = jnp.argmax(image @ sentence.T, 1) == jnp.arange(image.shape[0])
    accuracy = jnp.sum(right, dtype=jnp.float32), jnp.float32(image.shape[0])
    return {"itcl": losses.itcl(image, sentence, scale), "accuracy": accuracy}
