"""Pre-trains the built-in world's BART on texts alone: descriptions, and questions answered from a description."""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.objective = "bart_denoise"
    config.bart = "builtin:shapes/bart"
    config.steps = 5000
    config.batch_size = 64
    config.data.source = "shapes_texts"
    config.data.text_length = 30
    config.data.source_length = 32
    config.data.context_length = 30
    config.corruption.mask_all = 0.5
    config.optim.lr = 1e-3
    config.optim.warmup = 200
    config.data.replay_length = 32
    config.eval.every = 250
    config.save_every = 500
    config.log_every = 50
    return config
