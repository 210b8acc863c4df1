"""The launch scripts and the requirement files: usage, mistakes, set-up steps, and that the files agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])
REFERENCE_ONLY = {"torch", "torchvision", "tensorflow", "pytest", "jaxtyping", "beartype"}


def run(command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def with_venv(path: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "VLKD_VENV": str(path), **more}


def requirements(name: str) -> list[tuple[str, Requirement]]:
    """(the line above, the requirement) of every requirement in the file."""
    lines = (ROOT / name).read_text().splitlines()
    return [
        (above, Requirement(line)) for above, line in zip(["", *lines], lines, strict=False) if line and line[0] != "#"
    ]


def locked(name: str) -> dict[str, str]:
    return dict(line.split("==") for line in (ROOT / name).read_text().splitlines())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_strict(script):
    assert run(["bash", "-n", script]).returncode == 0
    if script.name not in ("setup.sh", "tpu_hosts.sh"):  # sourced into the strict ones
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("name", ["demo.sh", "test.sh"])
def test_help_sets_nothing_up(name, option, tmp_path):
    result = run([ROOT / "launch" / name, option], env=with_venv(tmp_path / "venv"), cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith(f"usage: launch/{name}") and result.stderr == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--wrokdir", "x"], "--wrokdir"),
        (["extra"], "extra"),
        (["--workdir"], "--workdir needs a value"),
        (["--seed="], "--seed needs a value"),
        (["--seed", "abc"], "abc"),
        (["--seed", "-1"], "-1"),
        (["--seed=1.5"], "1.5"),
    ],
)
def test_mistakes_on_the_demo_command_line(arguments, word, tmp_path):
    result = run([ROOT / "launch" / "demo.sh", *arguments], env=with_venv(tmp_path / "venv"))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and word in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.fixture
def checkout(tmp_path) -> Path:
    return make_checkout(tmp_path)


def make_checkout(tmp_path: Path) -> Path:
    """A copy of what set-up reads, in a folder with a space, whose Python only pretends to install."""
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in (
        "requirements.txt",
        "requirements.lock",
        "requirements-dev.txt",
        "requirements-dev.lock",
        "requirements-transformers4.txt",
        "requirements-libtpu.txt",
        "requirements-beam.txt",
        "requirements-lmms-eval.txt",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, root)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3.11"
    fake.write_text(
        f"""#!/bin/bash
echo "$0 $*" >> "{tmp_path}/calls"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
  "-m pip") echo "ERROR: ${{FAKE_PIP_SAYS:-}}" >&2; sleep "${{FAKE_PIP_SLEEPS:-0}}"; exit "${{FAKE_PIP_EXITS:-0}}" ;;
esac
"""
    )
    fake.chmod(0o755)
    return root


@pytest.fixture
def foreign():
    """A checkout that one may read and not write in, and what makes a subprocess such a user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own folders are closed to other users
        root = make_checkout(Path(place))
        (root.parent / "calls").touch()
        (root.parent / "calls").chmod(0o666)
        (root.parent / "mine").mkdir()
        (root.parent / "mine").chmod(0o777)
        root.parent.chmod(0o755)
        if os.geteuid() == 0:
            yield root, {"user": 65534, "group": 65534, "extra_groups": []}
        else:
            root.chmod(0o555)
            yield root, {}
            root.chmod(0o755)


