# `make demo` and `make test` set up a virtual environment by themselves. VENV= chooses another place for it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench docs clean

demo: $(READY)  ## train on real digits with three methods, print a table, write a report
	$(BIN)/vardrop demo --out runs/demo

test: $(READY)  ## every test and every doctest
	$(BIN)/python -m pytest

check: $(READY)  ## format, lint, types, doctests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q src README.md docs

bench: $(READY)  ## speed and memory as ratios to plain layers, side by side in one run
	$(BIN)/python -m benchmarks

docs: $(READY)  ## the docstrings as pages, in build/docs
	$(BIN)/pdoc --docformat google --math --output-directory build/docs vardrop

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
