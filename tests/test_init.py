"""`vlkd init`: a config that trains as it stands, with numbers that fit the data."""

import json

import pytest
from tiny import command_line, write_pictures

from vlkd_jax.config import config_path
from vlkd_jax.errors import UserError
from vlkd_jax.init import write_config


@pytest.fixture
def place(assets, tmp_path, monkeypatch):
    """A folder with a space and a quote in its name, with pictures and their captions, and the models' directory."""
    place = tmp_path / "it's mine"
    place.mkdir()
    lines = write_pictures(place / "photos", 24)
    (place / "captions.tsv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return place


def options(place, assets):
    return [
        f"--captions={place / 'captions.tsv'}",
        f"--images={place / 'photos'}",
        f"--clip={assets / 'clip'}",
        f"--bart={assets / 'bart'}",
    ]


def test_it_trains_as_it_stands(place, assets):
    done = command_line("init", [str(place / "new"), *options(place, assets)])
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith(f"wrote {place / 'new' / 'config.py'}: 24 pairs, captions of ")
    assert [line.split()[1] for line in rest if line.startswith("  vlkd ")] == ["doctor", "train", "serve", "export"]
    config = place / "new" / "config.py"
    trained = command_line("train", [f"--config={config}", f"--workdir={place / 'new' / 'run'}", "--config.steps=2"])
    assert trained.returncode == 0, trained.stderr
    assert "passed over" not in trained.stdout and "step 2/2" in trained.stdout
    written = json.loads((place / "new" / "run" / "config.json").read_text())
    longest = int(trained.stdout.split("longest ")[1].split(",")[0])
    assert longest <= written["data"]["text_length"] < longest + 8 and written["batch_size"] == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"captions": "captions.txt"}, "must end in .json"),
        ({"images": "nowhere"}, "not found"),
        ({"clip": "nowhere"}, "nowhere"),
        ({"bart": "photos"}, "photos"),
    ],
)
def test_mistakes_leave_nothing(place, assets, change, told):
    given = {
        "captions": place / "captions.tsv",
        "images": place / "photos",
        "clip": assets / "clip",
        "bart": assets / "bart",
    }
    given |= {name: place / value for name, value in change.items()}
    with pytest.raises(UserError, match=told):
        write_config(place / "new", given["captions"], given["images"], str(given["clip"]), str(given["bart"]))
    assert not (place / "new").exists()


def test_what_is_there_stays(place, assets):
    given = (place / "captions.tsv", place / "photos", str(assets / "clip"), str(assets / "bart"))
    path, _, _ = write_config(place / "new", *given)
    path.write_text("mine")
    with pytest.raises(UserError, match="there already; edit it"):
        write_config(place / "new", *given)
    assert path.read_text() == "mine" and config_path(str(path)) == str(path)
