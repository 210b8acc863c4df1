"""Fine-tuning BART to summarise: `vlkd train --config=xsum --config.bart=DIR --config.data.directory=xsum`.

The folder has train.jsonl or train.parquet (document, summary), or lines in train.source and train.target, and the
same of validation. Then `vlkd evaluate --config=suites:xsum --config.root=xsum`. Steps, rate, clipping and label
smoothing are those that BART's authors give for XSum.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.objective = "summarize"
    config.data.source = "documents"
    config.data.source_length = 1024
    config.data.text_length = 64
    config.data.truncate = True
    config.steps = 15_000
    config.batch_size = 256
    config.accumulate = 8
    config.dropout = 0.1
    config.loss.label_smoothing = 0.1
    config.optim.lr = 3e-5
    config.optim.schedule = "linear"
    config.optim.warmup = 500
    config.optim.clip_norm = 0.1
    config.eval.every = 1000
    config.save_every = 1000
    return config
