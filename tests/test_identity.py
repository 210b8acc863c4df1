"""A run goes on, and is evaluated, with the very files it started with, wherever they lie and wherever one stands."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny import tiny_config, write_pictures

from vlkd_jax.errors import UserError
from vlkd_jax.identity import INPUTS_FILE, check_inputs, hash_inputs, record_inputs, with_absolute_paths
from vlkd_jax.runs import load_run, run_config
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD


def other_weights(path):
    """The same tensors in names, shapes and dtypes, one number apart."""
    tensors = safetensors.numpy.load_file(path)
    name = max(tensors, key=lambda k: tensors[k].size)
    tensors[name] = tensors[name] + np.float32(1e-3)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def other_merges(path):
    """The last two merges of the tokenizer change places."""
    values = json.loads(path.read_text())
    values["model"]["merges"][-2:] = values["model"]["merges"][:-3:-1]
    path.write_text(json.dumps(values))


CHANGES = {
    ("clip", "model.safetensors"): other_weights,
    ("bart", "model.safetensors"): other_weights,
    ("clip", "tokenizer.json"): other_merges,
    ("bart", "tokenizer.json"): other_merges,
    ("bart", "generation_config.json"): lambda path: path.write_text("{}"),
}


@pytest.fixture
def models(assets, tmp_path):
    """Copies of the tiny models that may be changed."""
    for name in ("clip", "bart"):
        shutil.copytree(assets / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def started(models):
    """(config, workdir) of a run that has recorded its files."""
    config = with_absolute_paths(tiny_config(models))
    (models / "run").mkdir()
    record_inputs(models / "run", hash_inputs(config))
    return config, models / "run"


def check(workdir, config):
    check_inputs(workdir, config, hash_inputs(config))


@pytest.mark.parametrize("field, name", CHANGES)
def test_a_file_that_changed_is_named(models, started, field, name):
    config, workdir = started
    check(workdir, config)
    before = (models / field / name).read_bytes()
    CHANGES[field, name](models / field / name)
    assert (models / field / name).read_bytes() != before
    with pytest.raises(UserError) as caught:
        check(workdir, config)
    message = str(caught.value)
    assert message.count("sha256") == 1 and f"{models / field / name} ({field}) has changed, sha256 " in message
    assert "another --workdir" in message and "\n" not in message
    (models / field / name).write_bytes(before)
    check(workdir, config)


def test_files_that_went_or_came_are_named_at_once(models, started):
    config, workdir = started
    (models / "bart" / "generation_config.json").unlink()
    (models / "clip" / "added_tokens.json").write_text("{}")
    (models / "clip" / "README.md").write_text("nothing reads this")
    with pytest.raises(UserError) as caught:
        check(workdir, config)
    told = str(caught.value)
    assert "generation_config.json (bart) is gone" in told and "added_tokens.json (clip) is new" in told
    assert "README" not in told


def test_directories_may_move(models, started):
    config, workdir = started
    (models / "clip").rename(models / "teacher")
    with pytest.raises(UserError, match=rf"{models}/clip \(clip\) is gone; where it has moved.*--config\.clip="):
        check(workdir, config)
    config.clip = str(models / "teacher")
    check(workdir, config)


def test_captions_and_texts_are_recorded_too(models):
    (models / "captions.tsv").write_text("a.png\ta circle\n")
    (models / "texts.txt").write_text("one\n")
    texts = {"data__captions": str(models / "captions.tsv"), "data__replay": str(models / "texts.txt")}
    config = with_absolute_paths(tiny_config(models, **texts))
    (models / "run").mkdir()
    record_inputs(models / "run", hash_inputs(config))
    check(models / "run", config)
    (models / "captions.tsv").write_text("a.png\tanother circle\n")
    with pytest.raises(UserError, match=r"captions\.tsv \(data\.captions\) has changed"):
        check(models / "run", config)


def test_a_damaged_record_is_one_line(models, started):
    config, workdir = started
    for content in ("{", "[]", '{"clip": 3}'):
        (workdir / INPUTS_FILE).write_text(content)
        with pytest.raises(UserError, match=r"inputs\.json: not readable"):
            check(workdir, config)


def test_shipped_models_have_hashes_and_no_path():
    config = with_absolute_paths(tiny_config(Path(), clip="builtin:shapes/clip", bart="builtin:shapes/bart"))
    assert (config.clip, config.bart) == ("builtin:shapes/clip", "builtin:shapes/bart")
    hashes = hash_inputs(config)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hashes["clip"]) & set(hashes["bart"])


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """The directory from which a run was started with relative paths; `run` there is its workdir."""
    place = tmp_path_factory.mktemp("trained")
    for name in ("clip", "bart"):
        shutil.copytree(assets / name, place / name)
    (place / "captions.tsv").write_text("\n".join(write_pictures(place / "images", 12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(relative_config(steps=1), "run")
    return place


def relative_config(**changes):
    folder = {"data__source": "folder", "data__captions": "captions.tsv", "data__images": "images"}
    config = tiny_config(Path(), **changes, **folder, keep_teacher="no")  # so that the models of the start are needed
    config.clip, config.bart = "clip", "./bart"
    return config


def from_anywhere(trained, **changes):
    config = relative_config(**changes)
    config.clip, config.bart = str(trained / "clip"), str(trained / "bart")
    config.data.captions, config.data.images = str(trained / "captions.tsv"), str(trained / "images")
    return config


def test_relative_paths_mean_the_same_from_any_directory(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, (_, _, step) = run_config(trained / "run"), load_run(os.path.relpath(trained / "run"))
    assert step == 1 and config.clip == str(trained / "clip") and config.data.images == str(trained / "images")
    (tmp_path / "clip").mkdir()  # of the same name, and not what is meant
    assert load_run(trained / "run")[2] == 1
    monkeypatch.chdir(trained)
    assert int(train(relative_config(steps=2), "run").step) == 2


def test_replaced_weights_neither_resume_nor_evaluate(trained):
    weights = trained / "clip" / "model.safetensors"
    before = weights.read_bytes()
    other_weights(weights)
    config = from_anywhere(trained, steps=3)
    for use in (lambda: train(config, trained / "run"), lambda: load_run(trained / "run")):
        with pytest.raises(UserError, match=r"clip/model\.safetensors \(clip\) has changed"):
            use()
    saved = (trained / "run" / "config.json").read_bytes()
    shutil.copytree(trained / "clip", trained / "other")
    config.clip = str(trained / "other")
    with pytest.raises(UserError, match=r"other/model\.safetensors \(clip\) has changed"):
        train(config, trained / "run")
    assert (trained / "run" / "config.json").read_bytes() == saved  # what was refused has left no trace
    weights.write_bytes(before)
    assert load_run(trained / "run")[2] >= 1


def test_a_run_is_told_where_its_models_moved(trained):
    (trained / "bart").rename(trained / "student")
    with pytest.raises(UserError, match=r"bart.* is gone"):
        load_run(trained / "run")
    config = from_anywhere(trained, steps=3)
    config.bart = str(trained / "student")
    train(config, trained / "run")
    config, (_, _, step) = run_config(trained / "run"), load_run(trained / "run")
    assert config.bart == str(trained / "student") and step == 3


def test_evaluation_is_told_where_the_models_moved(trained, tmp_path):
    """Only the models count there: captions and pictures may be gone."""
    for name in ("clip", "bart"):
        shutil.copytree(trained / ("student" if name == "bart" else name), tmp_path / name)
    shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config |= {"clip": "/absent/clip", "bart": "/absent/bart"}
    config["data"] |= {"captions": "/absent/captions.tsv", "images": "/absent/images"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"/absent/bart \(bart\) is gone.*--bart=DIR.*/absent/clip.*--clip=DIR"):
        load_run(tmp_path / "run")
    places = {"clip": f"{tmp_path}/clip/", "bart": tmp_path / "bart"}
    assert load_run(tmp_path / "run", **places)[2] == load_run(trained / "run")[2]
    model = VLKD.from_run(tmp_path / "run", **places)
    assert model.identity["inputs"] == json.loads((trained / "run" / "inputs.json").read_text())
    other_weights(tmp_path / "clip" / "model.safetensors")
    with pytest.raises(UserError, match=r"clip/model\.safetensors \(clip\) has changed"):
        VLKD.from_run(tmp_path / "run", **places)


def test_everything_a_run_reads_may_move(trained, tmp_path, monkeypatch):
    """A whole run with all that it reads, at another place and under other names, through a link and with slashes."""
    place = tmp_path / "elsewhere"
    shutil.copytree(trained, place)
    (place / "captions.tsv").rename(place / "texts.tsv")
    (place / "images").rename(place / "pictures")
    (tmp_path / "link").symlink_to(place)
    monkeypatch.chdir(place)
    config = relative_config(steps=5)
    config.clip, config.bart = "clip/", "../link/./student//"
    config.data.captions, config.data.images = "run/../texts.tsv", f"{tmp_path}/link/pictures/"
    assert int(train(config, "run").step) == 5
    config = run_config("run")
    assert (config.clip, config.bart) == (f"{place}/clip", f"{place}/student")
    assert (config.data.captions, config.data.images) == (f"{place}/texts.tsv", f"{place}/pictures")
    (place / "texts.tsv").write_text((place / "texts.tsv").read_text() + "\n")
    config.steps = 6
    with pytest.raises(UserError, match=r"texts\.tsv \(data\.captions\) has changed, sha256"):
        train(config, "run")


def test_replayed_texts_may_move_but_not_become_others(models, monkeypatch):
    (models / "texts.txt").write_text("".join(f"a text of {k} words\n" for k in range(40)))
    changes = {"loss__denoise": 0.5, "data__source": "shapes"}
    run = models / "run"
    train(tiny_config(models, **changes, data__replay=str(models / "texts.txt"), steps=1), run)
    (models / "texts.txt").rename(models / "replay.txt")
    moved = tiny_config(models, **changes, data__replay=str(models / "replay.txt"), steps=2)
    assert int(train(moved, run).step) == 2
    other = tiny_config(models, **changes, data__replay="shapes_texts", data__context_length=0, steps=3)
    with pytest.raises(UserError, match=r"shapes_texts \(data\.replay\) is not the file of the start, texts\.txt"):
        train(other, run)
    plain = models / "plain"
    train(tiny_config(models, steps=1), plain)
    with pytest.raises(UserError, match=r"replay\.txt \(data\.replay\) is new"):
        train(moved, plain)


@pytest.mark.parametrize(
    "path, spelt",
    [
        *[("", ""), ("/", "/"), (".", "HERE"), ("..", "HERE/..")],
        *[("a/", "HERE/a"), ("a/../b//", "HERE/b"), ("l/a", "HERE/t/a")],
    ],
)
def test_one_spelling_of_a_path(path, spelt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "t"):
        (tmp_path / name).mkdir()
    (tmp_path / "l").symlink_to("t")
    config = tiny_config(Path())
    config.clip = config.data.captions = path
    config = with_absolute_paths(config)
    expected = os.path.normpath(spelt.replace("HERE", str(tmp_path))) if spelt else ""
    assert config.clip == config.data.captions == expected


def test_a_run_that_saved_nothing_may_begin_with_other_files(models):
    """As after an error at its start, which the new files mend."""
    config = tiny_config(models, steps=1)
    (models / "run").mkdir()
    record_inputs(models / "run", hash_inputs(config))
    other_weights(models / "bart" / "model.safetensors")
    train(config, models / "run")
    check(models / "run", with_absolute_paths(config))
