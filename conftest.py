"""Every test and every doctest starts from a seed, so that a run can be had again.

Which seed does not matter: a test holds for any, up to the one in thousands that its tolerance allows.
``VARDROP_TEST_SEED=3 make test`` takes another, and lets hypothesis draw examples of its own.
"""

import os
import random
import tempfile
from collections.abc import Iterator

import numpy
import pytest
import torch
from hypothesis import settings

TOLD = os.environ.get("VARDROP_TEST_SEED")
SEED = int(TOLD or 0)

settings.register_profile("repeatable", deadline=None, derandomize=TOLD is None)
settings.load_profile("repeatable")


def start_over() -> None:
    """Begin every global source of random numbers anew."""
    random.seed(SEED)
    numpy.random.seed(SEED)  # noqa: NPY002 - what libraries draw from
    torch.manual_seed(SEED)


def pytest_collectstart() -> None:
    """Seed the networks that a test module makes as it is imported."""
    start_over()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed a test or a doctest."""
    start_over()


@pytest.fixture(autouse=True)
def cleared_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take away what a doctest writes into temporary folders, whose names an example does not keep."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
