"""Fine-tuning on one of GLUE's tasks: `vlkd train --config=glue --config.bart=DIR --config.data.directory=glue/RTE`.

`--config.data.task=` names the task, rte unless told. Then `vlkd evaluate --config=suites:glue_rte --config.root=glue`.
The rate is of the order that BART's authors used; the steps fit RTE's 2,490 pairs, larger tasks take more.
"""

from ml_collections import ConfigDict

from vlkd_jax.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.objective = "classify"
    config.data.source = "glue"
    config.data.source_length = 128
    config.data.truncate = True
    config.steps = 800
    config.batch_size = 32
    config.dropout = 0.1
    config.optim.lr = 1e-5
    config.optim.lr_linears = 1e-5  # of the head
    config.optim.schedule = "linear"
    config.optim.eps = 1e-8
    config.eval.every = 200
    config.eval.batches = 8
    config.save_every = 400
    return config
