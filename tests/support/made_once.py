"""Fixtures that are made once for all of pytest-xdist's workers, not once in each."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

Made = TypeVar("Made")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make(folder)` returns, which the worker that comes first calls, and the others wait for and read.

    Args:
        factory: pytest's `tmp_path_factory`.
        name: of the fixture, and of its folder.
        make: writes into the folder, and returns what can be pickled.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make(factory.mktemp(name))
    folder = factory.getbasetemp().parent / f"once-{name}"
    with FileLock(f"{folder}.lock"):
        result = folder.with_suffix(".pickle")
        if not result.exists():
            folder.mkdir()  # fails if the other worker's attempt failed, whose error is the one to read
            result.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(result.read_bytes())
