"""The student that comes with the package: what `VLKD.from_pretrained()` gives; prompts travel with a model."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import tiny_config

from vlkd_jax.configs import shapes_vlkd
from vlkd_jax.errors import UserError
from vlkd_jax.shapes import world
from vlkd_jax.shapes.suite import scene_match
from vlkd_jax.train import train
from vlkd_jax.vlkd import VLKD


@pytest.fixture(scope="module")
def student():
    return VLKD.from_pretrained()


def test_it_says_what_it_is(capsys):
    model = VLKD.from_pretrained()
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "builtin:shapes/student" in err and "shapes" in err
    assert model.prompts == dict(shapes_vlkd.get_config().prompts)


def test_it_answers_questions_about_scenes_it_never_saw(student):
    """Blind answers to these types are right in a fifth of the cases at most; the demo's student in three quarters."""
    asked = [item for item in world.question_set(11, "test", 700) if item[2].kind in ("color", "position")]
    said = student.answer([world.render(scene) for _, scene, _ in asked], [question.question for *_, question in asked])
    right = np.mean([text == question.answer for text, (*_, question) in zip(said, asked, strict=True)])
    assert len(asked) == 200 and right > 0.6


def test_it_captions_scenes(student):
    scenes = [world.make_scene(11, "test", index) for index in range(40)]
    matches = [
        scene_match(text, [thing.attributes for thing in scene.things])
        for text, scene in zip(student.caption([world.render(scene) for scene in scenes]), scenes, strict=True)
    ]
    right, said, true = np.sum([match[1:] for match in matches], 0)
    assert 2 * right / (said + true) > 0.7


def test_it_is_small(student):
    from vlkd_jax.config import model_directory

    files = [path for path in model_directory("builtin:shapes/student").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert {path.suffix for path in files} == {".json", ".txt", ".safetensors"}


def test_prompts_travel_from_the_run_into_the_export(assets, tmp_path):
    config = tiny_config(assets, steps=1, prompts__caption_decoder="here we see", prompts__caption_encoder="<mask>")
    train(config, tmp_path / "run")
    model = VLKD.from_run(tmp_path / "run")
    model.save_pretrained(tmp_path / "export")
    again = VLKD.from_pretrained(tmp_path / "export")
    assert again.prompts == model.prompts and model.prompts["caption_decoder"] == "here we see"
    picture = np.full((30, 40, 3), 90, np.uint8)
    other = dataclasses.replace(model, prompts=model.prompts | {"caption_decoder": "a picture of"})
    assert (
        again.caption(picture, scores=True)
        == model.caption(picture, scores=True)
        != other.caption(picture, scores=True)
    )


@pytest.mark.parametrize("prompt", ["{question.__class__}", "{answer}", "{", 7, None])
def test_prompts_that_cannot_be_used(student, tmp_path, prompt):
    student.save_pretrained(tmp_path / "export")
    path = tmp_path / "export" / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"question_encoder": prompt}))
    with pytest.raises(UserError, match=r"processor_config\.json: question_encoder"):
        VLKD.from_pretrained(tmp_path / "export")


def test_a_prompt_of_a_run_that_cannot_be_used(assets, tmp_path):
    with pytest.raises(UserError, match=r"config\.prompts\.caption_encoder='\{a\}': nothing is filled in"):
        train(tiny_config(assets, prompts__caption_encoder="{a}"), tmp_path / "run")
