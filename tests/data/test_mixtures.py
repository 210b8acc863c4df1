"""Several data sets at once: their shares, their epochs, and one stream for any number of processes and workers."""

import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from tiny import tiny_config, write_pictures

from vlkd_jax.data.inputs import Columns
from vlkd_jax.data.prepare import Options, prepare
from vlkd_jax.data.streams import make_source, make_text_source, train_sources, train_stream
from vlkd_jax.errors import UserError
from vlkd_jax.tasks import make_task
from vlkd_jax.train import train

SIZES = (8, 24)
FIRST = 6
"""Of the first set's are trained on: two are held out."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Two prepared sets of so many pairs; their captions do not say which is which, their keys do."""
    path = tmp_path_factory.mktemp("sets")
    lines = write_pictures(path / "images", sum(SIZES))
    for number, rows in enumerate((lines[: SIZES[0]], lines[SIZES[0] :])):
        (path / f"{number}.tsv").write_text("\n".join(rows) + "\n")
        columns = Columns("0", "1", str(path / "images"))
        prepare(path / f"{number}.tsv", path / f"set{number}", columns, Options(rows=5), workers=1)
    return [str(path / f"set{number}") for number in range(2)]


def config_of(assets, directories, weights, **changes):
    config = tiny_config(assets, data__source="tfds", batch_size=4, data__split="train[2:]", **changes)
    config.data.directory, config.data.weights = ",".join(directories), weights
    config.data.validation_split = "train[:2]"
    return config


def first(stream, count):
    return list(itertools.islice(stream, count))


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("weights", [(3, 1), (0.25, 0.5)])
def test_shares_and_epochs(assets, directories, weights):
    config = config_of(assets, directories, weights)
    task = make_task(config)
    drawn = np.concatenate([batch.index for batch in first(train_stream(config, task, 0), 24)])
    share = weights[0] / sum(weights)
    of_first = drawn[drawn < FIRST]
    assert abs(len(of_first) - share * len(drawn)) <= 1
    for part, length in ((of_first, FIRST), (drawn[drawn >= FIRST], SIZES[1] - 2)):
        for start in range(0, len(part) - length + 1, length):  # each epoch of a set has every record of it once
            assert set(Counter(part[start : start + length]).values()) == {1}
    texts = [make_source(config, "train")[k].text for k in range(FIRST + SIZES[1] - 2)]
    assert texts == [source[k].text for source in make_source(config, "train").sources for k in range(len(source))]
    assert [make_text_source(config, "train")[k].text for k in range(len(texts))] == texts


@pytest.mark.parametrize("mixed", [False, True])
def test_one_stream_for_every_number_of_processes_and_workers(assets, directories, mixed):
    """Over two epochs, with random parts of pictures; from a later step on as if the others had been read."""
    weights = (1, 2) if mixed else ()
    config = config_of(assets, directories if mixed else directories[1:], weights, data__smallest_crop=0.5)
    config.data.flip = True
    task = make_task(config)
    sources = train_sources(config, task)
    steps = 2 * len(sources[0]) // config.batch_size

    def stream(workers=0, start=0, share=(0, 1)):
        config.data.workers = workers
        return first(train_stream(config, task, start, sources=sources, share=share), steps - start)

    whole = stream()
    assert len({batch.pixels.tobytes() for batch in whole}) == steps
    for workers, shares in ((0, 2), (0, 4), (2, 2), (4, 1)) if mixed else ((0, 4), (2, 1)):
        parts = [stream(workers, share=(k, shares)) for k in range(shares)]
        for blocks, expected in zip(zip(*parts, strict=True), whole, strict=True):
            same(jax.tree.map(lambda *rows: np.concatenate(rows), *blocks), expected)
    for start in (3, steps - 2):
        for ours, theirs in zip(stream(0, start), whole[start:], strict=True):
            same(ours, theirs)


def test_a_run_on_two_sets_goes_on_and_refuses_others(assets, directories, tmp_path):
    config = config_of(assets, directories, (3, 1), steps=3, optim__schedule="constant", eval__every=3)
    whole = train(config, tmp_path / "whole")
    config.steps = 2
    train(config, tmp_path / "cut")
    config.steps = 3
    same(train(config, tmp_path / "cut").params, whole.params)
    config.data.directory = ",".join(directories[::-1])
    with pytest.raises(UserError, match=r"\(data\.directory\) has changed, sha256 \w{12}\.\.\. -> \w{12}"):
        train(config, tmp_path / "cut")
    config.data.directory, config.data.weights = ",".join(directories), (1, 1)
    with pytest.raises(UserError, match=r"data\.weights"):
        train(config, tmp_path / "cut")


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, 0), (1, -1), (1, "a"), (1, float("nan"))])
def test_weights_that_cannot_be(assets, directories, weights):
    config = config_of(assets, directories, weights)
    with pytest.raises(UserError, match=r"config\.data\.weights is .*give each of the 2 directories"):
        make_source(config, "train")
