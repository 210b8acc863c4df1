"""The `vlkd` command: `vlkd train ...` is `python -m vlkd_jax.train ...`, and so on.

Only the entry point is found here, and help is answered without importing jax.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

USAGE = """\
usage: vlkd COMMAND --OPTION=VALUE ...

Vision-language knowledge distillation, CLIP into BART, in JAX.

  train     train by a config; the same command again resumes
  evaluate  zero-shot questions, captions and retrieval with a trained student
  demo      the whole job on the built-in world: train, evaluate, report

  vlkd COMMAND --help   the options of a command, with an example
  vlkd --version        the version

example: vlkd demo --workdir=runs/demo
"""

COMMANDS = {
    "train": """\
usage: vlkd train --config=NAME --workdir=DIR [--config.FIELD=VALUE ...]

Trains by a config. DIR receives config.json, checkpoints/, metrics.jsonl and TensorBoard events; the same command
again goes on from the last checkpoint.

  --config=NAME           shapes_vlkd, folder or another config of the package, or the path of your FILE.py (required)
  --workdir=DIR           directory of the run (required)
  --config.FIELD=VALUE    overrides a field; configs/base.py lists every field

exit codes: 0 done, 2 a mistake in what was given, 3 training diverged

example: vlkd train --config=shapes_vlkd --workdir=runs/shapes --config.steps=500 --config.optim.lr=3e-5
""",
    "evaluate": """\
usage: vlkd evaluate --config=suites:NAME[,NAME] --checkpoint=DIR --workdir=OUT [--config.FIELD=VALUE ...]

Zero-shot evaluation of the newest checkpoint of a training run. OUT receives metrics.json and NAME/predictions.jsonl.

  --config=suites:NAMES   suites by name: shapes, vqav2, coco_caption (required)
  --checkpoint=DIR        --workdir of the training run (required)
  --workdir=OUT           directory of the results (required)
  --config.FIELD=VALUE    overrides a field of configs/suites.py, such as --config.shapes.questions=700

example: vlkd evaluate --config=suites:shapes --checkpoint=runs/shapes --workdir=runs/shapes/evaluation
""",
    "demo": """\
usage: vlkd demo --workdir=DIR [--seed=N]

The whole job on the built-in world, on one CPU: evaluates the student as it starts, distils, evaluates again.
DIR receives demo.json, report/index.html, the training run and every prediction.

  --workdir=DIR           directory that receives everything (required)
  --seed=N                of training and of the held-out questions (default 0)

example: vlkd demo --workdir=runs/demo --seed=1
""",
}

MODULES = {"train": "vlkd_jax.train", "evaluate": "vlkd_jax.evaluate", "demo": "vlkd_jax.shapes.demo"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command with the arguments after its name; leaves with exit code 2 on an unknown one or none.

    Args:
      argv: arguments without the program's name; default: those of the process.
    """
    command, *rest = (list(sys.argv[1:] if argv is None else argv)) or [""]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "--version":
        print(f"vlkd {_version()}")
    elif command not in COMMANDS:
        _refuse(_unknown(command))
    elif {"-h", "--help"} & set(rest):
        print(COMMANDS[command], end="")
    else:
        sys.argv = [f"vlkd {command}", *rest]
        runpy.run_module(MODULES[command], run_name="__main__", alter_sys=True)


def _version() -> str:
    try:
        return version("vlkd_jax")
    except PackageNotFoundError:
        _refuse("the package vlkd_jax is not installed, so it has no version; pip install -e . in the checkout")


def _unknown(command: str) -> str:
    if not command:
        return f"no command given; it is one of {', '.join(COMMANDS)} (vlkd --help)"
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(COMMANDS)}"
    return f"unknown command {command!r}; {meant} (vlkd --help)"


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
