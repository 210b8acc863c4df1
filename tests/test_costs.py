"""No program takes more than it did: operations, bytes and temporaries, counted, not timed. See golden/costs.py."""

import importlib.util
import json

import jax
import pytest
from tiny import ROOT

SLACK = 1.02
"""Of what XLA counts: its fusions differ a little between kinds of processor."""
COSTS = json.loads((ROOT / "tests" / "golden" / "costs.json").read_text())


@pytest.fixture(scope="module")
def golden():
    spec = importlib.util.spec_from_file_location("golden_costs", ROOT / "tests" / "golden" / "costs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", COSTS["programs"])
def test_a_program_takes_no_more_than_it_did(golden, name):
    function, arguments = golden.programs()[name]
    found, known = golden.cost(function, arguments), COSTS["programs"][name]
    assert found["matmul_gflop"] == known["matmul_gflop"]
    if jax.__version__ == COSTS["jax"]:  # another release compiles otherwise
        more = {key: (found[key], known[key]) for key in known if found[key] > SLACK * known[key]}
        assert not more, f"{name} takes more than it did: {more}; if that is meant, python tests/golden/costs.py"


def test_every_program_is_listed(golden):
    assert set(golden.programs()) == set(COSTS["programs"])


def test_a_cached_teacher_saves_its_work():
    live, cached = (COSTS["programs"][name] for name in ("train step", "train step, teacher cached"))
    assert cached["matmul_gflop"] < 0.85 * live["matmul_gflop"]
