"""The `vlkd` command: help without jax, nearest names, the same entry points beneath; from an install and a wheel."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from tiny import ROOT, environment

from vlkd_jax import cli, completion, entry
from vlkd_jax.commands import COMMANDS
from vlkd_jax.hf import random
from vlkd_jax.options import COLUMNS
from vlkd_jax.shapes import make_models

HEAVY = ("jax", "flax", "numpy", "absl", "orbax", "transformers")


def run(*argv, command=("-m", "vlkd_jax")):
    whole = [sys.executable, *command, *argv]
    return subprocess.run(whole, capture_output=True, text=True, env=environment(), cwd=ROOT)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["demo", "-h"]])
def test_help_imports_nothing_heavy(argv):
    code = f"import sys; from vlkd_jax.cli import main; main({argv}); print(*sys.modules)"
    done = run(command=("-c", code))
    assert done.returncode == 0, done.stderr
    told, _, modules = done.stdout.strip().rpartition("\n")
    assert told.startswith("Usage: vlkd ") and "\n  vlkd " in told.replace("Example: ", "\n  ")
    assert not set(HEAVY) & set(modules.split())


def test_version_and_an_unknown_command():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"vlkd {version('vlkd_jax')}\n")
    done = run("trian", "--config=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: No such command 'trian'. Did you mean 'train'? (vlkd --help)\n"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "Missing command. (vlkd --help)"),
        (["evaluation"], "Did you mean 'evaluate'?"),
        (["xyz"], "No such command 'xyz'. (vlkd --help)"),
        (["--workdir=x"], "No such option '--workdir'. (vlkd --help)"),
        (["ask", "--modle=x", "a.png", "what?"], "'--model'?) (vlkd ask --help)"),
        (["serve", "--port=x"], "'x' is not a valid integer range. (vlkd serve --help)"),
    ],
)
def test_refusals_are_one_line(argv, told, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert (leaving.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and told in err


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_runs_its_module(command, monkeypatch):
    """With the values of its example; those of a config are ml_collections'."""
    executed = []
    monkeypatch.setattr(entry, "execute", lambda main, context: executed.append((main, context)))
    cli.main([command.name, *shlex.split(command.example)])
    [(main, context)] = executed
    assert main.__module__ == command.module and context.command_path == f"vlkd {command.name}"
    for word in shlex.split(command.example):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            assert word in context.params.values() or any(
                word in values for values in context.params.values() if values
            )
        elif not name.startswith("config."):
            assert str(context.params[name]) == value if equals else context.params[name] is True
    assert context.args == [word for word in shlex.split(command.example) if word.startswith("--config.")]


PROGRAMS = {**COMMANDS, "make_models": make_models.COMMAND, "random": random.COMMAND}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_tells_every_option_and_an_example(name):
    command = PROGRAMS[name]
    assert importlib.util.find_spec(command.module)
    told = command.get_help(click.Context(command, info_name="PROGRAM", terminal_width=COLUMNS))
    for option in command.params:
        spelled = option.metavar if isinstance(option, click.Argument) else f"--{option.name}"
        if not getattr(option, "hidden", False) and option.expose_value:
            assert spelled in told and (isinstance(option, click.Argument) or option.help)
    assert ("--config.FIELD VALUE" in told) == command.takes_config
    for option in command.params:
        if isinstance(option, click.Argument):  # click gives arguments no help of their own
            assert option.metavar.rstrip(".").partition("|")[0] in command.help
    assert f"PROGRAM {command.example}\n" in told


def test_only_the_demo_hides_an_option():
    hidden = [o.name for command in PROGRAMS.values() for o in command.params if getattr(o, "hidden", False)]
    assert hidden == ["setup_seconds"]


def test_the_list_of_commands():
    """In the order of a user's work, each with its whole summary where there is room."""
    told = cli.PROGRAM.get_help(click.Context(cli.PROGRAM, info_name="vlkd", terminal_width=COLUMNS)).splitlines()
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    first = told.index(rows[0])
    assert told[first : first + len(rows)] == rows


