# Every target does its own set-up from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint type bench dist clean

demo: $(VENV)/demo.done  ## see an index get better and get restored
	$(BIN)/simskip demo

test: $(VENV)/dev.done  ## all tests
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/dev.done  ## style and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(VENV)/dev.done  ## mypy, strict
	$(BIN)/mypy

bench: $(VENV)/dev.done  ## measured numbers, written to benchmarks/results; the last three need data
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/faiss_types.py
	$(BIN)/python benchmarks/stores.py
	$(BIN)/python benchmarks/edge_refine.py
	$(BIN)/python benchmarks/fortnight.py
	$(BIN)/python benchmarks/crashes.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/fitting.py
	$(BIN)/python benchmarks/gate.py
	$(BIN)/python benchmarks/crossfit.py
	$(BIN)/python benchmarks/sets.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/bf16.py

dist: $(VENV)/dev.done  ## wheel and source distribution
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo *.egg-info

$(VENV)/demo.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[faiss,edge,fit,eval,demo]'
	touch $@

$(VENV)/dev.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@
