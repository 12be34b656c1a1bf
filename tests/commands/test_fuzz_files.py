"""Tries a few damaged files and odd settings of each kind; `tests/fuzz_files.py` tries thousands."""

import fuzz_files
import pytest


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def world(root):
    return fuzz_files.World(root)


@pytest.mark.slow
@pytest.mark.parametrize("target", [*fuzz_files.TARGETS, *fuzz_files.CASES])
def test_damaged_files_and_odd_settings(target, world, root):
    found = fuzz_files.run(world, root, target, 60, seed=1)
    # Of two checkpoints one is mostly intact, and is read in place of the other.
    assert not found["failures"] and found["refused"] > (0 if target == "checkpoints" else 10)
