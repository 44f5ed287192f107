"""Fixtures that all rooms share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small networks: a second thread waits more than it works

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """A folder of real data sets, laid out as `vardrop.data` looks for them; skips where there is none.

    Tests that use it are marked `@pytest.mark.data`.
    """
    told = os.environ.get("VARDROP_DATA")
    beside = [REPOSITORY / "data", REPOSITORY.parent / "data", REPOSITORY.parent / "shared" / "data"]
    places = [Path(told)] if told else beside
    for place in places:
        if (place / "mnist").is_dir():
            return place
    pytest.skip(f"real data: VARDROP_DATA names no folder that has mnist, and none is in {', '.join(map(str, places))}")
