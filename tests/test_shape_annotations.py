"""Shape annotations: complete, checked at every call in these tests, and not needed where jaxtyping is missing."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHECKED
from jaxtyping import TypeCheckError
from tiny import ROOT, environment

import vlkd_jax.decoding
import vlkd_jax.models
import vlkd_jax.tasks
from vlkd_jax import decoding, losses
from vlkd_jax.models.bart import Bart
from vlkd_jax.models.configs import BartConfig

PACKAGES = (vlkd_jax.decoding, vlkd_jax.models, vlkd_jax.tasks)
MODULES = (
    *(f"{package.__name__}.{module.name}" for package in PACKAGES for module in pkgutil.iter_modules(package.__path__)),
    *(name for name in CHECKED if name not in [package.__name__ for package in PACKAGES]),
)
UNSHAPED = (jax.Array, np.ndarray, inspect.Parameter.empty)
"""What an annotation may neither be nor hold: arrays of any shape, and nothing at all."""
BART = Bart(BartConfig(vocab_size=11, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8))  # fmt: skip
IDS, MASK = jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool)


@pytest.fixture(scope="module")
def params():
    return BART.init(jax.random.key(0), IDS, MASK, IDS)["params"]


def test_a_loss_refuses_shapes_that_do_not_belong_together():
    losses.ttdm(np.ones((3, 4)), jnp.ones((3, 4)))
    for other in (jnp.ones((3, 5)), jnp.ones((2, 4)), jnp.ones(4), jnp.ones((3, 4), int)):
        with pytest.raises(TypeCheckError, match="text"):
            losses.ttdm(jnp.ones((3, 4)), other)


def test_a_model_refuses_a_mask_of_another_length_or_type(params):
    for wrong in (MASK[:, :4], MASK.astype(jnp.int32)):
        with pytest.raises(TypeCheckError, match="mask"):
            BART.apply({"params": params}, IDS, wrong, method="encode")


def test_decoding_refuses_a_mask_of_another_prefix(params):
    memory = decoding.project_memory(BART, params, jnp.ones((2, 3, 8)), MASK[:, :3])
    with pytest.raises(TypeCheckError, match="prefix_mask"):
        decoding.greedy(decoding.make_decoder(BART, params, memory), IDS, MASK[:, :4], decoding.Decoding())


def test_tracers_are_checked_too():
    with pytest.raises(TypeCheckError):
        jax.jit(losses.ttdm)(jnp.ones((3, 4)), jnp.ones((3, 5)))


def public(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    """Functions of a module and methods of its classes, `__call__` among them."""
    for name, item in vars(module).items():
        if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(item):
            yield name, item
        elif inspect.isclass(item):
            for method, raw in vars(item).items():
                function = inspect.unwrap(getattr(raw, "__func__", getattr(raw, "fget", raw)))
                own = inspect.isfunction(function) and function.__module__ == module.__name__
                if own and (method == "__call__" or not method.startswith("_")):
                    yield f"{name}.{method}", function


def parts(annotation) -> Iterator:
    """The annotation and everything inside it; the arguments of a `Callable` are a list."""
    if not isinstance(annotation, list):
        yield annotation
    for item in annotation if isinstance(annotation, list) else typing.get_args(annotation):
        yield from parts(item)


def incomplete(function: Callable) -> list[str]:
    """Parameters, or "return", without an annotation, or with one that leaves an array's shape open."""
    hints = typing.get_type_hints(inspect.unwrap(function))
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in [*names, "return"] if set(UNSHAPED) & set(parts(hints.get(name, inspect.Parameter.empty)))]


@pytest.mark.parametrize("name", MODULES)
def test_every_array_has_its_shape(name):
    module = importlib.import_module(name)
    functions = dict(public(module))
    assert functions, name
    assert {at: incomplete(function) for at, function in functions.items() if incomplete(function)} == {}
    fields = [item for item in vars(module).values() if inspect.isclass(item) and item.__module__ == name]
    for item in fields:
        own = {field: typing.get_type_hints(item)[field] for field in inspect.get_annotations(item)}
        assert [field for field, hint in own.items() if set(UNSHAPED) & set(parts(hint))] == [], item


def test_what_is_incomplete_is_found():
    def function(a, b: jax.Array, c: tuple[np.ndarray, int], d: int):
        return a

    assert incomplete(function) == ["a", "b", "c", "return"]
    assert [name for name, _ in public(importlib.import_module("vlkd_jax.decoding.cache"))] == [
        *("project_memory", "join_memories", "take_rows", "make_decoder", "empty_cache", "extend", "prefill", "score")
    ]
    assert "Bart.__call__" in dict(public(importlib.import_module("vlkd_jax.models.bart")))


def test_models_run_without_jaxtyping():
    code = f"""
import importlib, sys
sys.modules["jaxtyping"] = sys.modules["beartype"] = None
for name in {MODULES}:
    importlib.import_module(name)
import numpy as np
from vlkd_jax import losses
print(float(losses.ttdm(np.ones((3, 4)), np.zeros((3, 4)))[0]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "12.0\n"), done.stderr
