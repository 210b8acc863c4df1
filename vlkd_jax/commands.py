"""What every command is told and tells: its options, its help, its exit codes. Flags and help texts come from here.

Nothing heavy is imported, so that help is answered at once.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

EXIT_CODES = {
    0: "done",
    1: "a fault of the program",
    2: "a mistake in what was given",
    3: "training diverged",
    4: "no step within watchdog_seconds, or another process was lost",
    130: "stopped by Ctrl-C",
    143: "stopped by SIGTERM",
}
COLUMNS = 120


@dataclasses.dataclass(frozen=True)
class Option:
    """`--name=VALUE` of a command.

    Attributes:
      value: what stands for the value in the help.
      help: without a full stop; default and "required" are added to it.
      kind: "string", "integer", "number", "choice", or "config", an ml_collections config file.
      default: None: there is none.
      minimum: of an integer or a number.
      choices: of a choice.
      overrides: of a config, the help of `--name.FIELD=VALUE`.
      hidden: not told in the help, for the project's own scripts.
    """

    name: str
    value: str
    help: str
    kind: str = "string"
    default: str | int | float | None = None
    required: bool = False
    minimum: float | None = None
    choices: tuple[str, ...] = ()
    overrides: str = ""
    hidden: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
    """A program of the package.

    Attributes:
      module: what `python -m` runs.
      summary: one line for the list of commands.
      description: one paragraph.
      example: the arguments of one use.
      exit_codes: keys of `EXIT_CODES`.
    """

    module: str
    summary: str
    description: str
    options: tuple[Option, ...]
    example: str
    exit_codes: Sequence[int] = (0, 1, 2, 130, 143)


PROCESSES = (
    Option("coordinator", "HOST:PORT", "address of process 0; SLURM, Open MPI and TPU pods need none of these three"),
    Option("processes", "N", "how many processes run this command together", kind="integer", minimum=1),
    Option("process", "I", "which of them this is, from 0", kind="integer", minimum=0),
    Option("start_seconds", "N", "how long each waits for the others", kind="integer", default=300, minimum=1),
)
"""Options of a command that several processes can run together."""

COMMANDS = {
    "train": Command(
        module="vlkd_jax.train",
        summary="train by a config; the same command again resumes",
        description="Trains by a config. DIR receives config.json, checkpoints/, metrics.jsonl and TensorBoard events; "
        "the same command again goes on from the last checkpoint. Ctrl-C and SIGTERM save the step under way first "
        "(with early_stop.metric the last evaluated step stands); a second one ends at once.",
        options=(
            Option(
                "config",
                "NAME",
                "shapes_vlkd, folder or another config of the package, or the path of your FILE.py",
                kind="config",
                required=True,
                overrides="overrides a field; configs/base.py lists every field",
            ),
            Option("workdir", "DIR", "directory of the run", required=True),
            *PROCESSES,
        ),
        example="--config=shapes_vlkd --workdir=runs/shapes --config.steps=500 --config.optim.lr=3e-5",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
    "evaluate": Command(
        module="vlkd_jax.evaluate",
        summary="zero-shot questions, captions and retrieval with a trained student",
        description="Zero-shot evaluation of the newest checkpoint of a training run, or of a CLIP and a BART before "
        "distillation. OUT receives metrics.json and NAME/predictions.jsonl; the same command again goes on where one "
        "was cut off.",
        options=(
            Option(
                "config",
                "suites:NAME[,NAME]",
                "suites by name, as configs/suites.py lists them, or the path of your FILE.py",
                kind="config",
                required=True,
                overrides="overrides a field of configs/suites.py, such as --config.shapes.questions=700",
            ),
            Option("checkpoint", "DIR", "--workdir of the training run; without it --clip and --bart are evaluated"),
            Option("workdir", "OUT", "directory of the results", required=True),
            Option("clip", "DIR", "a Hugging Face CLIP; with --checkpoint: where the run's lies now, if it has moved"),
            Option("bart", "DIR", "a Hugging Face BART; likewise"),
            *PROCESSES,
        ),
        example="--config=suites:shapes --checkpoint=runs/shapes --workdir=runs/shapes/evaluation",
        exit_codes=(0, 1, 2, 4, 130, 143),
    ),
    "demo": Command(
        module="vlkd_jax.shapes.demo",
        summary="the whole job on the built-in world: train, evaluate, report",
        description="The whole job on the built-in world, on one CPU: evaluates the student as it starts, distils, "
        "evaluates again. DIR receives demo.json, report/index.html, the training run and every prediction.",
        options=(
            Option("workdir", "DIR", "directory that receives everything", required=True),
            Option("seed", "N", "of training and of the held-out questions", kind="integer", default=0, minimum=0),
            Option(
                "setup_seconds",
                "N",
                "how long launch/demo.sh took before, for demo.json",
                kind="number",
                default=0.0,
                hidden=True,
            ),
        ),
        example="--workdir=runs/demo --seed=1",
        exit_codes=(0, 1, 2, 3, 4, 130, 143),
    ),
}
"""The commands of `vlkd`, by name. Programs beside them keep their `Command` in their own module."""


def overview() -> str:
    """The text of `vlkd --help`."""
    lines = _table([(name, command.summary) for name, command in COMMANDS.items()])
    more = _table(
        [("vlkd COMMAND --help", "the options of a command, with an example"), ("vlkd --version", "the version")]
    )
    return "\n".join(
        [
            "usage: vlkd COMMAND --OPTION=VALUE ...",
            *("", "Vision-language knowledge distillation, CLIP into BART, in JAX.", "", *lines, "", *more),
            *("", "example: vlkd demo --workdir=runs/demo"),
        ]
    )


def usage(command: Command, program: str) -> str:
    """The text of `PROGRAM --help`, `program` being what one types to start it."""
    told = [option for option in command.options if not option.hidden]
    overrides = [f"[--{option.name}.FIELD=VALUE ...]" for option in told if option.overrides]
    synopsis = " ".join([program, *map(_synopsis, told), *overrides])
    rows = [(f"--{option.name}={option.value}", option.help + _notes(option)) for option in told]
    rows += [(f"--{option.name}.FIELD=VALUE", option.overrides) for option in told if option.overrides]
    codes = ", ".join(f"{code} {EXIT_CODES[code]}" for code in command.exit_codes)
    sections = [
        textwrap.fill(f"usage: {synopsis}", COLUMNS, subsequent_indent="  ", break_on_hyphens=False),
        textwrap.fill(command.description, COLUMNS, break_on_hyphens=False),
        "\n".join(_table(rows)),
        textwrap.fill(f"exit codes: {codes}", COLUMNS),
        f"example: {program} {command.example}",
    ]
    return "\n\n".join(sections)


def _synopsis(option: Option) -> str:
    text = f"--{option.name}={option.value}"
    return text if option.required else f"[{text}]"


def _notes(option: Option) -> str:
    notes = "" if option.default is None else f" (default {option.default})"
    return " (required)" if option.required else notes


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:{width}}  {right}" for left, right in rows]
