"""The `vlkd` command: help without jax, nearest names, and the same entry points beneath."""

import ast
import runpy
import subprocess
import sys
from importlib.metadata import version

import pytest
from tiny import ROOT, environment

from vlkd_jax import cli

HEAVY = ("jax", "flax", "numpy", "absl", "orbax", "transformers")


def run(*argv, command=("-m", "vlkd_jax")):
    whole = [sys.executable, *command, *argv]
    return subprocess.run(whole, capture_output=True, text=True, env=environment(), cwd=ROOT)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["demo", "-h"]])
def test_help_imports_nothing_heavy(argv):
    code = f"import sys; from vlkd_jax.cli import main; main({argv}); print(*sys.modules)"
    done = run(command=("-c", code))
    assert done.returncode == 0, done.stderr
    text, _, modules = done.stdout.strip().rpartition("\n")
    assert text.startswith("usage: vlkd ") and "example: vlkd " in text
    assert not set(HEAVY) & set(modules.split())


def test_version_and_an_unknown_command():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"vlkd {version('vlkd_jax')}\n")
    done = run("trian", "--config=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown command 'trian'; did you mean train? (vlkd --help)\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "no command given; it is one of train, evaluate, demo"),
        (["evaluation"], "did you mean evaluate?"),
        (["xyz"], "it is one of train, evaluate, demo"),
        (["--workdir=x"], "unknown command '--workdir=x'"),
    ],
)
def test_refusals_are_one_line(argv, told, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert (leaving.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and told in err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_runs_its_module_as_main(command, monkeypatch):
    calls = []
    monkeypatch.setattr(runpy, "run_module", lambda name, **options: calls.append((name, options, sys.argv)))
    monkeypatch.setattr(sys, "argv", ["vlkd"])
    cli.main([command, "--workdir=x", "--seed=1"])
    [(name, options, argv)] = calls
    assert (name, options["run_name"]) == (f"vlkd_jax.{command}", "__main__")
    assert argv[1:] == ["--workdir=x", "--seed=1"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_the_flags_there_are(command):
    """Read from the source, which defines them by literal names."""
    tree = ast.parse((ROOT / "vlkd_jax" / f"{command}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    defined = {call.args[0].value for call in calls if call.func.attr.startswith("DEFINE_")}
    told = {
        line.split("=")[0].strip().removeprefix("--")
        for line in cli.COMMANDS[command].splitlines()
        if line.startswith("  --")
    }
    assert told - {"config.FIELD"} == defined - {"setup_seconds"}  # demo.sh passes that one
    required = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "required"]
    for name in ast.literal_eval(required[0]):
        line = next(line for line in cli.COMMANDS[command].splitlines() if line.startswith(f"  --{name}="))
        assert line.endswith("(required)")


def test_the_real_entry_point_answers():
    done = run("evaluate", "--config=configs/suites.py:shapes", "--checkpoint=nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: missing --workdir=...; see --help\n"


def test_help_of_a_module_names_its_flags():
    done = run("--help", command=("-m", "vlkd_jax.train"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The training loop")
    assert "--workdir=...  directory of the run (required)" in done.stdout
