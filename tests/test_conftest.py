"""What a run of the tests says of itself: parity that ran, and what was left out because the shared data are absent."""

import shutil
import subprocess
import sys

from tiny import ROOT, environment

TINY = """
from pathlib import Path

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
make_assets = None
"""
TESTS = """
import pytest

@pytest.mark.parity
@pytest.mark.parametrize("k", range(4))
def test_parity(k):
    pass

@pytest.mark.shared_data
@pytest.mark.parametrize("k", range(3))
def test_shared(k):
    pass

def test_plain():
    pass
"""
SKIPPED = """
import pytest

@pytest.mark.parity
def test_skipped():
    pytest.skip("no torch")

@pytest.mark.parity
@pytest.mark.skip(reason="not now")
def test_marked():
    pass

@pytest.mark.parity
def test_wrong():
    assert 0
"""


def run(tmp_path, *files, workers=0, data=False, ci=""):
    """(exit code, closing lines) of these tests in a checkout of their own, with our conftest.py and pyproject.toml."""
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tests)
    shutil.copy(ROOT / "pyproject.toml", tests.parent)
    (tests / "tiny.py").write_text(TINY)
    for k, text in enumerate(files):
        (tests / f"test_{k}.py").write_text(text)
    if data:
        (tmp_path / "shared" / "data").mkdir(parents=True)
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", "-n", str(workers)]
    settings = environment() | {"CI": ci, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests.parent, env=settings)
    return done.returncode, done.stdout


def test_parity_is_counted_and_absent_data_are_told_of_over_two_workers(tmp_path):
    code, out = run(tmp_path, TESTS, workers=2)
    assert code == 0
    assert "parity with Hugging Face torch: 4 passed\n" in out
    told = f"{tmp_path / 'shared' / 'data'} is absent"
    assert f"TESTS MARKED shared_data ARE LEFT OUT: {told}" in out
    assert f"3 TESTS WERE LEFT OUT: {told}" in out
    assert "5 passed, 3 skipped" in out


def test_absent_data_fail_a_run_that_ci_names_and_skipped_parity_fails_everywhere(tmp_path):
    code, out = run(tmp_path, TESTS, SKIPPED, ci="true")
    assert code == 1
    assert "parity with Hugging Face torch: 4 passed, 3 FAILED\n" in out
    assert all(f"test_{name}" in out for name in ("skipped", "marked", "wrong", "shared[0]"))
    assert "a parity test was skipped" in out and "no torch" in out and "not now" in out
    assert "skipped" not in out.splitlines()[-1]


def test_data_that_are_there_are_used(tmp_path):
    code, out = run(tmp_path, TESTS, data=True, ci="true")
    assert code == 0 and "8 passed" in out and "LEFT OUT" not in out
