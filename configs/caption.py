"""Fine-tuning a student on captions: `vlkd train --config=caption --config.start=EXPORT --config.data.captions=...`

Captions and pictures are given as for --config=folder, such as COCO's. What is asked is what the caption suites ask.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.objective = "caption"
    # --config.start=DIR of vlkd export, --config.data.captions=FILE, --config.data.images=DIR
    config.data.source = "folder"
    config.data.source_length = 16
    config.data.text_length = 48
    config.data.truncate = True
    config.steps = 10_000
    config.dropout = 0.1
    config.optim.lr = 1e-5
    config.optim.schedule = "linear"
    config.optim.warmup = 500
    config.eval.every = 500
    return config
