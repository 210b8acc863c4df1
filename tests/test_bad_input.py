"""Mistakes on the command line: one `error: ...` line that names file, field and mend, exit code 2, nothing changed."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from tiny import ROOT, arguments, command_line, environment, tiny_config, write_pictures

from vlkd_jax.workdir import claim

WEIGHTS = "model.safetensors"


class Case(NamedTuple):
    """A command line, and what its error line must say."""

    argv: list[str]
    words: list[str]
    full_disk_after: int | None = None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input")


def model(assets, place, name, kind, change):
    """A damaged copy of assets/kind; returns the overrides that name it."""
    directory = place / name
    shutil.copytree(assets / kind, directory)
    change(directory)
    return {kind: str(directory)}


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def one_more_word(directory):
    """config.json and weights stay; the tokenizer learns a word."""
    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    for name in ("tokenizer.json", "vocab.json"):
        values = json.loads((directory / name).read_text())
        vocabulary = values["model"]["vocab"] if "model" in values else values
        vocabulary["extraordinary"] = size
        (directory / name).write_text(json.dumps(values))


def folder(place, name, lines):
    """A folder of eight pictures with captions.tsv holding their lines and `lines`; returns (directory, overrides)."""
    directory = place / name
    pairs = write_pictures(directory, 8)
    (directory / "captions.tsv").write_text("\n".join([*pairs, *lines]) + "\n")
    changes = {"data.source": "folder", "data.captions": str(directory / "captions.tsv"), "data.images": str(directory)}
    return directory, changes | {"data.validation_every": 13}


def model_cases(assets, place):
    def case(name, kind, change, *words):
        changes = model(assets, place, name, kind, change)
        return Case(arguments(assets, place / f"run_{name}", **changes), [changes[kind], *words])

    bart = json.loads((assets / "bart" / "config.json").read_text())["vocab_size"]
    clip_as_bart = arguments(assets, place / "run_clip_as_bart", bart=str(assets / "clip"))
    bart_as_clip = arguments(assets, place / "run_bart_as_clip", clip=str(assets / "bart"))
    return {
        "no weights": case("no_weights", "bart", lambda d: (d / WEIGHTS).unlink(), WEIGHTS, "copy"),
        "no weights of the teacher": case("no_clip", "clip", lambda d: (d / WEIGHTS).unlink(), WEIGHTS, "copy"),
        "truncated weights": case("truncated", "bart", lambda d: truncate(d / WEIGHTS), WEIGHTS, "copy it again"),
        "no config.json": case("no_config", "clip", lambda d: (d / "config.json").unlink(), "config.json"),
        "no tokenizer": case("no_tokens", "bart", remove_tokenizer, "no tokenizer", "vocab.json"),
        "another vocabulary": case("words", "bart", one_more_word, str(bart), str(bart + 1), "vocab_size", "tokenizer"),
        "a CLIP as BART": Case(clip_as_bart, [str(assets / "clip"), "model_type", "clip", "bart"]),
        "a BART as CLIP": Case(bart_as_clip, [str(assets / "bart"), "model_type", "clip", "bart"]),
        "no such directory": Case(arguments(assets, place / "run_absent", clip="/absent/clip"), ["/absent/clip"]),
    }


def remove_tokenizer(directory):
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (directory / name).unlink()


def flag_cases(assets, place):
    plain = arguments(assets, place / "run_flags")
    config = plain[0]
    return {
        "unknown key": Case(
            [*plain, "--config.optim.lr_linear=1"], ["config.optim.lr_linear", "did you mean", "optim.lr_linears"]
        ),
        "unknown group": Case(
            [*plain, "--config.optimm.lr=1"], ["config.optimm.lr", "did you mean", "config.optim.lr"]
        ),
        "unknown, and near to nothing": Case(
            [*plain, "--config.loss.text=1"], ["unknown config key --config.loss.text"]
        ),
        "unknown flag": Case([*plain, "--workdirr=x"], ["workdirr", "workdir"]),
        "a word for a number": Case([*plain, "--config.steps=many"], ["config.steps", "many"]),
        "a fraction for a whole number": Case([*plain, "--config.steps=1.5"], ["config.steps", "1.5"]),
        "a word for a truth value": Case([*plain, "--config.remat=perhaps"], ["config.remat", "perhaps"]),
        "no workdir": Case([config], ["--workdir"]),
        "no config": Case(["--workdir=x"], ["--config"]),
        "no such file": Case(["--config=configs/shapes_vlkd.py.py", "--workdir=x"], ["configs/shapes_vlkd.py.py"]),
        "no such name": Case(["--config", "shapes_vlk", "--workdir=x"], ["shapes_vlk:", "--config=shapes_vlkd"]),
        "no name at all": Case(
            ["--config=", "--workdir=x"],
            ["answer, base, caption, cc3m_vitb16_bartlarge, cc3m_vitl14_bartlarge, folder, glue", "FILE.py"],
        ),
        "no such built-in model": Case(
            arguments(assets, place / "run_builtin", clip="builtin:shapes/klip"),
            ["builtin:shapes/klip", "builtin:shapes/bart, builtin:shapes/clip"],
        ),
        "a name in a flag file": Case([f"--flagfile={flag_file(place)}", "--workdir=x"], ["--config=shapes_vlkd"]),
        "no such flag file": Case(["--flagfile=/absent/flags", "--workdir=x"], ["/absent/flags"]),
        "an argument for a config without": Case(["--config=base:x", "--workdir=x"], ["base.py", "1 was given"]),
        "a config of suites": Case(["--config=suites:shapes", "--workdir=x"], ["steps", "folder"]),
        "an unknown suite": Case(["--config=suites:shape", "--workdir=x"], ["'shape'", "shapes, shapes_seen, vqav2"]),
        **{f"a config file that {name}": config_file(place, name) for name in CONFIG_FILES},
        "a stray word": Case([*plain, "steps=5"], ["steps=5", "--name=value"]),
        "an impossible value": Case([*plain, "--config.optim.schedule=step"], ["config.optim.schedule", "cosine"]),
        "lengths beyond the model": Case(
            [*plain, "--config.data.text_length=65"], ["config.data.text_length is 65", "64 positions"]
        ),
    }


CONFIG_FILES = {
    "is no Python": ("def get_config(:\n", "line 1: SyntaxError"),
    "imports what is not there": ("import os\nimport absent_module\n", "line 2: ModuleNotFoundError"),
    "has no get_config": ("x = 1\n", "get_config"),
    "returns a dict": ("def get_config():\n    return {}\n", "no ConfigDict"),
    "fails": ("def get_config():\n    raise ValueError('my own')\n", "line 2: ValueError: my own"),
    "reads what is not there": ("def get_config():\n    open('/absent')\n", "line 2: FileNotFoundError"),
    "sets an unknown field": (
        "from vlkd_jax.configs import base\n\n"
        "def get_config():\n    c = base.get_config().lock()\n    c.stepz = 1\n    return c\n",
        "line 5: AttributeError: no field stepz; did you mean steps?",
    ),
}


def config_file(place, name):
    text, words = CONFIG_FILES[name]
    path = place / f"{name.replace(' ', '_')}.py"
    path.write_text(text)
    return Case([f"--config={path}", "--workdir=x"], [str(path), words])


def flag_file(place):
    (place / "flags").write_text("--config=shapes_vlk\n")
    return place / "flags"


def folder_cases(assets, place):
    def case(name, lines, *words, change=lambda directory: None, **more):
        directory, changes = folder(place, name, lines)
        change(directory)
        return Case(arguments(assets, place / f"run_{name}", **(changes | more)), [str(directory), *words])

    page, long = "page.jpg\ta red circle", f"0.png\t{'a red circle and ' * 12}"
    return {
        "a missing image": case(
            "missing", ["absent.png\tx"], "captions.tsv line 9", "absent.png not found", "data.images"
        ),
        "a web page": case(
            "page", [page], "line 9: field image", "page.jpg", "does not decode", "drop its line", change=web_page
        ),
        "an empty caption": case(
            "empty", ["0.png\t "], "captions.tsv line 9", "field caption is empty", "write a caption"
        ),
        "a long caption": case(
            "long", [long], "captions.tsv line 9", "field caption has", "tokens", "data.truncate=True"
        ),
        "a folder without its field": Case(
            arguments(assets, place / "run_field", data__source="folder"), ["config.data.captions is empty"]
        ),
    }


def web_page(directory):
    (directory / "page.jpg").write_text("<html><body>404 Not Found</body></html>")


def run_cases(assets, place):
    used, full = place / "run_used", place / "run_disk"
    with claim(used, json.loads(tiny_config(assets).to_json_best_effort())):
        pass
    return {
        "another run's workdir": Case(
            arguments(assets, used, optim__lr=0.5, seed=3),
            [str(used), "config.json", "optim.lr: 0.0001 -> 0.5", "seed: 0 -> 3", "--workdir"],
        ),
        "no space": Case(
            arguments(assets, full, save_every=2),
            [str(full), "no space", "step 4", "step 2 is untouched"],
            2,
        ),
        "a pattern as workdir": Case(arguments(assets, place / "run [1]"), ["run [1]", "holds '['", "another place"]),
        "a file as workdir": Case(arguments(assets, assets / "bart" / "config.json"), ["config.json", "--workdir"]),
    }


GROUPS = {"models": model_cases, "flags": flag_cases, "folders": folder_cases, "runs": run_cases}


def digest(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def results(assets, place):
    """Function group -> {name: (case, result)}; every group runs once, in one process that forks."""

    def run(group):
        cases = GROUPS[group](assets, place)
        lines = json.dumps([{"argv": c.argv, "full_disk_after": c.full_disk_after} for c in cases.values()])
        command = [sys.executable, str(ROOT / "tests" / "command_lines.py")]
        before = digest(assets)
        done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment(), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert digest(assets) == before  # models are read only
        return {name: (case, result) for (name, case), result in zip(cases.items(), json.loads(done.stdout))}

    return run


def check(name, case, result):
    lines = result["err"].strip().splitlines()
    assert result["code"] == 2, (name, result)
    assert len(lines) == 1 and lines[0].startswith("error: "), (name, result["err"])
    assert "Traceback" not in result["out"]
    for word in case.words:
        assert word in lines[0], (name, word, lines[0])


@pytest.mark.parametrize("group", ["models", "flags", "folders"])
def test_one_line_that_names_what_to_mend(results, place, group):
    for name, (case, result) in results(group).items():
        check(name, case, result)
    assert not list(place.glob("run_*/checkpoints/step_*"))


def test_runs_that_would_harm_another(results, place):
    """A workdir of another config is left alone; a full disk leaves the last checkpoint, and the run goes on later."""
    tried = results("runs")
    for name, (case, result) in tried.items():
        check(name, case, result)
    assert json.loads((place / "run_used" / "config.json").read_text())["seed"] == 0
    assert [path.name for path in (place / "run_used").iterdir()] == ["config.json"]
    assert not (place / "run [1]").exists()
    assert [p.name for p in (place / "run_disk" / "checkpoints").iterdir()] == ["step_00000002"]
    again = command_line("train", tried["no space"][0].argv)
    assert again.returncode == 0, again.stderr
    assert "step 2 of 6" in again.stdout and "step 6/6" in again.stdout


@pytest.mark.parametrize("name", ["unknown key", "a web page"])
def test_in_processes_of_their_own(assets, tmp_path, name):
    make = {"unknown key": flag_cases, "a web page": folder_cases}[name]
    case = make(assets, tmp_path)[name]
    done = command_line("train", case.argv)
    check(name, case, {"code": done.returncode, "out": done.stdout, "err": done.stderr})


def test_help_and_entry_points_without_arguments(tmp_path):
    done = command_line("train", ["--help"])
    assert done.returncode == 0 and "--config" in done.stdout and "Traceback" not in done.stderr
    for name, flag in (("hf.random", "--clip_tokenizer"),):
        done = command_line(name, [])
        assert done.returncode == 2 and re.fullmatch(rf"error: Missing option \'{flag}\'.*\n", done.stderr)
