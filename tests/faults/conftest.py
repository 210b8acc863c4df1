"""What the tests of faults share."""

import pytest
from fuzzing import fuzz, harmless

READER_SECONDS = 60
"""Of fuzzing each reader in the nightly run: half an hour for all of them."""


@pytest.fixture
def fuzzed(request, tmp_path, record_property):
    """Function (read, *strategies, examples): `read` gets draws, runs nothing, and ends; tells how many there were."""

    def run(read, *strategies, examples=60):
        def watched(*values):
            with harmless(tmp_path):
                read(*values)

        seconds = READER_SECONDS if request.config.getoption("nightly") else 0
        record_property("files", fuzz(watched, *strategies, examples=examples, seconds=seconds))

    return run