def test_the_real_entry_point_answers():
    done = run("evaluate", "--config=suites:shapes", "--checkpoint=nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Missing option '--workdir'. (vlkd evaluate --help)\n"


def test_help_of_a_module_is_that_of_its_command():
    done = run("--help", command=("-m", "vlkd_jax.train"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("train", "--help").stdout.replace("vlkd train", "python -m vlkd_jax.train")


TINY_RUN = [
    *("--config.steps=1", "--config.batch_size=4", "--config.log_every=1", "--config.eval.every=0"),
    *("--config.student.whiten=0", "--config.loss.denoise=0", "--config.data.replay=", "--config.mesh.data=1"),
]


class Installed(NamedTuple):
    """A Python environment with an installed `vlkd`, used from another directory and without PYTHONPATH."""

    bin: Path
    elsewhere: Path

    def start(self, *command, **options) -> subprocess.Popen[str]:
        settings = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [self.bin / command[0], *command[1:]], cwd=self.elsewhere, env=settings, **(pipes | options)
        )

    def __call__(self, *command) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        with self.start(*command) as process:
            out, err = process.communicate()
        return process.returncode, out, err


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Installed:
    """The environment that runs this test; launch/test.sh installs the checkout there, editable."""
    return Installed(Path(sys.executable).parent, tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def from_wheel(tmp_path_factory) -> Installed:
    """A new environment with a wheel of this checkout: it shares the requirements of this one, and sees no checkout."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("vlkd_jax", "configs"):
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    offline = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    wheel = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", place, place / "source"]
    subprocess.run(wheel, check=True)
    shutil.rmtree(place / "source")
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, "--no-compile", *place.glob("*.whl")], check=True)
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    # a folder on the path is not searched for .pth files: an editable install there stays without effect
    (packages / "requirements.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (place / "elsewhere").mkdir()
    return Installed(place / "env" / "bin", place / "elsewhere")


def test_installed_a_named_config_trains(running):
    code, out, err = running("vlkd", "train", "--config=shapes_vlkd", "--workdir=run", *TINY_RUN)
    assert (code, err) == (0, "") and "step 0 of 1" in out
    written = json.loads((running.elsewhere / "run" / "config.json").read_text())
    assert (written["clip"], written["bart"]) == ("builtin:shapes/clip", "builtin:shapes/bart")


def test_installed_a_users_own_config(running):
    text = "from vlkd_jax.configs import base\n\n\ndef get_config():\n    c = base.get_config()\n    c.steps = -7\n"
    (running.elsewhere / "mine.py").write_text(f"{text}    return c\n")
    code, out, err = running("vlkd", "train", "--config", "mine.py", "--workdir=own")
    assert (code, out, err) == (2, "", "error: config.steps is -7; it must lie in [1, inf)\n")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train", "--config=shapes_vlk", "--workdir=x"], "did you mean --config=shapes_vlkd, which"),
        (["evaluate", "--config=suites:shapes", "--workdir=x", "--checkpoint=nowhere"], "nowhere: no config.json"),
        (
            ["evaluate", "--config=suites:vqav2", "--workdir=x"],
            "give --checkpoint=DIR, or --clip=DIR and",
        ),
        (
            ["evaluate", "--config=suites:vqav2", "--workdir=x", "--clip=a", "--bart=b", "--config.vqav2.images=z"],
            "val2014_annotations.json (config.vqav2.annotations), z (config.vqav2.images); --config.root=DIR tells",
        ),
        (["demo", "--workdir=/dev/null/x"], "/dev/null/x: cannot be used as --workdir"),
    ],
)
def test_installed_mistakes_are_one_line(running, argv, told):
    code, out, err = running("vlkd", *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and told in err
    assert not (running.elsewhere / "x").exists()


def test_a_wheel_holds_all_that_runs_need(from_wheel):
    code = "import vlkd_jax.configs; print(vlkd_jax.__file__, vlkd_jax.configs.__file__)"
    files = from_wheel("python", "-c", code)[1].split()
    assert len(files) == 2 and all(Path(file).is_relative_to(from_wheel.bin.parent) for file in files)
    assert from_wheel("vlkd", "--help")[0] == 0
    assert from_wheel("vlkd", "--version")[1] == f"vlkd {version('vlkd_jax')}\n"
    code, out, err = from_wheel("vlkd", "train", "--config=shapes_vlkd", "--workdir=run", *TINY_RUN)
    assert (code, err) == (0, "") and "step 0 of 1" in out
    assert (from_wheel.elsewhere / "run" / "checkpoints" / "step_00000001").is_dir()


def test_the_demo_of_a_wheel_starts(from_wheel):
    """Up to its training: the models were read and the student looked at by then."""
    code = (
        "from vlkd_jax import entry; from vlkd_jax.shapes import demo; from vlkd_jax.commands import COMMANDS; "
        "entry.run(demo.main, COMMANDS['demo'])"
    )
    told = []
    with from_wheel.start("python", "-c", code, "--workdir=demo", stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            told.append(line)
            if line.startswith("step 0 "):
                process.kill()
                break
    assert told[0].startswith("== 1/4 distillation: ") and told[-1].startswith("step 0 "), "".join(told)


COMPLETE = """
eval "$1"
COMP_WORDS=({words}) COMP_CWORD={number}
_vlkd_completion vlkd
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vlkd", "ev"], ["evaluate"]),
        (["vlkd", "prepare-"], ["prepare-suite"]),
        (["vlkd", "ask", "--sc"], ["--scores"]),
        (["vlkd", "caption", "--method", "b"], ["beam"]),
        (["vlkd", "train", "--config.F"], ["--config.FIELD"]),
        (["vlkd", "nonsense", "--h"], ["--help"]),
    ],
)
def test_completion_in_bash(words, expected):
    """By bash itself and the installed command; what is completed is what the commands have."""
    script = COMPLETE.format(words=" ".join(words), number=len(words) - 1)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", script, "bash", completion.script("bash")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | {"PATH": path})
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, expected, "")


def test_completion_of_three_shells():
    for shell, file in completion.SHELLS.items():
        done = run("completion", shell)
        assert done.returncode == 0 and done.stdout == completion.script(shell) + "\n" and file in done.stdout
    assert run("completion", "tcsh").stderr == "error: no completion for tcsh; it is one of bash, zsh, fish\n"
