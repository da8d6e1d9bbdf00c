# make quickstart | test | test-gpu | lint | typecheck | docs: each makes its own environment in .venv from constraints.txt first.
SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV ?= .venv
BIN := $(VENV)/bin
# torch first and alone: other packages would pull the newest build for CUDA. On a GPU box set TORCH to the build you want.
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
LOG := $(VENV)/install.log

# $(call step,WHAT,COMMAND): say WHAT, run COMMAND with its output in $(LOG), and show where it is: one changing line on a
# terminal, else a line every 10 seconds. Its last lines are shown when it fails.
define step
	@echo "● $(1)"
	@$(2) >>$(LOG) 2>&1 & pid=$$!; trap "kill $$pid; exit 130" INT TERM; \
	while kill -0 $$pid 2>/dev/null; do \
	  sleep 0.5; \
	  now=$$(grep -aoE '^ *(Collecting|Downloading|Building|Preparing|Installing|Requirement) .*' $(LOG) | tail -n 1 | cut -c 1-76); \
	  if [ -t 1 ]; then printf '\r\033[K  %s' "$$now"; \
	  elif [ $$(( (count += 1) % 20 )) -eq 0 ]; then echo "  $$now"; fi; \
	done; \
	if [ -t 1 ]; then printf '\r\033[K'; fi; \
	wait $$pid || { tail -n 30 $(LOG); echo "error: this step failed; its whole output is in $(LOG)"; exit 1; }
endef

.PHONY: quickstart test test-gpu lint typecheck docs install clean

$(BIN)/elas: constraints.txt pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version); make PYTHON=/path/to/python3.11 (or 3.12, 3.13)"; exit 2; }
	@echo "● environment in $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@: > $(LOG)
	$(call step,pip and setuptools,$(BIN)/python -m pip install --upgrade "pip<27" setuptools)
	$(call step,$(TORCH),$(BIN)/python -m pip install -c constraints.txt $(foreach word,$(TORCH),"$(word)"))
	$(call step,ELAS and what it stands on,$(BIN)/python -m pip install -c constraints.txt -e ".[dev]")
	@touch $@

install: $(BIN)/elas
	@$(BIN)/elas build

quickstart: install
	@$(BIN)/elas quickstart $(ARGS)

# Files run two at a time; launched runs, some of which are timed, not beside what computes. With a path in PYTEST_ARGS,
# that alone is run, in one process.
test: install
ifeq ($(filter-out -%,$(PYTEST_ARGS)),)
	$(BIN)/python -m pytest --ignore tests/launch -n 2 --dist loadfile $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/launch -n 2 --dist loadfile $(PYTEST_ARGS)
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

# On a GPU: the tests that run on any device, and those of tests/gpu. TEST_GPU_JOBS processes share it.
TEST_GPU_JOBS ?= 4
test-gpu: install
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: make test-gpu: torch sees no CUDA device (torch " + torch.__version__ + ")")'
	$(BIN)/python -m pytest --device cuda -n $(TEST_GPU_JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(BIN)/elas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory typecheck

typecheck: $(BIN)/elas
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The documentation, into site/. Fails for a broken link, and for a setting, command or option without a description.
docs: $(BIN)/elas
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "site/index.html; with search: python -m http.server --directory site"

clean:
	rm -rf $(VENV) build site *.egg-info
