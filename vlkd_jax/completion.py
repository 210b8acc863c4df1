"""Completion of `vlkd`'s commands and options in a shell: `vlkd completion bash`."""

from __future__ import annotations

from absl import flags

from vlkd_jax import entry
from vlkd_jax.commands import COMMANDS, Command
from vlkd_jax.errors import UserError

BASH = """\
# eval "$(vlkd completion bash)" in ~/.bashrc
_vlkd() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options=""
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{names} --help --version" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options --help" -- "$word"))
    [[ ${{#COMPREPLY[@]}} != 1 || ${{COMPREPLY[0]}} != *= ]] || compopt -o nospace
  else
    compopt -o default
  fi
}}
complete -F _vlkd vlkd
"""
ZSH = """\
# eval "$(vlkd completion zsh)" in ~/.zshrc
autoload -Uz bashcompinit && bashcompinit
"""


def script(shell: str) -> str:
    """What the shell is to evaluate. zsh reads bash's completions."""
    cases = "\n".join(f'    {name}) options="{_options(command)}" ;;' for name, command in COMMANDS.items())
    bash = BASH.format(names=" ".join(COMMANDS), cases=cases)
    return bash if shell == "bash" else ZSH + bash.partition("\n")[2]


def _options(command: Command) -> str:
    told = [option for option in command.options if not option.hidden and not option.kind.startswith("argument")]
    words = [f"--{option.name}" + ("" if option.kind == "flag" else "=") for option in told]
    words += [f"--{option.name}={choice}" for option in told for choice in option.choices]
    return " ".join(words)


def main() -> None:
    """Entry point."""
    shell = flags.FLAGS.shell
    if shell not in ("bash", "zsh"):
        raise UserError(f"no completion for {shell}; it is one of bash, zsh")
    print(script(shell), end="")


if __name__ == "__main__":
    entry.run(main, COMMANDS["completion"])
