"""What a task says of its arrays before one is read, and where it puts them."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import make_mesh, tiny_config

from vlkd_jax.sharding import replicated, shardings
from vlkd_jax.tasks import TASKS, make_task

SETTINGS = [
    {"objective": "vlkd"},
    {"objective": "vlkd", "loss__l2": 0.1, "loss__denoise": 0.3},
    {"objective": "vlkd", "student__image_tokens": "hidden", "student__whiten": 32},
    {"objective": "clip_contrastive"},
    {"objective": "bart_denoise", "data__source": "shapes_texts"},
    {"objective": "classify", "data__task": "mnli"},
    {"objective": "classify", "data__task": "stsb"},
    {"objective": "summarize"},
    {"objective": "caption", "start": "builtin:shapes/student"},
    {"objective": "answer", "start": "builtin:shapes/student"},
]


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_configuration_alone_tells_every_shape(assets, settings):
    """What is planned from `abstract` is what `load_params` and `load_frozen` put on the devices, leaf for leaf."""
    task = make_task(tiny_config(assets, **settings))
    shared = replicated(make_mesh(4))
    params, frozen = task.load_params(shared), task.load_frozen(shared)
    assert {leaf.sharding for leaf in jax.tree.leaves((params, frozen))} == {shared}
    unread = dataclasses.replace(task, read_params=pytest.fail, read_frozen=pytest.fail)
    assert shapes(unread.abstract()) == (shapes(params), shapes(frozen))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_task_starts_the_same_on_any_mesh(assets, monkeypatch, settings):
    """To the bit, every leaf where it was declared, and nothing whole on one device on the way."""
    task = make_task(tiny_config(assets, **settings))
    whole = jax.device_get((task.load_params(), task.load_frozen()))
    monkeypatch.setattr(jax, "device_put", pytest.fail)
    for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
        declared = shardings(task.abstract(), make_mesh(*sizes))
        placed = task.load_params(declared[0]), task.load_frozen(declared[1])
        assert jax.tree.map(lambda leaf: leaf.sharding, placed) == declared
        jax.tree.map(np.testing.assert_array_equal, placed, whole)


def test_every_task_is_tried():
    assert {settings["objective"] for settings in SETTINGS} == set(TASKS)
