"""CLIP's own task (Radford et al. 2021): how the built-in world's teacher was trained."""

from __future__ import annotations

import functools

from vlkd_jax import losses
from vlkd_jax.config import model_directory
from vlkd_jax.data.pipeline import Encoder
from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_clip
from vlkd_jax.models.clip import Clip, example_inputs, normalize_pixels
from vlkd_jax.models.configs import ClipResNetConfig
from vlkd_jax.tasks.parents import DTYPES, choose, read_clip, remat_policy
from vlkd_jax.tasks.task import Frozen, Rng, Task, Terms
from vlkd_jax.types import Batch, ConfigDict, Params


def make_task(config: ConfigDict) -> Task:
    """CLIP, trained to match pictures and captions. Raises UserError: see `vlkd_jax.tasks.make_task`."""
    clip_config, text = read_clip(config)
    if isinstance(clip_config.vision, ClipResNetConfig):
        raise UserError(
            f"{config.clip}: a residual network, whose batch normalisation is frozen here; it can only teach"
        )
    clip = Clip(clip_config, dtype=choose(config, "dtype", DTYPES), remat=remat_policy(config))
    return Task(
        module=clip,
        configs={"clip": clip_config},
        encoder=Encoder(text, clip_config.text.max_position_embeddings, preprocessing=clip_config.preprocessing),
        terms=functools.partial(clip_terms, clip),
        weights={"itcl": 1.0},
        read_params=lambda shardings: load_clip(model_directory(config.clip), shardings)[1],
        example=example_inputs(clip_config),
        new=("logit_scale",),
    )


def clip_terms(clip: Clip, params: Params, frozen: Frozen, batch: Batch, rng: Rng) -> Terms:
    """`itcl` of CLIP's two towers."""
    pixels = normalize_pixels(batch.pixels, clip.config.preprocessing)
    return {"itcl": losses.Pairs(*clip.apply({"params": params}, pixels, batch.clip_ids, batch.clip_mask))}
