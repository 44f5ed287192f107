"""All data that have a name: what each is, where it was found, how it is got."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sklearn.datasets

from vardrop.data.places import JPEG_FILE, SOURCES, find, how_to_get, roots
from vardrop.data.text import TEXTS


@dataclass(frozen=True)
class Found:
    """A line of :func:`listing`.

    Attributes:
        name: to give to :func:`load`, or, of a text, to :func:`vardrop.data.text.load_text`.
        what: it is, in a few words.
        where: the folder or file it would be read from, None if it was not found.
        how: to get it, in a sentence.
    """

    name: str
    what: str
    where: Path | None
    how: str


def listing(root: Path | None = None) -> list[Found]:
    """All data sets that have a name: what each is, where it was found, how to get it.

    Args:
        root: a folder to look in before the others (see :func:`load`).

    Returns:
        One line for each.

    Example:
        >>> from vardrop.data import listing
        >>> [found.name for found in listing()][:5]
        ['digits', 'mnist', 'fashion-mnist', 'cifar10', 'notmnist']
    """
    digits = Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"
    lines = [Found("digits", "1,797 handwritten digits, 8 × 8", digits, "it comes with scikit-learn")]
    for name, source in SOURCES.items():
        found = find(name, root)
        what = source.what + (" (JPEG q75)" if found is not None and found[1] == (JPEG_FILE,) else "")
        lines.append(Found(name, what, found and found[0], how_to_get(name)))
    for name, text in TEXTS.items():
        files = (place / text.file for place in roots(root))
        lines.append(Found(name, text.what, next(filter(Path.is_file, files), None), text.by_hand))
    return lines
