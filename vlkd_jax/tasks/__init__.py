"""What can be trained: `TASKS` by the name that `config.objective` gives."""

from __future__ import annotations

from vlkd_jax.configs import base
from vlkd_jax.errors import UserError
from vlkd_jax.tasks import classify, contrastive, denoise, distill, seq2seq
from vlkd_jax.tasks.parents import choose
from vlkd_jax.tasks.task import Task
from vlkd_jax.types import ConfigDict

TASKS = {
    "vlkd": distill.make_task,
    "clip_contrastive": contrastive.make_task,
    "bart_denoise": denoise.make_task,
    "classify": classify.make_task,
    "summarize": seq2seq.make_summary_task,
    "caption": seq2seq.make_caption_task,
    "answer": seq2seq.make_answer_task,
}


def make_task(config: ConfigDict) -> Task:
    """The task that a config names. Configurations and tokenizers of its models are read, their weights are not.

    Raises:
      UserError: an unknown objective or option, a directory that cannot be read, sizes that do not fit together; a
        weight for a loss that the objective does not have.
    """
    task, defaults = choose(config, "objective", TASKS)(config), base.get_config().loss
    for name, weight in config.loss.items():
        if weight and weight != defaults[name] and name not in task.weights:
            raise UserError(
                f"config.loss.{name} is {weight}, a loss that {config.objective} does not have; set it to 0"
            )
    return task
