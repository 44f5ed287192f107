"""Every error that vardrop raises has a test that knows its words.

The words are read from the source, in runs of three, where a value that is filled in counts as a word. A test knows an
error if one of its strings (a pattern for ``pytest.raises``, what it looks for in the output of the command line) has a
run that no other error has, or several that others have too.
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
SEVERAL = 3  # runs in one string, or all there are, are as good as one that no other error has
PASSING_ON = {"require"}  # functions that raise the words they are given, used outside the file that they stand in
Run = tuple[str, ...]


class Message(NamedTuple):
    """What one error says, with "*" for what is filled in, and where it is raised."""

    place: str
    text: str

    @property
    def runs(self) -> set[Run]:
        return {run for run in runs(self.text) if run.count("*") < 2}


def runs(text: str) -> set[Run]:
    """All runs of so many words, but for the name at the beginning of a message."""
    words = re.findall(r"\w+|\*", re.sub(r"^vardrop[\w.]*:", "", text).lower())
    return {tuple(words[i : i + LENGTH]) for i in range(len(words) - LENGTH + 1)}


def text_of(node: ast.AST) -> str:
    """The words of an expression: its strings one after the other, and a star for every value in an f-string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else " * " for value in node.values)
    return " ".join(filter(None, map(text_of, ast.iter_child_nodes(node))))


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
                if parameters & names and not Message("", text_of(node.exc)).runs:
                    passing.add(function.name)
    for node in raised(tree):
        yield Message(f"{place}:{node.lineno}", text_of(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in passing or called in PASSING_ON:
                yield Message(f"{place}:{node.lineno}", text_of(node))


def docstrings(tree: ast.Module) -> set[int]:
    """The nodes that are docstrings: prose, which tests nothing."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def known_runs(tree: ast.Module) -> Iterator[set[Run]]:
    """For every string of a test the runs of words in it, with patterns read as the text that they match."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            pattern = re.sub(r"\.[*+]\??|\\[wdsS][*+]?", " * ", node.value)
            known = runs(re.sub(r"\\(.)", r"\1", pattern))
            yield known | {(*run[:i], "*", *run[i + 1 :]) for run in known for i in range(LENGTH)}


def untested(sources: dict[str, str], tests: list[str]) -> list[str]:
    """The errors whose words no test knows."""
    found = [message for place, text in sources.items() for message in messages(ast.parse(text), place)]
    found = [message for message in found if message.runs]  # one without words passes on what another said
    count = Counter(run for message in found for run in message.runs)
    strings = [known for text in tests for known in known_runs(ast.parse(text)) if known]

    def is_known(message: Message) -> bool:
        common = [message.runs & known for known in strings]
        return any(
            len(some) >= min(SEVERAL, len(message.runs)) or any(count[run] == 1 for run in some) for some in common
        )

    return [f"{message.place}: {message.text}" for message in found if not is_known(message)]


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
            text = text_of(node)
            assert not runs(text) or text.startswith("vardrop"), f"{file.name}, line {node.lineno}: {text}"
