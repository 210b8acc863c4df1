"""The recipe of the shipped models: its random start, and that the shipped files are of that recipe."""

import filecmp

import numpy as np
import pytest
from tiny import ROOT

from vlkd_jax import shapes_models
from vlkd_jax.hf.load import load_bart, load_clip

SHIPPED = ROOT / "vlkd_jax" / "shapes" / "models"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start")
    shapes_models.init_models(directory, seed=0)
    return directory


@pytest.mark.parametrize("name", ["clip", "bart"])
def test_the_shipped_tokenizers_and_configs_are_the_recipes(start, name):
    _, changed, missing = filecmp.cmpfiles(
        start / name, SHIPPED / name, [*shapes_models.TOKENIZER_FILES, "config.json"], shallow=False
    )
    assert not changed and not missing


def test_the_shipped_files_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 12e6


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
