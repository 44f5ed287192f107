"""Published results, run again: experiments write JSON, a report and a check read it.

* ``experiment.py``: what an experiment is; ``experiments/``: one file each, and the list of them.
* ``run.py``: runs a cell; a finished one is never run twice. ``sweep.py``: many at once, one JSON file for each;
  ``engines.py``: on what; ``time_left.py``, ``progress.py``, ``failures.py``: what is said meanwhile and at the end.
* ``claims.toml``: what the papers say, with source and tolerance; ``claims.py``: our number against theirs.
* ``report.py`` and ``check.py``: read JSON and claims only, run nothing.
"""
