"""Loading: every layout Hugging Face writes, and one clear error for everything it cannot be."""

import json
import shlex
import shutil
import struct

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from vlkd_jax.errors import UserError
from vlkd_jax.hf.convert import convert
from vlkd_jax.hf.files import files_read
from vlkd_jax.hf.load import load_bart, load_clip

EMBEDDING = "model.shared.weight"


@pytest.fixture
def bart_copy(tiny_bart, tmp_path):
    """A BART directory to damage."""
    return shutil.copytree(tiny_bart.directory, tmp_path / "bart")


@pytest.fixture
def clip_copy(tiny_clip, tmp_path):
    """A CLIP directory to damage."""
    return shutil.copytree(tiny_clip.directory, tmp_path / "clip")


def edit(directory, change):
    """Rewrite model.safetensors after change(tensors)."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_parameters_are_writable_float32_numpy(tiny_bart, tiny_clip):
    for _, params in (load_bart(tiny_bart.directory), load_clip(str(tiny_clip.directory))):
        for leaf in jax.tree.leaves(params):
            assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 and leaf.flags.writeable


def test_layers_are_stacked_and_kernels_transposed(tiny_bart, tiny_clip):
    _, params = load_bart(tiny_bart.directory)
    layer = tiny_bart.model.model.decoder.layers[1]
    kernel = params["decoder"]["layers"]["encoder_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(kernel[1], layer.encoder_attn.q_proj.weight.detach().numpy().T)
    assert params["encoder"]["embed_positions"]["embedding"].shape == (26, 32)
    _, params = load_clip(tiny_clip.directory)
    assert params["vision_model"]["patch_embedding"]["kernel"].shape == (8 * 8 * 3, 40)
    assert params["logit_scale"].shape == ()


@pytest.mark.parametrize("kind", ["bart", "clip"])
def test_sharded(tiny_bart, tiny_clip, tmp_path, kind):
    reference, load = (tiny_bart, load_bart) if kind == "bart" else (tiny_clip, load_clip)
    reference.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same(load(tmp_path)[1], load(reference.directory)[1])


def test_base_model_prefix_and_absent_bias(tiny_bart, tmp_path):
    tiny_bart.model.model.save_pretrained(tmp_path)
    assert EMBEDDING not in load_file(tmp_path / "model.safetensors")
    config, params = load_bart(tmp_path)
    _, expected = load_bart(tiny_bart.directory)
    assert config.d_model == 32
    assert not params["final_logits_bias"].any()
    same(params, expected | {"final_logits_bias": np.zeros_like(expected["final_logits_bias"])})


def test_tied_copies_and_bookkeeping_are_accepted(tiny_bart, tiny_clip, bart_copy, clip_copy):
    def add(tensors):
        for name in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"):
            tensors[name] = tensors[EMBEDDING].copy()
        tensors["model.encoder.version"] = np.array([3.0], np.float32)

    edit(bart_copy, add)
    same(load_bart(bart_copy)[1], load_bart(tiny_bart.directory)[1])
    edit(bart_copy, lambda tensors: tensors.pop(EMBEDDING) is None or tensors.pop("lm_head.weight"))
    same(load_bart(bart_copy)[1], load_bart(tiny_bart.directory)[1])

    edit(clip_copy, lambda t: t.update({"text_model.embeddings.position_ids": np.arange(20)[None]}))
    same(load_clip(clip_copy)[1], load_clip(tiny_clip.directory)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tiny_bart, bart_copy, dtype):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = bart_copy / "model.safetensors"
    save_torch({name: value.to(dtype) for name, value in load_torch(path).items()}, path)
    expected = jax.tree.map(lambda x: torch.tensor(x).to(dtype).float().numpy(), load_bart(tiny_bart.directory)[1])
    same(load_bart(bart_copy)[1], expected)


def test_generation_config_pins_win(bart_copy):
    path = bart_copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forced_bos_token_id": 5}))
    assert load_bart(bart_copy)[0].forced_bos_token_id == 5
    path.unlink()
    assert load_bart(bart_copy)[0].forced_eos_token_id == 2


def test_every_misfit_is_named_in_one_error(bart_copy):
    def break_all(tensors):
        tensors["model.encoder.extra.weight"] = np.zeros(2, np.float32)
        tensors["qa_outputs.weight"] = np.zeros(2, np.float32)
        tensors["model.decoder.embed_tokens.weight"] = tensors[EMBEDDING] + 1
        tensors["model.encoder.layers.1.fc1.weight"] = tensors["model.encoder.layers.1.fc1.weight"].T.copy()
        tensors["model.encoder.layers.0.fc1.bias"] = np.zeros(48, np.int32)
        del tensors["model.decoder.layers.1.encoder_attn.q_proj.bias"], tensors["model.encoder.layers.2.fc2.bias"]

    edit(bart_copy, break_all)
    with pytest.raises(UserError) as error:
        load_bart(bart_copy)
    message = str(error.value)
    assert "\n" not in message and str(bart_copy) in message
    for part in (
        "missing: model.decoder.layers.1.encoder_attn.q_proj.bias, model.encoder.layers.2.fc2.bias;",
        "unused: model.encoder.extra.weight, qa_outputs.weight;",
        "model.encoder.layers.1.fc1.weight is [32, 48], config.json asks for [48, 32]",
        "model.encoder.layers.0.fc1.bias holds I32",
        "model.decoder.embed_tokens.weight differs from model.shared.weight",
    ):
        assert part in message


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", ["bart", "bart without model.", "clip"])
def test_what_torch_puts_before_every_name_is_passed_over(tiny_bart, tiny_clip, tmp_path, capsys, wrapper, kind):
    """A state dict as `torch.compile` and `DataParallel` leave it, in shards."""
    reference, load = (tiny_clip, load_clip) if kind == "clip" else (tiny_bart, load_bart)
    expected = load(reference.directory)[1]
    shutil.copyfile(reference.directory / "config.json", tmp_path / "config.json")
    tensors = load_file(reference.directory / "model.safetensors")
    if kind == "bart without model.":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    shards = {f"part-{k}.safetensors": dict(list(tensors.items())[k::2]) for k in (0, 1)}
    for file, part in shards.items():
        save_file({wrapper + name: value for name, value in part.items()}, tmp_path / file)
    places = {wrapper + name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    same(load(tmp_path)[1], expected)
    said = capsys.readouterr().out
    assert said == f"{tmp_path}: every weight's name begins with {wrapper}, which is passed over\n"


def test_a_prefix_of_some_names_only_is_a_misfit(bart_copy):
    edit(bart_copy, lambda tensors: tensors.update({"module." + EMBEDDING: tensors.pop(EMBEDDING)}))
    with pytest.raises(UserError, match=r"missing: model\.shared\.weight; unused: module\.model\.shared\.weight\."):
        load_bart(bart_copy)


@pytest.mark.parametrize("kind", ["bart", "clip"])
def test_lists_of_misfits_are_short(bart_copy, clip_copy, kind):
    """An unknown prefix on every name; then every tensor of another shape."""
    directory, load = (bart_copy, load_bart) if kind == "bart" else (clip_copy, load_clip)
    count = len(load_file(directory / "model.safetensors"))

    def rename(tensors):
        for name in list(tensors):
            tensors["student.net." + name] = tensors.pop(name)

    def restore(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("student.net.")] = np.zeros((1, *tensors.pop(name).shape), np.float32)

    edit(directory, rename)
    with pytest.raises(UserError) as error:
        load(directory)
    message = str(error.value)
    assert message.count("student.net.") == 5 and f" and {count - 5} more" in message and len(message) < 1200
    edit(directory, restore)
    with pytest.raises(UserError) as error:
        load(directory)
    message = str(error.value)
    assert message.count("config.json asks for") == 5 and f" and {count - 5} more" in message and "\n" not in message


MERGE = r"an adapter .*not a whole model; merge it into its model first: .*merge_and_unload"


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_has_to_be_merged(bart_copy, clip_copy, file, with_config):
    for directory, load in ((bart_copy, load_bart), (clip_copy, load_clip)):
        (directory / "model.safetensors").unlink()
        (directory / file).write_bytes(b"")
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        if not with_config:
            (directory / "config.json").unlink()
        for use in (load, files_read):
            with pytest.raises(UserError, match=rf"{directory}/adapter_config\.json: {MERGE}"):
                use(directory)


@pytest.mark.parametrize("wrapper", ["base_model.model.", "_orig_mod.base_model.model.", ""])
def test_weights_with_an_adapter_in_them_have_to_be_merged(bart_copy, wrapper):
    def wrap(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            if name.endswith("q_proj.weight"):
                stem = wrapper + name.removesuffix("weight")
                tensors[f"{stem}lora_A.default.weight"] = np.zeros((2, value.shape[1]), np.float32)
                tensors[f"{stem}lora_B.default.weight"] = np.zeros((value.shape[0], 2), np.float32)
                name = name.replace("q_proj.", "q_proj.base_layer.")
            tensors[wrapper + name] = value

    edit(bart_copy, wrap)
    with pytest.raises(UserError, match=MERGE) as error:
        load_bart(bart_copy)
    message = str(error.value)
    assert "\n" not in message and " more)" in message and len(message) < 1000


def test_a_config_of_another_depth_names_the_layers(clip_copy):
    path = clip_copy / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["num_hidden_layers"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"unused: text_model\.encoder\.layers\.1\.layer_norm1\.bias"):
        load_clip(clip_copy)


def test_position_ids_that_do_not_count_are_reported(clip_copy):
    edit(clip_copy, lambda t: t.update({"text_model.embeddings.position_ids": np.zeros((1, 20), np.int64)}))
    with pytest.raises(UserError, match=r"text_model\.embeddings\.position_ids does not count"):
        load_clip(clip_copy)


def test_one_tensor_under_two_names_is_refused(bart_copy):
    edit(bart_copy, lambda tensors: tensors.update({"shared.weight": tensors[EMBEDDING].copy()}))
    with pytest.raises(UserError, match=r"shared\.weight is the same tensor as"):
        load_bart(bart_copy)


@pytest.mark.parametrize("pattern", ["pytorch_model.bin", "pytorch_model-{}.bin", "weights.pt"])
def test_pickles_are_refused_with_a_command_that_works(tiny_bart, bart_copy, pattern):
    (bart_copy / "model.safetensors").unlink()
    state = list(tiny_bart.model.state_dict().items())  # tied tensors included, as torch saves them
    halves = [state[:40], state[40:]] if "{}" in pattern else [state]
    for index, half in enumerate(halves):
        torch.save(dict(half), bart_copy / pattern.format(index))
    torch.save({}, bart_copy / "training_args.bin")
    with pytest.raises(UserError, match="pickled weights are not read; convert them once with: vlkd convert") as error:
        load_bart(bart_copy)
    assert shlex.split(str(error.value).split("convert them once with: ")[1]) == ["vlkd", "convert", str(bart_copy)]
    convert(bart_copy, bart_copy)
    same(load_bart(bart_copy)[1], load_bart(tiny_bart.directory)[1])


@pytest.mark.parametrize("file", ["flax_model.msgpack", "tf_model.h5"])
def test_flax_and_tensorflow_files_are_refused_with_a_command(bart_copy, file):
    (bart_copy / "model.safetensors").rename(bart_copy / file)
    with pytest.raises(UserError, match=rf"{file}: only model.safetensors is read.*python -c .*save_pretrained"):
        load_bart(bart_copy)


def test_the_wrong_model_is_refused(tiny_bart, tiny_clip):
    with pytest.raises(UserError, match=r"config.json: model_type is 'clip'; give .* 'bart' model"):
        load_bart(tiny_clip.directory)
    with pytest.raises(UserError, match=r"config.json: model_type is 'bart'; give .* 'clip' model"):
        load_clip(tiny_bart.directory)


def test_missing_files_are_named(bart_copy, tmp_path):
    with pytest.raises(UserError, match="nowhere: not a directory"):
        load_bart(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.safetensors: not a directory"):
        load_bart(bart_copy / "model.safetensors")
    (bart_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        load_bart(bart_copy)
    (bart_copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        load_bart(bart_copy)
    (bart_copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_bart(bart_copy)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors"}, "model-1.safetensors: no such file, though model.safetensors.index.json names"),
        ({"a": "../../secret.safetensors"}, "shards must lie beside the index"),
        ({"a": 3}, "weight_map must map tensor names to files"),
        ({}, "weight_map must map tensor names to files"),
        (None, "weight_map must map tensor names to files"),
    ],
)
def test_a_bad_index_is_refused(bart_copy, weight_map, message):
    (bart_copy / "model.safetensors").unlink()
    (bart_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        load_bart(bart_copy)


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, -1])
def test_a_truncated_file_is_refused(bart_copy, kept):
    path = bart_copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else kept])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file .*copy it again"):
        load_bart(bart_copy)


def header(shape, offsets, dtype="F32"):
    return json.dumps({EMBEDDING: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (header([2], [0, 8]), 2**62),
        (header([2], [0, 8]), 5),
        (header([10**12], [0, 8]), None),
        (header([2**40, 2**40], [0, 8]), None),
        (header([-2], [0, 8]), None),
        (header([2], [8, 0]), None),
        (header([2], [0, 2**63]), None),
        (header([2], [0, 8], "Q9"), None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b"{" * 100_000, None),
        (header([2], [0, 8]), None),
        (header([8], [0, 8], "F8_E4M3"), None),
    ],
)
def test_a_lying_header_is_refused(bart_copy, text, length):
    path = bart_copy / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file|the weights do not fit"):
        load_bart(bart_copy)
