"""Directories from strangers: nothing in them is executed, nothing is written outside, each is one error.

Every file that could run something would make a canary file; no test may find it.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import ROOT, environment

from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import UserError
from vlkd_jax.hf.convert import convert
from vlkd_jax.hf.export import export
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.hf.student import load_student
from vlkd_jax.vlkd import VLKD


class Bomb:
    """Unpickled, it makes its file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A file that must not come to be."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture
def bart(assets, tmp_path):
    return shutil.copytree(assets / "bart", tmp_path / "bart")


@pytest.fixture
def clip(assets, tmp_path):
    return shutil.copytree(assets / "clip", tmp_path / "clip")


def write_pickle(path, value, kind):
    if kind == "plain":
        path.write_bytes(pickle.dumps(value))
    elif kind == "torch":
        torch.save(value, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", ["plain", "torch", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "consolidated.00.pth"])
def test_pickles_run_nothing(bart, canary, kind, name):
    weights = {k: torch.tensor(v) for k, v in load_file(bart / "model.safetensors").items()}
    (bart / "model.safetensors").unlink()
    write_pickle(bart / name, weights | {"bomb": Bomb(canary)}, kind)
    with pytest.raises(UserError, match="pickled weights are not read; convert them once with: vlkd convert"):
        load_bart(bart)
    with pytest.raises(UserError, match=f"{name}: not a file of tensors alone, and nothing else in it is run"):
        convert(bart, bart)
    assert not (bart / "model.safetensors").exists()


def test_a_program_is_no_file_of_weights(bart, canary):
    """OpenAI's own .pt files are TorchScript: programs with weights in them."""
    (bart / "model.safetensors").unlink()
    torch.jit.script(torch.nn.Linear(2, 2)).save(bart / "RN50.pt")
    with pytest.raises(UserError, match=r"RN50\.pt: not a file of tensors alone"):
        convert(bart, bart)


@pytest.mark.parametrize("member", ["../canary", "/tmp/vlkd-canary", "archive/data/../../../canary"])
def test_archives_write_nothing(bart, canary, member):
    """A torch file is a zip: names that leave it, and a link, are no places to write to."""
    (bart / "model.safetensors").unlink()
    with zipfile.ZipFile(bart / "pytorch_model.bin", "w") as archive:
        archive.writestr(member, "x")
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        link = zipfile.ZipInfo("archive/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(canary))
    with pytest.raises(UserError, match="not a file of tensors alone"):
        convert(bart, bart)
    assert not os.path.exists("/tmp/vlkd-canary")


def test_convert(bart, tmp_path):
    """Tensors come out as they went in, also views and ties, wrapped or in shards; what is there is not overwritten."""
    weights = load_file(bart / "model.safetensors")
    tensors = {name: torch.tensor(value) for name, value in weights.items()}
    tensors["lm_head.weight"] = tensors["model.shared.weight"]
    tensors["final_logits_bias"] = tensors["final_logits_bias"].expand(1, -1)[:, :]
    with pytest.raises(UserError, match="no pickled weights"):
        convert(bart, tmp_path / "out")
    (bart / "model.safetensors").rename(tmp_path / "kept")
    torch.save({"epoch": 3, "state_dict": tensors}, bart / "pytorch_model.bin")
    convert(bart, tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    assert load_bart(tmp_path / "out")[0] == load_bart_config_of(tmp_path, bart)
    with pytest.raises(UserError, match="is there already; name another --output"):
        convert(bart, tmp_path / "out")
    for wrong, message in (({"a": torch.ones(1), "step": 3}, "also holds step"), ([torch.ones(1)], "holds a list")):
        torch.save(wrong, bart / "pytorch_model.bin")
        with pytest.raises(UserError, match=message):
            convert(bart, tmp_path / "other")
    torch.save({"a": torch.ones(1)}, bart / "pytorch_model.bin")
    torch.save({"a": torch.ones(1)}, bart / "more.bin")
    with pytest.raises(UserError, match="another file has a too"):
        convert(bart, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def load_bart_config_of(tmp_path, bart):
    shutil.copy(tmp_path / "kept", bart / "model.safetensors")
    config = load_bart(bart)[0]
    (bart / "model.safetensors").unlink()
    return config


def header(entries: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + data


ENTRY = '"{}":{{"dtype":"F32","shape":[2],"data_offsets":[{},{}]}}'
LIES = {
    "overlap": header("{" + ENTRY.format("a", 0, 8) + "," + ENTRY.format("b", 4, 12) + "}", bytes(12)),
    "hole": header("{" + ENTRY.format("a", 8, 16) + "}", bytes(16)),
    "2**63 bytes": header('{"a":{"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]}}', bytes(8)),
    "2**62 floats": header('{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}', bytes(8)),
    "beyond the end": header("{" + ENTRY.format("a", 0, 1 << 62) + "}", bytes(8)),
    "backwards": header("{" + ENTRY.format("a", 8, 0) + "}", bytes(8)),
    "header of 2**63 bytes": struct.pack("<Q", 1 << 63) + bytes(64),
    "same name twice": header("{" + ENTRY.format("a", 0, 8) + "," + ENTRY.format("a", 8, 16) + "}", bytes(16)),
    "no JSON": header("{'a': __import__('os').system('true')}", bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("load", [load_bart, load_clip])
def test_lying_headers_are_one_error(bart, clip, lie, load):
    directory = bart if load is load_bart else clip
    (directory / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(UserError) as error:
        load(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_stands_twice_in_a_header_is_no_choice(bart):
    """Two entries of one name: readers differ in which they take, so neither is."""
    weights = load_file(bart / "model.safetensors")
    data = (bart / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].decode().rstrip()
    name = "final_logits_bias"
    entry = json.loads(text)[name]
    twice = text[:-1] + f',"{name}":{json.dumps(entry)}}}'
    (bart / "model.safetensors").write_bytes(header(twice, data[8 + length :]))
    assert name in weights
    with pytest.raises(UserError, match=f"{name} stands twice in its header"):
        load_bart(bart)


def test_code_beside_the_weights_is_not_run(assets, bart, clip, canary):
    """`auto_map` in every file that may have one, and a module of that name, for both models and their tokenizers."""
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n\n\nclass Evil:\n    pass\n"
    auto = {f"Auto{kind}": "evil.Evil" for kind in ("Config", "Model", "ModelForSeq2SeqLM", "Processor")}
    auto |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"}
    for directory in (bart, clip):
        (directory / "evil.py").write_text(code)
        (directory / "__init__.py").write_text(code)
        (directory / "setup.py").write_text(code)
        for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            path = directory / name
            values = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(values | {"auto_map": auto, "trust_remote_code": True}))
    model = VLKD.from_pair(clip, bart)
    same = VLKD.from_pair(assets / "clip", assets / "bart")
    assert model.bart_text.encode("a red circle") == same.bart_text.encode("a red circle")
    assert BartText(bart).vocab_size and ClipText(clip).eos


def test_a_model_card_is_only_text(bart, clip, canary, tmp_path):
    """Tags of YAML in a parent's card; the export's card quotes a line of it at most."""
    tag = f'!!python/object/apply:os.system ["touch {canary}"]'
    for directory in (bart, clip):
        (directory / "README.md").write_text(f"---\nx: {tag}\nlicense: {tag}\n---\n")
    model = VLKD.from_pair(clip, bart)
    export(model, tmp_path / "HF")
    assert "os.system" in (tmp_path / "HF" / "README.md").read_text()
    load_student(tmp_path / "HF")


@pytest.mark.parametrize("how", ["VLKD.from_export", "torch", "commands"])
def test_code_in_an_export_is_not_run(bart, clip, canary, tmp_path, how):
    """An export from a stranger has a modeling_vlkd.py of his own: only trust_remote_code=True runs it."""
    export(VLKD.from_pair(clip, bart), tmp_path / "HF")
    (tmp_path / "HF" / "modeling_vlkd.py").write_text(f"import os\nos.system('touch {canary}')\n")
    if how == "VLKD.from_export":
        VLKD.from_export(tmp_path / "HF")
    elif how == "torch":
        from vlkd_jax.hf.modeling_vlkd import VLKDForConditionalGeneration, VLKDProcessor

        VLKDForConditionalGeneration.from_pretrained(tmp_path / "HF")
        VLKDProcessor.from_pretrained(tmp_path / "HF")
    else:
        command = [sys.executable, "-m", "vlkd_jax.hf.import_", str(tmp_path / "HF"), f"--output={tmp_path / 'run'}"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_shards_lie_beside_their_index(bart, name):
    weights = load_file(bart / "model.safetensors")
    save_file(weights, bart / "part.safetensors")
    (bart / "model.safetensors").unlink()
    (bart / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
    with pytest.raises(UserError, match="shards must lie beside the index"):
        load_bart(bart)
