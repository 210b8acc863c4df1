"""What commands are made of: options, help with an example, exit codes. Help texts and completion are click's.

Nothing heavy is imported, so that help is answered at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click

from vlkd_jax.runtime import tell

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
CONFIG = "config"
"""Name of the option that names a config; its fields are ml_collections' flags, `--config.FIELD=VALUE`."""


def text(name: str, metavar: str, help: str, **settings: Any) -> click.Option:
    """`--name=METAVAR`; `settings` are click's: default, required, hidden."""
    return click.Option([f"--{name}"], metavar=metavar, help=help, show_default=True, **settings)


def integer(name: str, metavar: str, help: str, minimum: int | None = None, **settings: Any) -> click.Option:
    """A whole number."""
    return text(name, metavar, help, type=click.IntRange(min=minimum), **settings)


def number(name: str, metavar: str, help: str, minimum: float | None = None, **settings: Any) -> click.Option:
    """Any finite number."""
    return text(name, metavar, help, type=click.FloatRange(min=minimum), **settings)


def choice(name: str, help: str, choices: Sequence[str], **settings: Any) -> click.Option:
    """One of some words."""
    return click.Option([f"--{name}"], type=click.Choice(choices), help=help, show_default=True, **settings)


def flag(name: str, help: str) -> click.Option:
    """`--name`, without a value."""
    return click.Option([f"--{name}"], is_flag=True, help=help)


def argument(name: str, metavar: str, several: bool = False, **settings: Any) -> click.Argument:
    """What is given without a name; with `several` all the rest, one at least. Told in the command's description."""
    settings = {"required": True, "nargs": -1 if several else 1, **settings}
    return click.Argument([name], metavar=f"{metavar}..." if several else metavar, **settings)


def config(metavar: str, help: str, overrides: str, required: bool = False) -> tuple[click.Option, click.Option]:
    """`--config`, and for the help `--config.FIELD=VALUE`, which ml_collections reads."""
    return (
        text(CONFIG, metavar, help, required=required),
        click.Option([f"--{CONFIG}.FIELD", "_override"], metavar="VALUE", help=overrides, expose_value=False),
    )


class _Told(click.Command):
    """Whose help is told so that a reader who goes away (`| head`) ends the process without a word."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.callback = _tell_help
        return option


def _tell_help(context: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        tell(context.get_help())
        context.exit()


class Program(_Told, click.Group):
    """Several commands under one name, in the order of their table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Command(_Told):
    """A program of the package.

    Attributes:
      module: whose `main(values)` it is, `values` having an attribute for each option; also what `python -m` runs.
      summary: one line for the list of commands.
      example: the arguments of one use.
      exit_codes: keys of `EXIT_CODES`.
      needs_device: whether it computes with jax.
    """

    def __init__(
        self,
        name: str,
        module: str,
        summary: str,
        description: str,
        options: Sequence[click.Parameter | tuple[click.Option, ...]] = (),
        example: str = "",
        exit_codes: Sequence[int] = (0, 1, 2, 130, 143),
        needs_device: bool = True,
    ):
        self.module, self.summary, self.example = module, summary, example
        self.exit_codes, self.needs_device = exit_codes, needs_device
        params = [param for option in options for param in (option if isinstance(option, tuple) else (option,))]
        self.takes_config = any(param.name == CONFIG for param in params)
        settings = {
            "help_option_names": ["-h", "--help"],
            "max_content_width": COLUMNS,
            "token_normalize_func": lambda name: name.replace("-", "_"),  # --allow-partial is --allow_partial
            "ignore_unknown_options": self.takes_config,  # fields of the config, which `entry` checks
            "allow_extra_args": self.takes_config,
        }
        super().__init__(name, params=params, help=description, short_help=summary, context_settings=settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads `--flagfile`, as the flags of ml_collections do, before the rest."""
        if self.takes_config and any(argument.startswith("--flagfile") for argument in args):
            from absl import flags

            try:
                args = flags.FlagValues().read_flags_from_files(args)
            except flags.Error as e:
                raise click.UsageError(str(e), ctx) from e
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example and the exit codes."""
        with formatter.section("Example"):
            formatter.write(f"{'':>{formatter.current_indent}}{ctx.command_path} {self.example}\n")
        with formatter.section("Exit codes"):
            formatter.write_text(", ".join(f"{code} {EXIT_CODES[code]}" for code in self.exit_codes))

    def invoke(self, ctx: click.Context) -> None:
        """Imports the command's module and runs it."""
        module = importlib.import_module(self.module)  # the command's own imports take seconds
        from vlkd_jax import entry

        entry.execute(module.main, ctx)


def mistake(error: click.ClickException) -> str:
    """One line for what click refuses, with where to look."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split())
    return f"{message} ({context.command_path} --help)" if context else message
