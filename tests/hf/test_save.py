"""Saving: byte-equal round trips, Hugging Face's own key set, and files that are either old or whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from vlkd_jax.hf import save
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.hf.save import save_bart, save_clip


@pytest.fixture(params=["tiny_bart", "scaled_bart", "tiny_clip", "legacy_clip"])
def trip(request, tmp_path):
    """(torch model and directory, load, save, an empty directory yet to be made)."""
    reference = request.getfixturevalue(request.param)
    functions = (load_bart, save_bart) if "bart" in request.param else (load_clip, save_clip)
    return reference, *functions, tmp_path / "made" / "here"


def keys(path):
    with safe_open(path, "numpy") as file:
        return set(file.keys()), file.metadata()


@pytest.mark.parity
def test_round_trip_keeps_every_byte_and_name(trip):
    reference, load, save_model, directory = trip
    config, params = load(reference.directory)
    save_model(directory, config, params)
    ours, theirs = directory / "model.safetensors", reference.directory / "model.safetensors"
    assert keys(ours) == keys(theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    again, same = load(directory)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parity
def test_hugging_face_loads_what_was_saved(trip):
    from transformers import AutoConfig

    reference, load, save_model, directory = trip
    save_model(directory, *load(reference.directory))
    model, info = type(reference.model).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    ours, theirs = model.state_dict(), reference.model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved, original = AutoConfig.from_pretrained(directory).to_dict(), reference.model.config.to_dict()
    differing = {key for key in saved | original if saved.get(key) != original.get(key)}
    towers = {f"{name}_config" for name in ("text", "vision")} & differing
    inside = {key for name in towers for key in original[name] if saved[name].get(key) != original[name][key]}
    # the towers' own projection_dim is a default that CLIPModel never reads
    assert differing - towers <= {"_name_or_path", "transformers_version", "dtype", "architectures"}
    assert inside <= {"projection_dim", "dtype"}


@pytest.mark.parity
def test_saved_bart_generates_with_its_pins(tiny_bart, tmp_path):
    from transformers import BartForConditionalGeneration

    config, params = load_bart(tiny_bart.directory)
    save_bart(tmp_path, dataclasses.replace(config, forced_bos_token_id=0), params)
    assert load_bart(tmp_path)[0].forced_bos_token_id == 0
    model = BartForConditionalGeneration.from_pretrained(tmp_path)
    pins = model.generation_config
    assert (pins.forced_bos_token_id, pins.forced_eos_token_id, pins.decoder_start_token_id) == (0, 2, 2)
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    settings = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    ours = model.generate(ids, **settings)
    reference = tiny_bart.model.generate(ids, forced_bos_token_id=0, **settings)
    assert ours.tolist() == reference.tolist()
    assert ours[0, 1] == 0


def test_jax_and_bfloat16_parameters_are_written_as_float32(tiny_bart, tmp_path):
    config, params = load_bart(tiny_bart.directory)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    save_bart(tmp_path, config, half)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b)), load_bart(tmp_path)[1], half)


def test_unknown_and_absent_parameters_are_all_named(tiny_bart, tmp_path):
    config, params = load_bart(tiny_bart.directory)
    params = {name: value for name, value in params.items() if name != "shared"} | {"extra": {"kernel": np.ones(1)}}
    with pytest.raises(ValueError, match=r"extra\.kernel, shared\.embedding"):
        save_bart(tmp_path / "new", config, params)
    assert not (tmp_path / "new").exists()


def test_a_failing_write_leaves_the_old_files(tiny_bart, tmp_path, monkeypatch):
    config, params = load_bart(tiny_bart.directory)
    save_bart(tmp_path, config, params)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half_a_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(save.safetensors.numpy, "save_file", half_a_file)
    with pytest.raises(OSError, match="No space left"):
        save_bart(tmp_path, config, jax.tree.map(np.zeros_like, params))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_replaces_what_was_there(tiny_bart, tmp_path):
    config, params = load_bart(tiny_bart.directory)
    save_bart(tmp_path, config, jax.tree.map(np.zeros_like, params))
    save_bart(tmp_path, config, params)
    jax.tree.map(np.testing.assert_array_equal, load_bart(tmp_path)[1], params)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bart"
