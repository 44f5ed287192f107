"""Published results, run again: experiments write JSON, a report and a check read it.

* ``experiment.py``: what an experiment is; ``experiments/``: one file each, and the list of them.
* ``run.py``: runs cells and writes one JSON file for each; a finished cell is never run twice.
* ``claims.toml``: what the papers say, with source and tolerance; ``claims.py``: our number against theirs.
* ``report.py`` and ``check.py``: read JSON and claims only, run nothing.
"""
