"""Completion of `vlkd`'s commands and options in a shell: `vlkd completion bash`."""

from __future__ import annotations

from types import SimpleNamespace

from click.shell_completion import get_completion_class

from vlkd_jax import entry
from vlkd_jax.cli import PROGRAM
from vlkd_jax.commands import COMMANDS
from vlkd_jax.errors import UserError
from vlkd_jax.runtime import tell

SHELLS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/vlkd.fish"}
"""Shells, and the files that they read when they start."""


def main(values: SimpleNamespace) -> None:
    """Entry point."""
    if values.shell not in SHELLS:
        raise UserError(f"no completion for {values.shell}; it is one of {', '.join(SHELLS)}")
    tell(script(values.shell))


def script(shell: str) -> str:
    """What the shell is to evaluate; its first line says how."""
    made = get_completion_class(shell)(PROGRAM, {}, PROGRAM.name, "_VLKD_COMPLETE")
    return f"# vlkd completion {shell} >> {SHELLS[shell]}\n{made.source()}"


if __name__ == "__main__":
    entry.run(main, COMMANDS["completion"])
