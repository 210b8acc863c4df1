"""The shipped models belong together with their tokenizers and the recipe; and how the recipe's models start."""

import json

import numpy as np
import pytest
from tiny import ROOT

from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.shapes import make_models, world
from vlkd_jax.shapes.sources import ShapesPairs, ShapesTexts

SHIPPED = ROOT / "vlkd_jax" / "shapes" / "models"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The recipe's start, its tokenizers learned from fewer texts."""
    directory, corpus = tmp_path_factory.mktemp("start"), make_models.corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_models, "corpus", lambda seed, count: corpus(seed, count // 20))
        make_models.init_models(directory, seed=0)
    return directory


def sizes(directory):
    """config.json, but for what depends on the vocabulary that was learned."""
    values = json.loads((directory / "config.json").read_text())
    for part in (values, *(value for value in values.values() if isinstance(value, dict))):
        for name in [name for name in part if name == "vocab_size" or name.endswith("_token_id")]:
            del part[name]
    return values


@pytest.mark.parametrize("name", ["clip", "bart"])
def test_the_shipped_models_have_the_recipes_sizes(start, name):
    assert sizes(SHIPPED / name) == sizes(start / name)


@pytest.fixture(scope="module", params=["shipped", "start"])
def directory(request):
    return SHIPPED if request.param == "shipped" else request.getfixturevalue("start")


def texts(count=200):
    pairs, alone = ShapesPairs(0, "train"), ShapesTexts(0, "train")
    return [text for k in range(count) for text in (pairs[k].text, alone[k].text, alone[k].context) if text]


def test_bart_and_its_tokenizer_belong_together(directory):
    (config, params), text = load_bart(directory / "bart"), BartText(directory / "bart")
    assert text.vocab_size == config.vocab_size == len(params["shared"]["embedding"])
    assert (text.bos, text.pad, text.eos) == (config.bos_token_id, config.pad_token_id, config.eos_token_id)
    assert config.forced_bos_token_id == text.bos and config.decoder_start_token_id == config.forced_eos_token_id
    encoded = [text.encode(some) for some in texts()]
    assert [text.decode(ids) for ids in encoded] == texts()
    assert max(map(len, encoded)) + 2 <= config.max_position_embeddings


def test_clip_and_its_tokenizer_belong_together(directory):
    (config, params), text = load_clip(directory / "clip"), ClipText(directory / "clip")
    assert text.vocab_size == config.text.vocab_size == len(params["text_model"]["token_embedding"]["embedding"])
    assert (text.bos, text.pad, text.eos) == (
        config.text.bos_token_id,
        config.text.pad_token_id,
        config.text.eos_token_id,
    )
    captions = [ShapesPairs(0, "train")[k].text for k in range(200)]
    encoded = [text.encode(caption) for caption in captions]
    assert max(map(len, encoded)) <= config.text.max_position_embeddings == make_models.CLIP_POSITIONS
    assert len({tuple(ids) for ids in encoded}) == len({caption.lower() for caption in captions})
    assert config.vision.image_size == world.IMAGE_SIZE


def test_the_words_of_the_world_are_single_tokens_of_the_shipped_models():
    bart, clip = BartText(SHIPPED / "bart"), ClipText(SHIPPED / "clip")
    for word in (*world.COLORS, *world.SHAPES, *world.RADII):
        assert len(bart.encode(f" {word}")) == 1 and len(clip.encode(word)) == 3, word


def test_attention_starts_by_matching_and_copying(start, rng):
    config, params = load_bart(start / "bart")
    attention = params["decoder"]["layers"]["encoder_attn"]
    for layer in range(config.decoder_layers):
        q, k, v, o = (attention[name]["kernel"][layer] for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
        x, y = rng.normal(size=(2, config.d_model))
        np.testing.assert_allclose((x @ q) @ (y @ k), x @ y, atol=1e-4)
        np.testing.assert_allclose(x @ v @ o, x, atol=1e-4)


def test_positions_are_told_apart_and_neighbours_are_alike(start):
    bart = load_bart(start / "bart")[1]["encoder"]["embed_positions"]["embedding"]
    clip = load_clip(start / "clip")[1]["vision_model"]["position_embedding"]["embedding"][1:].reshape(6, 6, -1)
    distance = np.linalg.norm(bart[:, None] - bart[None], axis=-1)
    assert np.all(np.diff(distance[0, :4]) > 0) and distance[~np.eye(len(bart), dtype=bool)].min() > 1
    np.testing.assert_allclose(clip[0, 3] - clip[0, 1], clip[5, 3] - clip[5, 1], atol=1e-6)  # columns apart from rows
    assert np.linalg.norm(clip[0, 1] - clip[0, 0]) < np.linalg.norm(clip[0, 5] - clip[0, 0])
