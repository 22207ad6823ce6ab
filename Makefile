# Needs Python 3.11 or newer, git and make. Every target builds .venv first when it is missing,
# unfinished, or older than the files that say what belongs in it.

PYTHON ?= python3
# More arguments for pytest: make test PYTEST_ARGS='-k cbam -x'
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# Written last, so that a build that failed half-way is never taken for a finished one.
READY := $(VENV)/.ready

# Told apart from a .venv that somebody made for himself, which is not to be cleared.
OURS := $(VENV)/.made-by-make

# A .venv outlives the interpreter it was made with: it is stale when it cannot start.
ifneq ($(shell $(RUN) -c 'print(1)' 2>/dev/null),1)
$(READY): rebuild
endif

.DEFAULT_GOAL := help
.PHONY: help train test test-slow lint format clean rebuild

help:
	@echo 'make train      train on the bundled digits, into runs/digits'
	@echo 'make test       run the tests, except the slow ones'
	@echo 'make test-slow  run the slow tests'
	@echo 'make lint       check style and types'
	@echo 'make format     put the code into the style'
	@echo 'make clean      remove .venv, caches and build products (not runs/)'

train: $(READY)
	$(RUN) train.py --config=configs/digits.py --workdir=runs/digits

test: $(READY)
	$(RUN) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: $(READY)
	$(RUN) -m pytest -n 2 --dist worksteal -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix-only
	$(RUN) -m ruff format

clean:
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

rebuild:

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed:" \
	    "name one, as in make PYTHON=python3.12 $(or $(MAKECMDGOALS),test)" >&2; exit 1; }
	@[ ! -d $(VENV) ] || [ -e $(OURS) ] || [ -e $@ ] || { \
	  echo "$(VENV) was not made by make, which would clear it: move it away, or name another folder" \
	    "as in make VENV=.venv-make $(or $(MAKECMDGOALS),test)" >&2; exit 1; }
	@echo 'Building $(VENV), which takes a few minutes the first time'
	@rm -rf $(VENV) && mkdir $(VENV) && touch $(OURS)
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@
