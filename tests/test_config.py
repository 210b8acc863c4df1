"""Names and paths of configs and shipped models, and that the package lists all that it is made of."""

import tomllib
from pathlib import Path

import pytest
from tiny import ROOT

import vlkd_jax.configs
from vlkd_jax.config import config_path, model_directory, with_defaults
from vlkd_jax.configs import base
from vlkd_jax.errors import UserError

SHIPPED = Path(vlkd_jax.configs.__file__).parent


def refusal(function, value):
    with pytest.raises(UserError) as caught:
        function(value)
    return str(caught.value)


def test_names_are_of_the_package_and_paths_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("shapes_vlkd") == str(SHIPPED / "shapes_vlkd.py")
    assert config_path("suites:shapes,vqav2") == f"{SHIPPED / 'suites.py'}:shapes,vqav2"
    Path("shapes_vlkd.py").touch()
    Path("configs").mkdir()
    Path("configs/mine").touch()
    for path in ("shapes_vlkd.py", "./shapes_vlkd.py:a:b", "configs/mine", f"{tmp_path}/shapes_vlkd.py"):
        assert config_path(path) == path.removeprefix("./")
    assert config_path("shapes_vlkd") == str(SHIPPED / "shapes_vlkd.py")


def test_what_is_not_there_is_refused_and_never_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refusal(config_path, "configs/shapes_vlkd.py")
    assert told.startswith("configs/shapes_vlkd.py: no such") and "did you mean --config=shapes_vlkd," in told
    assert "--config=suites:shapes," in refusal(config_path, "configs/suites.py:shapes")
    assert "--config=suites:shapes," in refusal(config_path, "suite:shapes")
    for value in ("", ":", "xyz", "xyz.py", "__init__", "."):
        assert (
            "answer, base, caption, cc3m_vitb16_bartlarge, cc3m_vitl14_bartlarge, folder, glue, shapes_bart, "
            "shapes_clip, shapes_vlkd, suites, xsum" in refusal(config_path, value)
        )


def test_older_runs_are_read():
    """A field that was renamed keeps its value, one that did not exist gets its default."""
    written = base.get_config().to_dict()
    written["loss"] = {"ttdm": 2.0, "text": 0.3}
    del written["dtype"]
    read = with_defaults(written)
    assert read["loss"] == base.get_config().loss.to_dict() | {"ttdm": 2.0, "denoise": 0.3}
    assert read["dtype"] == base.get_config().dtype and "text" in written["loss"]
    assert with_defaults(read) == read


def test_models():
    for name in ("clip", "bart"):
        directory = model_directory(f"builtin:shapes/{name}")
        assert {"config.json", "model.safetensors", "vocab.json"} <= {path.name for path in directory.iterdir()}
    assert model_directory("a/b") == Path("a/b")
    known = ", ".join(f"builtin:shapes/{name}" for name in ("bart", "clip", "student"))
    for name in ("builtin:", "builtin:shapes", "builtin:shapes/../models/clip", "builtin:shapes/x"):
        told = refusal(model_directory, name)
        assert told == f"{name}: no such model in the package; there are {known}"


def test_every_package_and_every_file_of_the_models_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vlkd_jax").rglob("__init__.py")}
    assert {*packages, "vlkd_jax.configs"} == set(settings["packages"])
    data = settings["package-data"]
    assert data.pop("vlkd_jax") == ["py.typed"] and (ROOT / "vlkd_jax" / "py.typed").is_file()
    assert data.pop("vlkd_jax.web") == [path.name for path in (ROOT / "vlkd_jax" / "web").glob("*.html")]
    [(package, patterns)] = data.items()
    root = ROOT.joinpath(*package.split("."))
    listed = {path for pattern in patterns for path in root.glob(pattern)}
    assert listed == {path for path in (root / "models").rglob("*") if path.is_file()}
