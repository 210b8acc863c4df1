"""Embeddings with more rows than the tokenizer has tokens: the same results, no row without a token is ever said."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import generate, tiny_config
from transformers import BartForConditionalGeneration

from vlkd_jax.errors import UserError
from vlkd_jax.hf.load import load_bart
from vlkd_jax.hf.save import save_bart
from vlkd_jax.sharding import one_device
from vlkd_jax.tasks import make_task
from vlkd_jax.tasks.parents import PADDING, read_bart, read_clip
from vlkd_jax.vlkd import VLKD

SURPLUS = 49
WORDS = ("red", "blue", "circle", "square", "large", "small", "left", "right")


def padded(assets, place, rows=SURPLUS):
    """A tiny BART whose answers depend on what it reads, and a copy with `rows` rows more, which would always win."""
    config, params = load_bart(assets / "bart")
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)
    save_bart(shutil.copytree(assets / "bart", place / "bart"), config, params)
    model = BartForConditionalGeneration.from_pretrained(place / "bart")
    model.resize_token_embeddings(config.vocab_size + rows)
    model.get_input_embeddings().weight.data[config.vocab_size :] *= 100
    model.final_logits_bias[:, config.vocab_size :] = 1e3
    shutil.copytree(place / "bart", place / "padded")
    model.save_pretrained(place / "padded")
    return place / "bart", place / "padded", model.eval()


def text_model(assets, bart):
    task = make_task(tiny_config(assets, bart=str(bart), objective="bart_denoise", data__source="shapes_texts"))
    return VLKD.of(task, task.load_params(), {}, one_device())


@pytest.mark.parity
def test_surplus_rows_are_never_said(assets, tmp_path, rng):
    import torch

    plain, wide, reference = padded(assets, tmp_path)
    models = [text_model(assets, directory) for directory in (plain, wide)]
    text, rows = models[0].bart_text, reference.config.vocab_size
    assert models[1].bart_text.vocab_size == text.vocab_size == rows - SURPLUS
    sources = [[*text.encode(" ".join(rng.permutation(WORDS)[: 2 + k % 4])), text.mask] for k in range(6)]
    prefixes = [source[: k % 3] for k, source in enumerate(sources)]
    said = [generate(model, 4, sources, prefixes, 8) for model in models]
    assert said[0] == said[1] and len(set(said[0])) > 1
    surplus = list(range(text.vocab_size, rows))
    for source, prefix, answer in zip(sources, prefixes, said[1], strict=True):
        forced = torch.tensor([[reference.config.decoder_start_token_id, text.bos, *prefix]])
        options = {"max_new_tokens": 8, "num_beams": 1, "do_sample": False, "suppress_tokens": surplus}
        ids = reference.generate(torch.tensor([text.wrap(source)]), decoder_input_ids=forced, **options)
        assert answer == text.decode(ids[0, forced.shape[1] :].tolist())
        free = reference.generate(torch.tensor([text.wrap(source)]), decoder_input_ids=forced, max_new_tokens=2)
        assert free[0, forced.shape[1]] >= text.vocab_size  # without the limit such a row is what it says


@pytest.mark.parity
def test_the_losses_are_hugging_faces(assets, tmp_path, rng):
    """Their softmax runs over every row."""
    import torch

    _, wide, reference = padded(assets, tmp_path)
    task = make_task(tiny_config(assets, bart=str(wide), objective="bart_denoise", data__source="shapes_texts"))
    reference.final_logits_bias[:, -SURPLUS:] = 0
    params = task.load_params()
    params["final_logits_bias"] = params["final_logits_bias"] * 0
    ids = rng.integers(5, task.encoder.bart_text.vocab_size, (3, 9))
    logits = task.module.apply({"params": params}, ids, ids > 0, ids)
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(ids)).logits
    assert logits.shape[-1] == reference.config.vocab_size
    np.testing.assert_allclose(logits, theirs, atol=1e-3, rtol=1e-4)


def changed_rows(assets, place, name, change):
    """A copy of assets/NAME whose config.json speaks of `change` more embedding rows."""
    shutil.copytree(assets / name, place / name)
    values = json.loads((place / name / "config.json").read_text())
    part = values["text_config"] if name == "clip" else values
    part["vocab_size"] += change
    (place / name / "config.json").write_text(json.dumps(values))
    return tiny_config(assets, **{name: str(place / name)})


@pytest.mark.parametrize(("name", "read"), [("bart", read_bart), ("clip", read_clip)])
def test_how_many_rows_a_tokenizer_may_lack(assets, tmp_path, name, read):
    for change in (-1, PADDING):
        with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens and config.json's vocab_size is \d+"):
            read(changed_rows(assets, tmp_path / str(change), name, change))
    for change in (1, SURPLUS, PADDING - 1):
        model, text = read(changed_rows(assets, tmp_path / str(change), name, change))
        rows = model.text.vocab_size if name == "clip" else model.vocab_size
        assert rows - text.vocab_size == change


def test_the_legacy_end_of_a_padded_clip(assets, tmp_path):
    """It pools at the largest id of a text, which is the tokenizer's largest, not the table's."""
    config = changed_rows(assets, tmp_path, "clip", SURPLUS)
    values = json.loads((tmp_path / "clip" / "config.json").read_text())
    values["text_config"]["eos_token_id"] = 2
    (tmp_path / "clip" / "config.json").write_text(json.dumps(values))
    clip, text = read_clip(config)
    assert text.eos == text.vocab_size - 1 == clip.text.vocab_size - 1 - SURPLUS


def test_a_bart_without_a_row_for_its_mask(assets, tmp_path):
    """As bart-large-cnn and -xsum: one row less than the tokenizer has tokens, and that one is the mask."""
    config = changed_rows(assets, tmp_path, "bart", -1)
    path = tmp_path / "bart" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    last = next(token for token, number in vocabulary.items() if number == len(vocabulary) - 1)
    vocabulary["<mask>"], vocabulary[last] = vocabulary[last], vocabulary["<mask>"]
    next(token for token in values["added_tokens"] if token["content"] == "<mask>")["id"] = vocabulary["<mask>"]
    path.write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"bart: config.json's vocab_size is .*<mask>.*cannot infill; .*bart-large or"
    ) as e:
        read_bart(config)
    assert "\n" not in str(e.value) and "facebook/bart-base" in str(e.value)
