"""Under XLA's default optimisation, which conftest.py turns off: parity, exact resume, a demo-sized step."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny import tiny_config

from configs import shapes_vlkd
from vlkd_jax import train as loop
from vlkd_jax.data.streams import train_stream
from vlkd_jax.hf.load import load_bart, load_clip
from vlkd_jax.models import attention, bart, clip, vlkd
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.clip import Clip
from vlkd_jax.optim import make_optimizer
from vlkd_jax.sharding import one_device
from vlkd_jax.step import make_train_step
from vlkd_jax.tasks import make_task
from vlkd_jax.train import start_state, train

WHOLE = 1e-4
FLAG = "jax_disable_most_optimizations"


def optimise(on: bool) -> None:
    """What is compiled from here on is optimised, or not."""
    jax.config.update(FLAG, not on)
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def optimised():
    optimise(True)
    yield
    optimise(False)


def share_rounded_once(rng) -> float:
    """How often a compiled x * y + z differs from the product, rounded, plus z."""
    x, y, z = rng.normal(size=(3, 1000)).astype(np.float32)
    return float(np.mean(jax.jit(lambda x, y, z: x * y + z)(x, y, z) != x * y + z))


def test_the_switch_changes_what_is_compiled(rng):
    """Optimised code contracts a product and a sum into one operation with one rounding."""
    assert share_rounded_once(rng) > 0.1
    optimise(False)
    try:
        assert share_rounded_once(rng) == 0
    finally:
        optimise(True)


@pytest.mark.parity
def test_clip_as_hugging_face(tiny_clip, rng):
    import torch

    config, params = load_clip(tiny_clip.directory)
    size, end = config.vision.image_size, np.array([11, 4, 8])
    pixels = rng.normal(size=(3, size, size, 3)).astype(np.float32)
    ids, mask = rng.integers(3, 97, (3, 12)), np.arange(12) <= end[:, None]
    ids[np.arange(3), end] = config.text.eos_token_id
    theirs = tiny_clip.model(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels).movedim(-1, 1)
    )
    image, text, _ = jax.jit(Clip(config).apply)({"params": params}, pixels, ids, mask)
    np.testing.assert_allclose(image, theirs.image_embeds.detach(), atol=WHOLE, rtol=0)
    np.testing.assert_allclose(text, theirs.text_embeds.detach(), atol=WHOLE, rtol=0)


@pytest.mark.parity
def test_bart_as_hugging_face(tiny_bart, rng):
    import torch

    config, params = load_bart(tiny_bart.directory)
    ids, mask = rng.integers(3, 99, (3, 10)), np.arange(10) < np.array([10, 4, 7])[:, None]
    decoder_ids = rng.integers(3, 99, (3, 8))
    theirs = tiny_bart.model(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(decoder_ids)
    )
    logits = jax.jit(Bart(config).apply)({"params": params}, ids, mask, decoder_ids)
    np.testing.assert_allclose(logits, theirs.logits.detach(), atol=WHOLE, rtol=0)


def test_resumed_is_uninterrupted(assets, tmp_path, monkeypatch):
    """Every bit of the state, although the second process's program is compiled anew."""
    config = tiny_config(assets, steps=4, save_every=2, dropout=0.1)
    whole = train(config, tmp_path / "whole")

    class Cut(Exception):
        pass

    log = loop._Loop._log

    def cut(self, step, *rest):
        if step == 3:
            raise Cut
        return log(self, step, *rest)

    monkeypatch.setattr(loop._Loop, "_log", cut)
    with pytest.raises(Cut):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    jax.clear_caches()
    resumed = train(config, tmp_path / "run")
    for ours, theirs in zip(*map(jax.tree.leaves, (resumed, whole)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def demo_step(batch=None):
    """(its batch, state after it, metrics) of the demo's first step, 64 pairs and 64 texts."""
    config = shapes_vlkd.get_config()
    config.data.threads = 1
    task = make_task(config)
    optimizer = make_optimizer(config.optim, config.steps, task.new)
    batch = batch or next(iter(train_stream(config, task, 0))).replace(index=None)
    assert batch.text_ids.shape[0] == batch.replay.text_ids.shape[0] == 64
    state = start_state(task.load_params(), optimizer, one_device())
    step = jax.jit(make_train_step(task, optimizer, config.dropout, config.seed))
    return batch, *jax.device_get(step(state, task.load_frozen(), batch))


def test_a_demo_sized_step_is_the_plain_one(monkeypatch):
    """Against the same step not optimised, with Flax's own dense layers and their gradients."""
    batch, state, metrics = demo_step()
    optimise(False)
    try:
        for module in (attention, bart, clip, vlkd):
            monkeypatch.setattr(module, "Dense", nn.Dense)
        _, plain_state, plain_metrics = demo_step(batch)
    finally:
        optimise(True)
    for name, value in plain_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    moments, plain_moments = (some.opt_state[1] for some in (state, plain_state))
    same_but_for_rounding(moments.mu, plain_moments.mu)  # after one step the gradient, but for a factor
    same_but_for_rounding(moments.nu, plain_moments.nu)  # and its square


def same_but_for_rounding(ours, plain):
    """Leaf by leaf; what is zero in exact arithmetic, as the gradient of the keys' bias, is noise of the whole."""
    noise = 1e-7 * np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(plain)))
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True)
    for (path, one), two in pairs:
        difference, size = np.linalg.norm(one - two), np.linalg.norm(two)
        assert difference <= 1e-4 * size + noise, (jax.tree_util.keystr(path), difference, size)
