"""What tests of the command line share."""

from __future__ import annotations

import re

Result = tuple[int, str, str]  # exit status, and what was said on either stream


def refused(result: Result, words: str) -> None:
    """It ended with status 2 and one line that has these words."""
    status, _, err = result
    assert status == 2
    assert re.fullmatch(r"vardrop: error: .*\n", err), err  # one line, no traceback
    assert re.search(words, err), err
