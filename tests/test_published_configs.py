"""BART directories as they were published: what their config.json leaves out or asks for does not change decoding."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import SHARED_DATA, generate, tiny_config

from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.vlkd import VLKD

FORCED = ("forced_bos_token_id", "forced_eos_token_id")


def changed(assets, place, config, generation):
    """A copy of the tiny BART with these two files; `generation` None: without generation_config.json."""
    shutil.copytree(assets / "bart", place / "bart")
    (place / "bart" / "config.json").write_text(json.dumps(config))
    (place / "bart" / "generation_config.json").unlink()
    if generation is not None:
        (place / "bart" / "generation_config.json").write_text(json.dumps(generation))
    return place / "bart"


def first_tokens(assets, bart):
    """(the predictor's first token, its first twelve, the training forward's first) for some prompts, as texts.

    The weights are blown up, so that a decoder that is one position off says something else.
    """
    task = make_task(tiny_config(assets, bart=str(bart)))
    params = jax.tree.map(np.asarray, task.load_params())
    params["bart"] = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params["bart"])
    text, module = task.encoder.bart_text, task.module
    prompts = [text.encode(f"a {size} {color} circle") for size in ("small", "large") for color in ("red", "blue")]
    said = []
    for prompt in prompts:
        ids = np.array([text.wrap(prompt)])
        hidden = module.apply({"params": params}, ids, ids >= 0, method="encode")
        targets = np.array([[text.bos, *prompt, text.pad]])  # as the pipeline makes them
        logits = module.apply({"params": params}, targets, hidden, ids >= 0, method="decode_logits")
        said.append(text.decode([int(np.argmax(logits[0, -1]))]))
    model = VLKD.of(task, params, task.load_frozen(), one_device())
    # the last token is forced to be `</s>`, so of two tokens one is a word
    return (*(generate(model, 8, prompts, prompts, count) for count in (2, 12)), said)


def tiny_values(assets):
    return json.loads((assets / "bart" / "config.json").read_text())


@pytest.fixture(scope="module")
def as_shipped(assets):
    return first_tokens(assets, assets / "bart")


def test_a_directory_that_forces_nothing_decodes_the_same(assets, tmp_path, as_shipped):
    values = {name: value for name, value in tiny_values(assets).items() if name not in FORCED}
    tokens = first_tokens(assets, changed(assets, tmp_path, values, None))
    assert tokens == as_shipped
    assert tokens[0] == tokens[2] and len(set(tokens[1])) > 1


@pytest.mark.shared_data
def test_the_published_bart_large_decodes_as_training_starts(assets, tmp_path, as_shipped):
    """Its own config.json, scaled down: no forced tokens, beams, n-gram bans and four tasks' parameters."""
    published = json.loads((SHARED_DATA / "configs" / "bart-large.json").read_text())
    assert not set(FORCED) & set(published)
    assert {"num_beams", "no_repeat_ngram_size", "task_specific_params", "early_stopping"} <= set(published)
    sizes = ("vocab_size", "d_model", "max_position_embeddings", "num_hidden_layers")
    sizes += tuple(f"{side}_{size}" for side in ("encoder", "decoder") for size in ("layers", "attention_heads"))
    sizes += ("encoder_ffn_dim", "decoder_ffn_dim")
    small = published | {name: value for name, value in tiny_values(assets).items() if name in sizes}
    leaks = {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 12, "length_penalty": 2.0, "max_length": 5}
    for k, generation in enumerate((None, leaks)):
        (tmp_path / str(k)).mkdir()
        assert first_tokens(assets, changed(assets, tmp_path / str(k), small, generation)) == as_shipped
