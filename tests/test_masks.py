"""Masks and rows of a training batch, with weights so loud that one which is passed over shows in the losses."""

import itertools

import jax
import numpy as np
import pytest
from tiny import tiny_config

from vlkd_jax import losses
from vlkd_jax.data.streams import train_stream
from vlkd_jax.tasks import make_task


@pytest.fixture(scope="module")
def loud(assets):
    """(a batch, function (**changed fields) -> (sum, count) of every term as numbers)."""
    config = tiny_config(assets, corruption__mask_all=0.0, loss__denoise=1.0)
    task = make_task(config)
    batch = next(iter(train_stream(config, task, 0))).replace(index=None)
    params = jax.tree.map(lambda x: np.asarray(x) * (8 if np.ndim(x) > 1 else 1), task.load_params())
    params["image_projection"]["kernel"] *= 20
    terms = jax.jit(lambda batch: losses.finish(task.terms(params, task.load_frozen(), batch, None)))
    return batch, lambda **changes: jax.tree.map(float, terms(batch.replace(**changes)))


def means(terms):
    return {name: total / count for name, (total, count) in terms.items()}


@pytest.mark.parametrize("name", ["text", "source", "replay source", "replay text"])
def test_padding_has_no_say_and_would_have_without_its_mask(loud, name):
    batch, terms = loud
    *inside, field = name.split()

    def change(**values):
        return {"replay": batch.replay.replace(**values)} if inside else values

    rows = batch.replay if inside else batch
    ids, mask = getattr(rows, f"{field}_ids"), getattr(rows, f"{field}_mask")
    noisy = {f"{field}_ids": np.where(mask, ids, 7 + np.arange(ids.shape[1]) % 50).astype(np.int32)}
    assert not mask.all(1).any()
    clean = means(terms())
    assert means(terms(**change(**noisy))) == pytest.approx(clean, rel=1e-4)
    if name != "replay text":  # a target alone, whose mask is target_mask
        unmasked = means(terms(**change(**noisy, **{f"{field}_mask": np.ones_like(mask)})))
        assert unmasked != pytest.approx(clean, rel=1e-3)


@pytest.mark.parametrize(("inside", "term"), [(False, "icti"), (True, "denoise")])
def test_the_target_mask_alone_decides_what_counts(loud, inside, term):
    """Two parts of the targets add up to the whole, sums and counts, however they are cut."""
    batch, terms = loud
    rows = batch.replay if inside else batch
    first = rows.target_mask & (np.arange(rows.target_mask.shape[1]) % 3 == 0)
    parts = []
    for mask in (rows.target_mask, first, rows.target_mask & ~first):
        changed = rows.replace(target_mask=mask)
        parts.append(terms(replay=changed) if inside else terms(target_mask=mask))
        assert parts[-1][term][1] == mask.sum()
    for whole, *some in zip(*(part[term] for part in parts)):
        assert whole == pytest.approx(sum(some), rel=1e-5)
    others = [{name: value for name, value in means(part).items() if name != term} for part in parts]
    for one, other in itertools.pairwise(others):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("row", [0, 3, 7])
def test_a_captions_loss_reads_its_own_picture_and_no_other(loud, row):
    batch, terms = loud
    own = np.arange(len(batch.pixels)) == row
    mask = batch.target_mask & own[:, None]
    blank = np.zeros_like(batch.pixels)
    clean = terms(target_mask=mask)["icti"]
    others = terms(target_mask=mask, pixels=np.where(own[:, None, None, None], batch.pixels, blank))["icti"]
    without = terms(target_mask=mask, pixels=np.where(own[:, None, None, None], blank, batch.pixels))["icti"]
    assert others == pytest.approx(clean, rel=1e-6)
    assert without != pytest.approx(clean, rel=1e-5)
