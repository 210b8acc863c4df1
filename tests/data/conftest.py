"""The tiny models for the data tests. Tests marked shared_data are deselected where those data sets are absent."""

from pathlib import Path

import pytest
from tiny import SHARED_DATA, make_assets


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SHARED_DATA.is_dir():
        return
    absent = [item for item in items if item.get_closest_marker("shared_data")]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """A directory with clip/ and bart/ of `tiny.make_assets`."""
    return make_assets(tmp_path_factory.getbasetemp())
