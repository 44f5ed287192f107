"""The public names: they resolve, and say with an example what they do."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import vardrop as vd

NAMES = sorted(vd.__all__)
OBJECTS = {name: getattr(vd, name) for name in NAMES if not isinstance(getattr(vd, name, None), ModuleType)}
SOURCE = Path(vd.__file__).parent
SPOKEN_OF_ELSEWHERE = {"Report", "RandomWeight"}  # what functions return: their examples show it


def examples(thing: object) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_and_is_described(name: str) -> None:
    thing = getattr(vd, name)
    assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"
    first = inspect.getdoc(thing).split("\n\n")[0]  # type: ignore[union-attr]
    assert first.endswith((".", ":")), f"the docstring of {name} does not begin with a sentence"


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - SPOKEN_OF_ELSEWHERE))
def test_every_public_name_has_an_example(name: str) -> None:
    assert examples(OBJECTS[name]), f"{name} has no example"


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - SPOKEN_OF_ELSEWHERE))
def test_every_argument_is_described(name: str) -> None:
    thing = OBJECTS[name]
    documented = inspect.getdoc(thing) or ""
    arguments = [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]
    silent = [p for p in arguments if not re.search(rf"^\s*\*{{0,2}}{p}( \(.*\))?:", documented, re.M)]
    assert not set(silent), f"{name} does not say what these are"


@pytest.mark.parametrize("name", vd.kl.__all__)
def test_the_divergences_have_examples(name: str) -> None:
    assert examples(getattr(vd.kl, name))


def test_names_are_listed_once_and_in_order() -> None:
    assert len(set(vd.__all__)) == len(vd.__all__)
    assert list(vd.__all__) == sorted(vd.__all__)


def test_nothing_public_is_left_out() -> None:
    public = {
        name for name, thing in vars(vd).items() if not name.startswith("_") and not isinstance(thing, ModuleType)
    }
    assert public <= set(vd.__all__)


def test_the_version_is_that_of_the_distribution() -> None:
    assert vd.__version__ == metadata.version("vardrop")


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_file_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


def test_the_map_of_names_has_them_all() -> None:
    listed = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `vd\.(\w+)` \|", listed, re.M)) == set(vd.__all__)
