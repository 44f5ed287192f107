"""Texts, as the codes of their characters."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vardrop.data.places import roots


class Text(NamedTuple):
    """A text that lives in a file: what it is, the file below a root, how to get it."""

    what: str
    file: str
    by_hand: str


TEXTS = {
    "tinyshakespeare": Text(
        "plays of Shakespeare, 1,115,394 characters",
        "text/tinyshakespeare.txt",
        "take data/tinyshakespeare/input.txt of https://github.com/karpathy/char-rnn",
    ),
}


class Characters(NamedTuple):
    """A text as numbers: ``alphabet[codes[i]]`` is its i-th character.

    Attributes:
        codes: int64 ``[characters]``.
        alphabet: the characters that occur in the text, in the order of their code points.
    """

    codes: Tensor
    alphabet: str


def load_text(name: str, root: Path | None = None) -> str:
    """Read a text that has a name; folders are looked for as :func:`vardrop.data.load` does.

    Args:
        name: ``tinyshakespeare``, 1,115,394 characters.
        root: a folder to look in first.

    Returns:
        The text.

    Raises:
        FileNotFoundError: if the file is not there, with the places looked in and how to get it.
        ValueError: if there is no text of that name, or the file is none in UTF-8.

    Example:
        >>> from vardrop.data.text import load_text
        >>> load_text("tinyshakespeare")[:13]  # doctest: +SKIP
        'First Citizen'
    """
    if name not in TEXTS:
        raise ValueError(f"vardrop.data: the name of a text must be one of {', '.join(TEXTS)}, got {name!r}")
    text = TEXTS[name]
    places = [place / text.file for place in roots(root)]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"vardrop.data: the text {name} must be a file in a folder that is looked at, got none of "
            f"{'; '.join(map(str, places))}; {text.by_hand}, or set VARDROP_DATA to the folder that has {text.file}"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"vardrop.data: the text {path} must be in UTF-8, got other bytes ({error})") from None
    if not content:
        raise ValueError(f"vardrop.data: the text {path} must have characters, got an empty file; get it anew")
    return content


def encode(text: str) -> Characters:
    """The characters of a text as numbers.

    Args:
        text: any text.

    Returns:
        The codes, and the alphabet that they count in.

    Example:
        >>> from vardrop.data.text import encode
        >>> encode("banana")
        Characters(codes=tensor([1, 0, 2, 0, 2, 0]), alphabet='abn')
    """
    alphabet = "".join(sorted(set(text)))
    code = {character: i for i, character in enumerate(alphabet)}
    return Characters(torch.tensor([code[character] for character in text], dtype=torch.int64), alphabet)
