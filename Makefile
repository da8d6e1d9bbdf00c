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

# Launched runs mostly wait: those tests run two at a time. With a path in PYTEST_ARGS, that alone is run.
test: install
ifeq ($(filter-out -%,$(PYTEST_ARGS)),)
	$(BIN)/python -m pytest --ignore tests/launch $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/launch -n 2 --dist loadfile $(PYTEST_ARGS)
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

lint: $(BIN)/elas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
