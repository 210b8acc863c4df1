"""Figures during training: the same on any number of devices, and each device works on rows of its own."""

import jax
import pytest
from tiny import make_mesh, tiny_config

from vlkd_jax import sharding
from vlkd_jax.evals import heldout
from vlkd_jax.evals.heldout import HeldOut
from vlkd_jax.tasks import make_task


def figures(config, task, devices, monkeypatch):
    """(the figures, how many rows of each held-out batch a device holds)."""
    mesh, rows = make_mesh(devices), []
    shared = sharding.replicated(mesh)
    held_out = HeldOut(config, task, jax.device_put(task.load_frozen(), shared), mesh)

    def mean_terms(terms, params, frozen, batches, original=heldout.mean_terms):
        batches = list(batches)
        rows.extend({shard.data.shape[0] for shard in batch.text_ids.addressable_shards} for batch in batches)
        return original(terms, params, frozen, batches)

    with monkeypatch.context() as patch:
        patch.setattr(heldout, "mean_terms", mean_terms)
        return held_out(jax.device_put(task.load_params(), shared)), rows


@pytest.mark.parametrize(("batch_size", "held"), [(8, 1), (6, 6)])
def test_eight_devices_are_one(assets, monkeypatch, batch_size, held):
    config = tiny_config(assets, batch_size=batch_size, eval__every=1, eval__batches=2)
    task = make_task(config)
    one, whole = figures(config, task, 1, monkeypatch)
    eight, spread = figures(config, task, 8, monkeypatch)
    assert eight == pytest.approx(one, rel=1e-5) and len(one) >= 6
    assert whole == [{batch_size}] * 4 and spread == [{held}] * 4