def set_up_foreign(foreign, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    root, user = foreign
    environment = os.environ | {"VLKD_VENV": ""} | environment | {"PATH": f"{root.parent}/bin:{os.environ['PATH']}"}
    return run([root / "launch" / "demo.sh", *argv], cwd=root.parent, env=environment, **user)


def test_a_checkout_of_another_user_is_named(foreign):
    root, _ = foreign
    mine = root.parent / "mine"
    for argv, environment in (
        ([], {}),
        ([f"--workdir={mine}/run"], {}),
        ([], {"VLKD_VENV": f"{mine}/venv"}),
    ):
        result = set_up_foreign(foreign, *argv, **environment)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result
        assert result.stderr.startswith(f"error: cannot write in {root} (owner ")
        assert "VLKD_VENV=DIR for the packages, --workdir DIR for the results" in result.stderr
    assert os.listdir(mine) == []


def test_a_checkout_of_another_user_works_with_places_of_ones_own(foreign):
    """What pip installs from is then a folder of links, as it writes beside what it installs."""
    root, _ = foreign
    mine = root.parent / "mine"
    before = sorted(root.rglob("*"))
    result = set_up_foreign(foreign, f"--workdir={mine}/run", VLKD_VENV=f"{mine}/venv")
    assert (result.returncode, result.stderr) == (0, "")
    told = calls(root)
    assert any(line.endswith(f"--editable {mine}/venv/source") for line in told)
    assert told[-1].startswith(f"{mine}/venv/bin/python -m vlkd_jax demo --workdir={mine}/run ")
    assert {path.name: os.readlink(path) for path in (mine / "venv" / "source").iterdir()} == {
        name: f"{root}/{name}"
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "configs", "vlkd_jax")
    }
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_a_place_that_is_a_file_is_one_line(checkout, script):
    (checkout / "file").touch()
    environment = {**os.environ, "VLKD_VENV": f"{checkout}/file/venv"}
    result = run([checkout / "launch" / script], env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {checkout}/file is no folder; name another place\n"


def test_a_full_disk_is_not_taken_for_a_missing_network(checkout):
    result = set_up(checkout, FAKE_PIP_EXITS="1", FAKE_PIP_SAYS="[Errno 28] No space left on device")
    assert result.returncode == 1 and "No space left" in result.stderr and "network" not in result.stderr


def set_up(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{checkout.parent}/bin:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "VLKD_VENV"} | environment | {"PATH": path}
    return run(
        [checkout / "launch" / "demo.sh", "--seed=3", "--workdir", "out put"], cwd=checkout.parent, env=environment
    )


def test_parity_follows_the_demo(checkout):
    """With --parity: the demo, then the comparison, by a torch that is installed where it is missing."""
    environment = {key: value for key, value in os.environ.items() if key != "VLKD_VENV"}
    environment["PATH"] = f"{checkout.parent}/bin:{os.environ['PATH']}"
    for installed in (True, False):
        if not installed:
            python = checkout / ".venv" / "bin" / "python"
            python.write_text(
                python.read_text().replace('case "$1 $2" in', 'case "$1 $2" in\n  "-c import torch") exit 1 ;;')
            )
        result = run([checkout / "launch" / "demo.sh", "--parity", "--workdir=out"], env=environment, cwd=checkout)
        assert result.returncode == 0 and result.stderr == ""
        made = calls(checkout)
        assert [line.split(" -m vlkd_jax ")[1].split(" --setup")[0] for line in made[-2:]] == [
            f"demo --workdir={checkout}/out --seed=0",
            f"parity {checkout}/out/export",
        ]
        torch = [line.split()[-1] for line in made if " pip install " in line and "torch==" in line]
        assert torch == ([] if installed else [f"torch=={locked('requirements-dev.lock')['torch']}"])


def calls(checkout: Path) -> list[str]:
    log = checkout.parent / "calls"
    lines = log.read_text().splitlines()
    log.unlink()
    return lines


def test_set_up_once_then_run(checkout):
    result = set_up(checkout)
    assert result.returncode == 0 and result.stderr == "", result
    assert len(result.stdout.splitlines()) == 2
    made = calls(checkout)
    python = f"{checkout}/.venv/bin/python"
    assert [line for line in made if " -m venv " in line] == [
        f"{checkout.parent}/bin/python3.11 -m venv {checkout}/.venv"
    ]
    installs = [line.split(" install ")[1] for line in made if " pip install " in line]
    assert [f"-r {checkout}/requirements.lock" in install for install in installs] == [True, False]
    assert f"--editable {checkout}" in installs[1]
    demo = re.escape(f"{python} -m vlkd_jax demo --workdir={checkout.parent}/out put --seed=3 --setup_seconds=")
    assert re.fullmatch(demo + r"\d+", made[-1])

    assert set_up(checkout).stdout == ""
    assert len(calls(checkout)) == 1  # nothing but the demo itself

    with open(checkout / "requirements.lock", "a") as file:
        file.write("more==1\n")
    assert "Setting up" in set_up(checkout).stdout
    assert not any(" -m venv " in line for line in calls(checkout))


def test_no_network_is_one_plain_line(checkout):
    result = set_up(checkout, FAKE_PIP_EXITS="1", FAKE_PIP_SAYS="No matching distribution found for jax")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: could not install the packages")
    assert "network" in result.stderr and "No matching distribution found for jax" in result.stderr
    assert set_up(checkout).returncode == 0


def test_a_set_up_that_was_killed_starts_over(checkout):
    path = f"{checkout.parent}/bin:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "VLKD_VENV"}
    environment |= {"PATH": path, "FAKE_PIP_SLEEPS": "2"}
    process = subprocess.Popen(
        [checkout / "launch" / "demo.sh"], env=environment, stdout=subprocess.PIPE, text=True, cwd=checkout
    )
    while not (checkout / ".venv" / "pyvenv.cfg").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    (checkout / ".venv" / "half").write_text("")
    result = set_up(checkout)
    assert result.returncode == 0 and "starting it over" in result.stdout
    assert not (checkout / ".venv" / "half").exists() and not (checkout / ".venv.installing").exists()


def test_a_folder_that_is_no_environment_is_left_alone(checkout):
    (checkout / "mine").mkdir()
    (checkout / "mine" / "thesis.tex").write_text("")
    result = set_up(checkout, VLKD_VENV=str(checkout / "mine"))
    assert result.returncode == 2 and "not a virtual environment" in result.stderr
    assert result.stderr.count("\n") == 1 and os.listdir(checkout / "mine") == ["thesis.tex"]


def test_no_suitable_python_is_one_plain_line(checkout):
    (checkout.parent / "bin" / "python3.11").write_text("#!/bin/bash\nexit 1\n")
    for name in ("python3", "python3.12", "python3.13", "python3.14"):
        shutil.copy(checkout.parent / "bin" / "python3.11", checkout.parent / "bin" / name)
    result = set_up(checkout)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Python 3.11 or newer") and result.stderr.count("\n") == 1


def test_the_package_imports_no_test_requirement():
    """But types.py, which imports jaxtyping where it is there (tests/test_shape_annotations.py runs it without), the
    model for torch users, and in their functions what compares it and what reads pickles."""
    offenders = []
    for path in sorted((ROOT / "vlkd_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            offenders += [(path.name, name) for name in names if name.split(".")[0] in REFERENCE_ONLY]
    torch = {(file, "torch") for file in ("modeling_vlkd.py", "parity.py", "convert.py")}
    assert {(file, name.split(".")[0]) for file, name in offenders} == {("types.py", "jaxtyping")} | torch


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_has_bounds_and_a_reason(name):
    for reason, requirement in requirements(name):
        assert re.match(r"# \w", reason), f"{requirement}: no reason above it"
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators in ({">=", "<"}, {"=="}), requirement


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_the_lock_satisfies_the_bounds(name):
    versions = {canonicalize_name(package): version for package, version in locked(f"{name}.lock").items()}
    for _, requirement in requirements(f"{name}.txt"):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_locks_are_plain_and_disjoint():
    for name in ("requirements.lock", "requirements-dev.lock"):
        lines = (ROOT / name).read_text().splitlines()
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
        assert lines == sorted(lines, key=str.lower)
    runtime, dev = ({canonicalize_name(key) for key in locked(f"requirements{kind}.lock")} for kind in ("", "-dev"))
    assert not runtime & dev and "torch" in dev


def test_no_host_is_named_in_set_up():
    files = [*SCRIPTS, *ROOT.glob("requirements*"), ROOT / "pyproject.toml"]
    assert [
        path.name for path in files if re.search(r"https?://|--index|--extra-index|find-links", path.read_text())
    ] == []


def test_the_installed_command_and_the_ignored_environment():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vlkd": "vlkd_jax.cli:main"} and project["dynamic"] == ["dependencies"]
    assert sys.version_info >= tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert ".venv/" in (ROOT / ".gitignore").read_text().splitlines()
