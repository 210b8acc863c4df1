"""Mistakes in suites and in what is asked of `vlkd evaluate`: one line before anything is computed."""

import pytest
from tiny import command_line

from vlkd_jax.configs import suites
from vlkd_jax.errors import UserError
from vlkd_jax.evaluate import check_suites


def chosen(**changes):
    config = suites.get_config("vqav2,coco_caption")
    for name, value in changes.items():
        suite, field = name.split("__")
        config[suite][field] = value
    return config


@pytest.mark.parametrize("template", ["{quesion}", "{", "{}", "{question:d}", "{question.x}", "{question[a]}"])
@pytest.mark.parametrize("field", ["question_encoder", "question_decoder"])
def test_a_template_with_another_field(field, template):
    with pytest.raises(UserError) as caught:
        check_suites(chosen(**{f"vqav2__{field}": template}))
    assert str(caught.value).startswith(f"--config.vqav2.{field}={template!r}: only {{question}} is filled in there")


def test_templates_of_captions_and_of_image_names():
    with pytest.raises(UserError, match=r"coco_caption\.caption_encoder='\{x\}': nothing is filled in there"):
        check_suites(chosen(coco_caption__caption_encoder="{x}"))
    with pytest.raises(UserError, match=r"vqav2\.image_name='\{id\}\.jpg': only \{image_id\} and \{split\}"):
        check_suites(chosen(vqav2__image_name="{id}.jpg"))
    check_suites(chosen(coco_caption__caption_encoder="{{x}} <mask>", vqav2__image_name="{image_id:012d}.jpg"))
    check_suites(suites.get_config("shapes,shapes_seen"))


def test_numbers_and_groups():
    with pytest.raises(UserError, match=r"config\.vqav2\.answer_tokens is 0; it must be at least 1"):
        check_suites(chosen(vqav2__answer_tokens=0))
    config = chosen()
    config.batch_size = 0
    with pytest.raises(UserError, match=r"config\.batch_size is 0"):
        check_suites(config)
    config = chosen()
    config.suites = ("vqav2", "mine")
    with pytest.raises(UserError, match=r"config\.mine is no suite.*one of shapes, vqa, caption"):
        check_suites(config)


def test_a_place_for_the_results_is_looked_at_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    argv = ["--config=suites:shapes", f"--checkpoint={tmp_path}", f"--workdir={tmp_path}/file/out"]
    done = command_line("evaluate", argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: {tmp_path}/file/out: cannot be used as --workdir (Not a directory); choose another "
        "--workdir\n"
    )
