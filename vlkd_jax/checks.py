"""What the fields of a configuration for training must be, whatever is trained."""

from __future__ import annotations

import functools
import operator

import jax

from vlkd_jax import sharding
from vlkd_jax.configs import base
from vlkd_jax.data.text import PROMPT_FIELDS, check_template
from vlkd_jax.errors import UserError
from vlkd_jax.identity import KEEP
from vlkd_jax.types import ConfigDict

BOUNDS = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "save_every", "keep", "nan_limit"), "[1, inf)"),
    **dict.fromkeys(("seed", "watchdog_seconds", "data.threads", "data.workers"), "[0, inf)"),
    **dict.fromkeys(("data.context_length", "data.examples", "eval.every", "eval.questions"), "[0, inf)"),
    **{
        "data.twins": "[1, inf)",
        "eval.batches": "[1, inf)",
        "data.validation_every": "[2, inf)",
        "student.whiten": "[0, inf)",
    },
    **dict.fromkeys(("data.text_length", "data.source_length", "data.replay_length"), "[3, inf)"),
    **dict.fromkeys(("loss.ttdm", "loss.itcl", "loss.icti", "loss.denoise", "loss.l2"), "[0, inf)"),
    "early_stop.max_drop": "[0, inf)",
    **dict.fromkeys(("optim.lr", "optim.lr_linears", "optim.warmup", "optim.weight_decay"), "[0, inf)"),
    **dict.fromkeys(("corruption.ratio", "corruption.mask_all", "data.complete", "data.max_unusable"), "[0, 1]"),
    **dict.fromkeys(("dropout", "loss.label_smoothing", "optim.b1", "optim.b2"), "[0, 1)"),
    **{
        "optim.clip_norm": "[0, inf)",
        "optim.eps": "(0, inf)",
        "data.smallest_crop": "(0, 1]",
        "corruption.poisson": "(0, inf)",
    },
}
"""The interval in which the value of a config field must lie."""


def check_config(config: ConfigDict) -> None:
    """Raises UserError for fields that are missing and for values that no run can use, naming the field."""
    missing = [name for name in base.get_config() if name not in config]
    if missing:
        raise UserError(f"--config has no field {', '.join(missing)}; start from a config for training, such as folder")
    for field, interval in BOUNDS.items():
        value = functools.reduce(operator.getitem, field.split("."), config)
        low, high = map(float, interval[1:-1].split(","))
        above = low < value or (low == value and interval[0] == "[")
        below = value < high or (value == high and interval[-1] == "]")
        if not (above and below):  # nor is what is no number
            raise UserError(f"config.{field} is {value}; it must lie in {interval}")
    if config.early_stop.metric and not config.eval.every:
        raise UserError("config.early_stop.metric needs evaluations; set config.eval.every to a number of steps")
    if config.optim.schedule not in ("constant", "linear", "cosine"):
        raise UserError(f"config.optim.schedule is {config.optim.schedule!r}; it is one of constant, linear, cosine")
    if config.keep_teacher not in KEEP:
        raise UserError(f"config.keep_teacher is {config.keep_teacher!r}; it is one of {', '.join(KEEP)}")
    for name, filled in PROMPT_FIELDS.items():
        check_template(f"config.prompts.{name}", config.prompts[name], filled)


def check_batch_size(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError when a batch cannot be split over the devices and the parts of an accumulated step."""
    parts = sharding.row_shards(mesh) * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"config.batch_size is {config.batch_size}; it must be a multiple of {parts}, the product of mesh.data "
            f"{mesh.shape['data']}, mesh.fsdp {mesh.shape['fsdp']} and accumulate {config.accumulate}"
        )
