"""Fixtures that all rooms share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import browsing
from commands import Result
from vardrop import cli

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


@pytest.fixture
def vardrop_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line: its exit status, and what it said on either stream."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RANK", raising=False)

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser, where there is one."""
    with browsing.opened() as found:
        yield found


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page without a network, that must not complain."""
    with browsing.new_page(browser) as fresh:
        yield fresh
