"""Configs: Hugging Face's published sizes parse and count right, both layouts are read, bad fields are named."""

import dataclasses
import math

import jax
import pytest
import torch

from vlkd_jax.errors import UserError
from vlkd_jax.hf.names import parameter_shapes
from vlkd_jax.models.configs import BartConfig, ClipConfig, ClipTextConfig


def published_clip(text_width, vision_width, projection, patch, size=224):
    """config.json of an OpenAI CLIP, shortened to what differs from Hugging Face's defaults."""
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": text_width // 64}
    vision = {"hidden_size": vision_width, "intermediate_size": 4 * vision_width, "patch_size": patch}
    vision |= {"num_attention_heads": vision_width // 64, "image_size": size}
    vision |= {"num_hidden_layers": 24 if vision_width == 1024 else 12}
    text |= {"eos_token_id": 2, "bos_token_id": 0}
    return {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": projection}


CLIPS = {
    "B/32": (published_clip(512, 768, 512, 32), 151_277_313, 50),
    "B/16": (published_clip(512, 768, 512, 16), 149_620_737, 197),
    "L/14": (published_clip(768, 1024, 768, 14), 427_616_513, 257),
    "L/14@336": (published_clip(768, 1024, 768, 14, 336), 427_944_193, 577),
}
BASE = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12}
BASE |= {"decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
BARTS = {"base": (BASE, 139_420_416), "large": ({}, 406_291_456)}


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parity
@pytest.mark.parametrize("name", CLIPS)
def test_published_clip_sizes(name):
    from transformers import CLIPConfig, CLIPModel

    values, parameters, tokens = CLIPS[name]
    config = ClipConfig.from_hf(values, "config.json")
    assert config.vision.num_tokens == tokens
    with torch.device("meta"):
        reference = CLIPModel(CLIPConfig(**{key: value for key, value in values.items() if key != "model_type"}))
    assert count(parameter_shapes(config)) == parameters == sum(p.numel() for p in reference.parameters())


@pytest.mark.parity
@pytest.mark.parametrize("name", BARTS)
def test_published_bart_sizes(name):
    from transformers import BartConfig as TorchConfig
    from transformers import BartForConditionalGeneration

    values, parameters = BARTS[name]
    config = BartConfig.from_hf({"model_type": "bart", **values}, "config.json")
    with torch.device("meta"):
        reference = BartForConditionalGeneration(TorchConfig(**values))
    shapes = parameter_shapes(config)
    assert count(shapes.pop("final_logits_bias")) == config.vocab_size  # a buffer in torch, so not counted there
    assert count(shapes) == parameters == sum(p.numel() for p in reference.parameters())


def test_absent_keys_are_hugging_faces_defaults():
    from transformers import BartConfig as TorchBart
    from transformers import CLIPConfig as TorchClip

    empty, full = {"model_type": "clip"}, TorchClip().to_dict()
    assert ClipConfig.from_hf(empty, "c") == ClipConfig.from_hf(full, "c")
    assert BartConfig.from_hf({"model_type": "bart"}, "c") == BartConfig.from_hf(TorchBart().to_dict(), "c")


def test_keys_of_early_clip_files_win_over_their_towers():
    early = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    stale = {"hidden_size": 32, "eos_token_id": 2, "vocab_size": 7}
    values = {"model_type": "clip", "text_config": stale, "text_config_dict": early, "vision_config_dict": None}
    config = ClipConfig.from_hf(values, "config.json")
    from transformers import CLIPConfig as TorchClip

    reference = TorchClip(text_config=dict(stale), text_config_dict=early)
    assert config == ClipConfig.from_hf(reference.to_dict(), "config.json")
    assert (config.text.hidden_size, config.text.eos_token_id) == (768, 49407)


def test_forced_first_token_of_old_bart_files():
    old = {"model_type": "bart", "force_bos_token_to_be_generated": True}
    assert BartConfig.from_hf(old, "c").forced_bos_token_id == 0
    assert BartConfig.from_hf({"model_type": "bart", "forced_bos_token_id": 0}, "c").forced_bos_token_id == 0
    assert BartConfig.from_hf({"model_type": "bart"}, "c").forced_bos_token_id is None


def test_lists_of_one_value_are_that_value():
    values = {"model_type": "clip", "vision_config": {"image_size": [96, 96]}, "text_config": {"eos_token_id": [7]}}
    config = ClipConfig.from_hf(values, "config.json")
    assert (config.vision.image_size, config.text.eos_token_id) == (96, 7)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ClipConfig, {"model_type": "bart"}, "model_type is 'bart'.*'clip' model"),
        (BartConfig, {"model_type": "mbart"}, "model_type is 'mbart'.*'bart' model"),
        (BartConfig, {"model_type": None}, "model_type is None"),
        (BartConfig, [], "must be a JSON object"),
        (ClipConfig, {"vision_config": "ViT"}, "vision_config must be a JSON object"),
        (ClipConfig, {"vision_config": {"num_channels": 1}}, r"vision_config.num_channels is 1.*RGB"),
        (ClipConfig, {"vision_config": {"image_size": [224, 196]}}, r"vision_config.image_size is \[224, 196\]"),
        (ClipConfig, {"vision_config": {"patch_size": 300}}, "vision_config.patch_size is 300.*image_size"),
        (ClipConfig, {"text_config": {"hidden_size": 50}}, "text_config.hidden_size is 50.*num_attention_heads"),
        (ClipConfig, {"text_config": {"hidden_act": "swish"}}, "text_config.hidden_act is 'swish'.*quick_gelu"),
        (ClipConfig, {"text_config": {"layer_norm_eps": "tiny"}}, "text_config.layer_norm_eps is 'tiny'"),
        (ClipConfig, {"projection_dim": 0}, "projection_dim is 0; it must be a whole number of at least 1"),
        (BartConfig, {"d_model": 100}, "d_model is 100.*encoder_attention_heads"),
        (BartConfig, {"d_model": True}, "d_model is True"),
        (BartConfig, {"vocab_size": None}, "vocab_size is None"),
        (BartConfig, {"dropout": 1.0}, "dropout is 1.0.*below 1"),
        (BartConfig, {"dropout": float("nan")}, "dropout is nan"),
        (BartConfig, {"scale_embedding": "no"}, "scale_embedding is 'no'"),
        (BartConfig, {"pad_token_id": -1}, "pad_token_id is -1"),
        (BartConfig, {"tie_word_embeddings": False}, "tie_word_embeddings is False.*shares"),
    ],
)
def test_unusable_fields_are_named(cls, values, message):
    if isinstance(values, dict):
        values = {"model_type": "clip" if cls is ClipConfig else "bart", **values}
    with pytest.raises(UserError, match=f"dir/config.json: .*{message}"):
        cls.from_hf(values, "dir/config.json")


def test_configs_are_frozen_and_survive_a_round_trip():
    text = ClipTextConfig(49408, 512, 2048, 12, 8, bos_token_id=None, pad_token_id=None)
    clip = dataclasses.replace(ClipConfig.from_hf({"model_type": "clip"}, "c"), text=text)
    bart = BartConfig.from_hf({"model_type": "bart", "scale_embedding": True, "forced_eos_token_id": None}, "c")
    assert ClipConfig.from_hf(clip.to_hf(), "c") == clip
    assert BartConfig.from_hf(bart.to_hf(), "c") == bart
    with pytest.raises(dataclasses.FrozenInstanceError):
        bart.d_model = 3
