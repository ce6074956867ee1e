# Two commands, each complete by itself on a fresh Linux machine with Python 3.11 or newer:
#   make demo    sets up .venv, trains a character LSTM without backpropagation, prints what it reached
#   make test    sets up .venv, then runs the whole test suite
# Without make: see README, "Install".

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' constraints.txt)
WORKERS := -n auto --dist worksteal
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test quick check lint types bench clean

demo: $(VENV)/.core
	$(BIN)/python -m reroll demo

test: $(VENV)/.dev check
	$(BIN)/python -m pytest $(WORKERS)

quick: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

check: lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.core
	$(BIN)/python -m reroll bench zeroth

# torch goes in first and by its exact version: once it is there, nothing else that asks for torch installs another.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH) -c constraints.txt numpy
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
