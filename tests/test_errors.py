"""Every error that vardrop raises has a test that knows its words.

The words are read from the source: three in a row that no other error has. A test knows them if they stand in one of
its strings: a pattern for ``pytest.raises``, or what it looks for in the output of the command line.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vardrop

SOURCE = Path(vardrop.__file__).parent
TESTS = Path(__file__).parent
LENGTH = 3  # of the runs of words that are looked for
PASSING_ON = {"require"}  # functions that raise the words they are given, used outside the file that they stand in
Run = tuple[str, ...]


class Message(NamedTuple):
    """The literal words of one error and where it is raised."""

    place: str
    pieces: tuple[str, ...]

    @property
    def runs(self) -> set[Run]:
        return {run for piece in self.pieces for run in runs(piece)}


def runs(text: str) -> set[Run]:
    """All runs of so many words; a text with fewer is one run."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < LENGTH:
        return {tuple(words)} if len(words) == LENGTH - 1 else set()
    return {tuple(words[i : i + LENGTH]) for i in range(len(words) - LENGTH + 1)}


def literals(node: ast.AST) -> Iterator[str]:
    """The strings in an expression, and the text of f-strings between their values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from literals(value if isinstance(value, ast.Constant) else getattr(value, "value", value))
    else:
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


def raised(tree: ast.Module) -> Iterator[ast.Call]:
    """The errors of all ``raise`` statements; a module's ``__getattr__`` speaks for Python, in its words."""
    pythons = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"]
    theirs = {id(node) for function in pythons for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and id(node) not in theirs:
            yield node.exc


def messages(tree: ast.Module, place: str) -> Iterator[Message]:
    """The messages of all ``raise`` statements of a file, and of the calls of functions that only pass one on."""
    passing: set[str] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parameters = {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                names = {name.id for name in ast.walk(node.exc) if isinstance(name, ast.Name)}
                if parameters & names and not Message("", tuple(literals(node.exc))).runs:
                    passing.add(function.name)
    for node in raised(tree):
        yield Message(f"{place}:{node.lineno}", tuple(literals(node)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in passing or called in PASSING_ON:
                yield Message(f"{place}:{node.lineno}", tuple(literals(node)))


def docstrings(tree: ast.Module) -> set[int]:
    """The nodes that are docstrings: prose, which tests nothing."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def known_runs(tree: ast.Module) -> set[Run]:
    """The runs of words in the strings of a test, with patterns read as the text that they match."""
    prose = docstrings(tree)
    known: set[Run] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            for piece in re.split(r"\.[*+]\??|\\[wdsS][*+]?", node.value):
                known |= runs(re.sub(r"\\(.)", r"\1", piece))
    return known


def untested(sources: dict[str, str], tests: list[str]) -> list[str]:
    """The errors whose own words no test has."""
    found = [message for place, text in sources.items() for message in messages(ast.parse(text), place)]
    found = [message for message in found if message.runs]  # one without words passes on what another said
    common = Counter(run for message in found for run in message.runs)
    known: set[Run] = set().union(*(known_runs(ast.parse(text)) for text in tests))
    missing = []
    for message in found:
        own = {run for run in message.runs if common[run] == 1} or message.runs
        if not own & known:
            missing.append(
                f"{message.place}: {' ... '.join(piece.strip() for piece in message.pieces if piece.strip())}"
            )
    return missing


def test_every_error_has_a_test_that_knows_its_words() -> None:
    sources = {str(file.relative_to(SOURCE)): file.read_text(encoding="utf-8") for file in sorted(SOURCE.rglob("*.py"))}
    tests = [file.read_text(encoding="utf-8") for file in sorted(TESTS.rglob("*.py")) if file != Path(__file__)]
    missing = untested(sources, tests)
    assert missing == [], "no test knows the words of\n" + "\n".join(missing)


SAMPLE = """
def check(condition, words):
    if not condition:
        raise ValueError(f"vardrop: {words}")

def use(x):
    check(x > 0, "x must be positive")
    if x > 5:
        raise ValueError(f"vardrop.use: needs at most five apples, got {x}; eat some")
    try:
        run()
    except OSError as error:
        raise RuntimeError(str(error)) from error
"""


def test_the_check_can_fail_and_can_pass() -> None:
    assert len(untested({"sample": SAMPLE}, [])) == 2
    one = 'with raises(match=r"at most five .*, got 7"): use(7)'
    assert untested({"sample": SAMPLE}, [one]) == ["sample:7: x must be positive"]
    assert untested({"sample": SAMPLE}, [one, "assert 'must be positive' in output"]) == []


def test_prose_and_common_words_do_not_count() -> None:
    assert len(untested({"sample": SAMPLE}, ['"""At most five apples: x must be positive."""'])) == 2
    twice = SAMPLE + '\ndef other(x):\n    raise ValueError(f"vardrop.other: at most five, got {x}; eat some")\n'
    assert len(untested({"sample": twice}, ['match = "; eat some"'])) == 3


CORE = ["convert.py", "kl.py", "objective.py", "projection.py", "weights/*.py"]  # beyond it an edge may add the name


@pytest.mark.parametrize("glob", CORE)
def test_messages_begin_with_whose_they_are(glob: str) -> None:
    for file in SOURCE.glob(glob):
        for node in raised(ast.parse(file.read_text(encoding="utf-8"))):
            text = "".join(literals(node))
            assert not runs(text) or text.startswith("vardrop"), f"{file.name}, line {node.lineno}: {text}"
