"""Pre-trains the built-in world's CLIP: contrastive, with runs of near-identical scenes as hard negatives."""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.objective = "clip_contrastive"
    config.clip = "builtin:shapes/clip"
    config.steps = 5000
    config.batch_size = 64
    config.data.twins = 8
    config.data.complete = 0.85
    config.optim.lr = 1e-3
    config.optim.warmup = 200
    config.optim.weight_decay = 0.05
    config.eval.every = 500
    config.save_every = 500
    config.log_every = 50
    return config
