"""Every file in configs/ is a complete, usable config; random models of both sizes are what they say."""

import importlib
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from tiny import ROOT, command_line, make_assets

from vlkd_jax.checks import check_config
from vlkd_jax.configs import base
from vlkd_jax.data.text import BartText, ClipText
from vlkd_jax.errors import UserError
from vlkd_jax.hf import random as random_models
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.hf.names import parameter_shapes

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("suites", "__init__"))


def keys(values, prefix=""):
    for name, value in values.items():
        yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]


@pytest.mark.parametrize("name", NAMES)
def test_configs_override_base_and_no_more(name):
    module = importlib.import_module(f"vlkd_jax.configs.{name}")
    config = module.get_config()
    config.mesh.data = 1
    check_config(config)
    assert list(keys(config.to_dict())) == list(keys(base.get_config().to_dict()))
    assert module.__doc__ and (name == "base" or config != base.get_config())
    json.loads(config.to_json())


@pytest.mark.parametrize("name", NAMES)
def test_configs_parse_as_flags(name):
    values = flags.FlagValues()
    argv = ["x", f"--config={ROOT}/configs/{name}.py", "--config.optim.lr=0.125", "--config.clip=somewhere"]
    config_flags.DEFINE_config_file("config", None, "a config", flag_values=values, sys_argv=argv)
    values(argv)
    assert values.config.optim.lr == 0.125 and values.config.clip == "somewhere"


def test_random_models(tmp_path):
    """Tiny ones around the tiny tokenizers: they load, are random, and nothing is written over."""
    assets = make_assets(tmp_path)
    argv = [f"--clip_tokenizer={assets}/clip", f"--bart_tokenizer={assets}/bart", "--size=tiny"]
    done = command_line("hf.random", [*argv, f"--output={tmp_path}/a"])
    assert done.returncode == 0, done.stderr
    for load, name, text in ((load_clip, "clip", ClipText), (load_bart, "bart", BartText)):
        config, params = load(tmp_path / "a" / name)
        vocabulary = config.text.vocab_size if name == "clip" else config.vocab_size
        assert vocabulary == text(tmp_path / "a" / name).vocab_size == text(assets / name).vocab_size
        assert sum(np.std(leaf) > 1e-3 for leaf in jax.tree.leaves(params)) > 10
        before = (tmp_path / "a" / name / "model.safetensors").read_bytes()
        with pytest.raises(UserError, match="exists already"):
            random_models.write_random(assets / "clip", assets / "bart", tmp_path / "a", "tiny", 2)
        assert (tmp_path / "a" / name / "model.safetensors").read_bytes() == before


def test_random_models_of_real_size():
    """The published numbers of parameters, with the published vocabularies."""
    clip = random_models.clip_config(SimpleNamespace(vocab_size=49408, bos=49406, eos=49407, pad=49407), "base")
    bart = random_models.bart_config(SimpleNamespace(vocab_size=50265, bos=0, pad=1, eos=2), "base")
    sizes = [sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(parameter_shapes(c))) for c in (clip, bart)]
    assert sizes == [151_277_313, 139_420_416 + 50_265]
    assert (bart.decoder_start_token_id, bart.forced_bos_token_id, bart.forced_eos_token_id) == (2, 0, 2)
