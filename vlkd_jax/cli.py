"""The `vlkd` command: `vlkd train ...` is `python -m vlkd_jax.train ...`, and so on.

Only the commands' options are read here: help is answered without importing jax.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import click

from vlkd_jax.commands import COMMANDS
from vlkd_jax.options import COLUMNS, Program, mistake
from vlkd_jax.runtime import tell, watched


def _tell_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    try:
        tell(f"vlkd {version('vlkd_jax')}")
    except PackageNotFoundError:
        raise click.ClickException(
            "the package vlkd_jax is not installed, so it has no version; pip install -e . in the checkout"
        ) from None
    context.exit()


PROGRAM = Program(
    "vlkd",
    commands=COMMANDS,
    help="Vision-language knowledge distillation, CLIP into BART, in JAX.",
    epilog="Example: vlkd demo --workdir=runs/demo",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_tell_version,
            help="Show the version.",
        )
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": COLUMNS},
    no_args_is_help=False,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command with the arguments after its name; leaves with one line and exit code 2 on a mistake in them.

    Args:
      argv: arguments without the program's name; default: those of the process.
    """
    with watched():  # from here on, as a command's imports take seconds
        try:
            PROGRAM.main(argv, prog_name=PROGRAM.name, standalone_mode=False)
        except click.ClickException as e:
            print(f"error: {mistake(e)}", file=sys.stderr)
            sys.exit(2)
