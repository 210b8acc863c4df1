"""Tiny random models, made on the spot: no network, no weights on disk. Tests marked shared_data need that folder."""

# ruff: noqa: E402 (the import hook has to stand before the imports it acts on)

import collections
import functools
import os
import pathlib
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from jaxtyping import install_import_hook

CHECKED = ("vlkd_jax.models", "vlkd_jax.losses", "vlkd_jax.decoding", "vlkd_jax.whitening", "vlkd_jax.tasks")
"""Modules whose annotations, shapes included, hold at every call in the tests; the hook must precede their import."""
install_import_hook(CHECKED, "beartype.beartype")

import jax
import numpy as np
import pytest
from tiny import SHARED_DATA, make_assets

ABSENT = f"{SHARED_DATA} is absent"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--nightly`: faults and hostile files in the numbers that the README tells, for an hour."""
    parser.addoption("--nightly", action="store_true", help="all counts of tests/faults, not only a few of each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked nightly, unless it is asked for."""
    if config.getoption("nightly"):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    config.hook.pytest_deselected(items=nightly)


def pytest_report_header() -> list[str]:
    """Says at once when tests will be left out."""
    return [] if SHARED_DATA.is_dir() else [f"TESTS MARKED shared_data ARE LEFT OUT: {ABSENT}"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out what needs data that are absent; where CI is set, they have to be there."""
    if item.get_closest_marker("shared_data") and not SHARED_DATA.is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(ABSENT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A parity test that is skipped fails: parity is what the port is worth."""
    report = yield
    if item.get_closest_marker("parity") and report.skipped:
        report.outcome, report.longrepr = "failed", f"a parity test was skipped: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many parity tests ran, and what was left out: counted from reports, so that workers' tests are in it."""
    stats = terminalreporter.stats

    def count(*outcomes: str, marker: str) -> int:
        reports = [report for outcome in outcomes for report in stats.get(outcome, [])]
        return sum(marker in getattr(report, "keywords", ()) for report in reports)

    passed, failed = count("passed", marker="parity"), count("failed", "error", marker="parity")
    terminalreporter.write_line(
        f"parity with Hugging Face torch: {passed} passed{f', {failed} FAILED' if failed else ''}",
        red=bool(failed),
        bold=True,
    )
    for line in _faults(stats):
        terminalreporter.write_line(line)
    if left_out := count("skipped", marker="shared_data"):
        terminalreporter.write_line(f"{left_out} TESTS WERE LEFT OUT: {ABSENT}", red=True, bold=True)


def _faults(stats: dict[str, list[Any]]) -> list[str]:
    """Of each test below tests/faults, how often it held, of how many files that were read, and what memory grew by."""
    reports = [(report, outcome) for outcome in ("passed", "failed", "error") for report in stats.get(outcome, [])]
    lines: dict[str, collections.Counter[str]] = {}
    for report, outcome in reports:
        path, _, name = report.nodeid.partition("::")
        if path.startswith("tests/faults/"):
            told = name.partition("[")[0].removeprefix("test_").replace("_", " ")
            line = lines.setdefault(told, collections.Counter())
            line.update(all=1, held=int(outcome == "passed"))
            line.update(dict(report.user_properties))
    units = {"files": "files", "mebibytes": "MiB more in the end"}
    return [
        ", ".join(
            [f"{name}: {line['held']}/{line['all']}", *(f"{line[k]:,} {u}" for k, u in units.items() if k in line)]
        )
        for name, line in lines.items()
    ]


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> pathlib.Path:
    """A directory with clip/ and bart/ of `tiny.make_assets`."""
    return make_assets(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def without_java(request, monkeypatch):
    """Captions are scored without Java, which takes a second to start, but in tests marked java."""
    if not request.node.get_closest_marker("java"):
        from vlkd_jax.evals import standard_captions

        monkeypatch.setattr(standard_captions, "why_absent", lambda: "left out of this test")


class TorchModel(NamedTuple):
    """A torch model in eval mode and the directory `save_pretrained` wrote it to."""

    model: Any
    directory: pathlib.Path


@pytest.fixture(scope="session", autouse=True)
def jax_settings():
    """Parity is meant in float32 on every device; compiling these tiny models costs more than running them."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)


def randomise(model, seed: int) -> None:
    """Every parameter and buffer of consequence away from its initial zeros and ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors |= {name: value for name, value in model.named_buffers() if name == "final_logits_bias"}
    with torch.no_grad():
        for name, value in tensors.items():
            if name == "logit_scale":
                continue
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(centre + 0.2 * torch.randn(value.shape, generator=generator))


@pytest.fixture(scope="session")
def save_torch(tmp_path_factory):
    """Function (transformers model class, config, seed) -> TorchModel with random weights."""

    def save(model_class, config, seed: int = 0) -> TorchModel:
        import torch

        torch.set_num_threads(1)
        config._attn_implementation = "eager"
        model = model_class(config).eval()
        randomise(model, seed)
        directory = tmp_path_factory.mktemp(model_class.__name__)
        model.save_pretrained(directory)
        return TorchModel(model, directory)

    return save


def clip_config(eos_token_id: int, hidden_act: str, patch_size: int):
    """A CLIP of width 32 with different depths, heads and sizes wherever a mix-up could hide."""
    from transformers import CLIPConfig

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": 99, "max_position_embeddings": 20, "hidden_act": hidden_act, "bos_token_id": 97}
    text |= {"eos_token_id": eos_token_id, "pad_token_id": 98 if eos_token_id == 98 else 1}
    vision = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 5}
    vision |= {"image_size": 24, "patch_size": patch_size, "hidden_act": hidden_act}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def bart_config(**changes):
    """A BART of width 32 with different depths, heads and feed-forward widths on its two sides."""
    from transformers import BartConfig

    values = {"vocab_size": 99, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48}
    values |= {"encoder_attention_heads": 4, "decoder_attention_heads": 8, "decoder_ffn_dim": 56}
    values |= {"max_position_embeddings": 24, "dropout": 0.1}
    return BartConfig(**(values | changes))


@pytest.fixture(scope="session")
def tiny_clip(save_torch) -> TorchModel:
    """CLIPModel as OpenAI's: quick_gelu, and padding with the end token."""
    from transformers import CLIPModel

    return save_torch(CLIPModel, clip_config(98, "quick_gelu", 8))


@pytest.fixture(scope="session")
def legacy_clip(save_torch) -> TorchModel:
    """CLIPModel with the wrong end token of old checkpoints, gelu, and a patch that does not divide the image."""
    from transformers import CLIPModel

    return save_torch(CLIPModel, clip_config(2, "gelu", 7), seed=1)


@pytest.fixture(scope="session")
def tiny_bart(save_torch) -> TorchModel:
    """BartForConditionalGeneration as BART-large: gelu, unscaled embeddings."""
    from transformers import BartForConditionalGeneration

    return save_torch(BartForConditionalGeneration, bart_config(), seed=2)


@pytest.fixture(scope="session")
def scaled_bart(save_torch) -> TorchModel:
    """BartForConditionalGeneration with scaled embeddings, quick_gelu and as many layers on both sides."""
    from transformers import BartForConditionalGeneration

    config = bart_config(scale_embedding=True, activation_function="quick_gelu", encoder_layers=2)
    return save_torch(BartForConditionalGeneration, config, seed=3)


@functools.cache
def _compiled(module, method):
    return jax.jit(functools.partial(module.apply, method=method))


@pytest.fixture
def apply():
    """Function (module, parameters, *arrays, method=None): `module.apply` under jit, compiled once a session."""
    return lambda module, params, *inputs, method=None: _compiled(module, method)({"params": params}, *inputs)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fixed random numbers for inputs."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def wordy_bart(save_torch) -> TorchModel:
    """A torch BART whose logits bias is random, so that what it says varies and some of it ends early."""
    import torch
    from transformers import BartForConditionalGeneration

    made = save_torch(BartForConditionalGeneration, bart_config(max_position_embeddings=40), seed=5)
    bias = torch.randn(made.model.final_logits_bias.shape, generator=torch.Generator().manual_seed(0))
    made.model.final_logits_bias.copy_(bias)
    config = made.model.config
    made.model.final_logits_bias[0, config.eos_token_id] += 1.0
    made.model.generation_config.forced_bos_token_id = config.bos_token_id
    made.model.save_pretrained(made.directory)
    return made


@pytest.fixture(scope="session")
def wordy(wordy_bart):
    """(Bart, parameters) of that directory."""
    from vlkd_jax.hf.load import load_bart
    from vlkd_jax.models.bart import Bart

    config, params = load_bart(wordy_bart.directory)
    assert (config.decoder_start_token_id, config.forced_bos_token_id, config.forced_eos_token_id) == (2, 0, 2)
    return Bart(config), params
