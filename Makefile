# make quickstart | test | lint: each makes its own environment in .venv from constraints.txt first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# torch first and alone: other packages would pull the newest build for CUDA. On a GPU box set TORCH to the build you want.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

.PHONY: quickstart test lint install clean

$(BIN)/elas: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip<27" setuptools
	$(BIN)/python -m pip install -q -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

install: $(BIN)/elas
	$(BIN)/elas build

quickstart: install
	$(BIN)/elas quickstart $(ARGS)

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(BIN)/elas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
