"""Special tokens on which tokenizer and model must agree: each that differs is refused, and named."""

import json
import shutil

import pytest
from tiny import tiny_config

from vlkd_jax.errors import UserError
from vlkd_jax.tasks import parents
from vlkd_jax.tasks.parents import read_bart, read_clip

NAMES = {"bos_token_id": "<s>", "pad_token_id": "<pad>", "eos_token_id": "</s>"}
NAMES |= {"decoder_start_token_id": "</s>", "forced_bos_token_id": "<s>", "forced_eos_token_id": "</s>"}


def copy(assets, place, kind, file, change):
    """A config that names a copy of assets/kind whose JSON `file` went through `change`."""
    shutil.copytree(assets / kind, place / kind)
    values = json.loads((place / kind / file).read_text())
    change(values)
    (place / kind / file).write_text(json.dumps(values))
    return tiny_config(assets, **{kind: str(place / kind)})


@pytest.mark.parametrize("field", NAMES)
def test_ids_of_bart(assets, tmp_path, field):
    config = copy(assets, tmp_path, "bart", "config.json", lambda values: values.update({field: 7}))
    (tmp_path / "bart" / "generation_config.json").unlink()
    with pytest.raises(UserError) as caught:
        read_bart(config)
    message = str(caught.value)
    assert str(tmp_path / "bart") in message and f"{field} is 7, the tokenizer's {NAMES[field]} is" in message


def test_every_id_that_differs_is_named_at_once(assets, tmp_path):
    config = copy(
        assets, tmp_path, "bart", "config.json", lambda v: v.update(bos_token_id=1, pad_token_id=0, eos_token_id=3)
    )
    with pytest.raises(UserError, match=r"bos_token_id is 1.*pad_token_id is 0.*eos_token_id is 3"):
        read_bart(config)


def test_bart_may_start_with_its_first_token_and_force_nothing(assets, tmp_path):
    config = copy(assets, tmp_path, "bart", "config.json", lambda v: v.update(decoder_start_token_id=0))
    values = dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"))
    (tmp_path / "bart" / "generation_config.json").write_text(json.dumps(values))
    assert read_bart(config)[0].decoder_start_token_id == 0


def test_tokens_of_bart_that_share_an_id(assets, tmp_path):
    """As after `add_special_tokens` gone wrong: the mask is the padding."""

    def share(values):
        pad = values["model"]["vocab"]["<pad>"]
        mask = values["model"]["vocab"]["<mask>"]
        for token in values["added_tokens"]:
            token["id"] = pad if token["content"] == "<mask>" else token["id"]
        values["model"]["vocab"]["<mask>"] = pad
        values["model"]["vocab"]["unused"] = mask

    config = copy(assets, tmp_path, "bart", "tokenizer.json", share)
    with pytest.raises(UserError, match="the tokenizer has no <mask>"):
        read_bart(config)


@pytest.mark.parametrize("eos", [5, 49407])
def test_a_clip_that_would_pool_its_first_token(assets, tmp_path, eos):
    config = copy(assets, tmp_path, "clip", "config.json", lambda v: v["text_config"].update(eos_token_id=eos))
    with pytest.raises(UserError) as caught:
        read_clip(config)
    message = str(caught.value)
    assert str(tmp_path / "clip") in message and f"eos_token_id is {eos}" in message and "end token is" in message


def test_the_legacy_end_token_pools_at_the_largest_id(assets, tmp_path, monkeypatch):
    """2 in old checkpoints; it works as long as the tokenizer's end token is the largest id, as CLIP's is."""

    def legacy(values):
        values["text_config"]["eos_token_id"] = 2

    clip, text = read_clip(copy(assets, tmp_path, "clip", "config.json", legacy))
    assert clip.text.eos_token_id == 2 and text.eos == clip.text.vocab_size - 1
    text.eos = 5
    monkeypatch.setattr(parents, "ClipText", lambda _: text)
    with pytest.raises(UserError, match="end token 5 is not the largest"):
        read_clip(tiny_config(assets, clip=str(tmp_path / "clip")))
