# Needs make and Python >= 3.10, nothing else: the first target that is run builds .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
# The interpreter of `make test-oldest`; one that pyenv keeps is found as well.
OLDEST_PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
CHECKED := $(wildcard avion_dali pipelines train)
DOCUMENTED := $(wildcard avion_dali pipelines)
# Touched after an installation, so that it happens again only when one of the requirements changes.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.PHONY: help demo demo-finetune media test test-oldest field lint types clean

help:
	@echo "make demo   train on a small made-up data set and write a report (runs/demo)"
	@echo "make demo-finetune   retrieval, recognition and VideoMAE from it (runs/demo_finetune)"
	@echo "make media  the videos that benchmarks decode, without network (media/)"
	@echo "make test   the whole test suite"
	@echo "make test-oldest   the same with the oldest versions that are supported, on Python 3.12 (.venv-oldest)"
	@echo "make field  only the tests of videos as users have them, a line for each kind"
	@echo "make lint   style, spelling, docstrings and size limits"
	@echo "make types  static types"
	@echo "make clean  remove .venv, .venv-oldest, caches and build leftovers; runs/ stays"

demo: $(INSTALLED)
	$(BIN)/avion-dali demo --output-dir runs/demo

demo-finetune: $(INSTALLED)
	$(BIN)/avion-dali demo-finetune --demo-dir runs/demo --output-dir runs/demo_finetune

media: $(INSTALLED)
	$(BIN)/python -m benchmarks.media --output media

# Each file of tests stays in one process, whose fixtures its tests share.
test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-oldest:
	@for python in $(OLDEST_PYTHON) $$(pyenv root 2>/dev/null)/versions/3.12*/bin/python3.12; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || continue; \
	  PIP_CONSTRAINT=$(CURDIR)/requirements-oldest.txt exec $(MAKE) test VENV=.venv-oldest PYTHON="$$python"; \
	done; \
	echo "error: Python 3.12 is needed; name one: make test-oldest OLDEST_PYTHON=/path/to/python3.12" >&2; exit 1

field: $(INSTALLED_DEV)
	$(BIN)/python tests/field_suite.py

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/vulture $(CHECKED) --min-confidence 80
	$(BIN)/flake8 $(DOCUMENTED)
	$(BIN)/python -m pytest tests/test_hygiene.py tests/test_layering.py

types: $(INSTALLED_DEV)
	$(BIN)/mypy $(CHECKED)

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: Python 3.10 or newer is needed, and '$(PYTHON)' is missing or older;" \
	    "name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments (modules venv and ensurepip);" \
	    "on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(PIP) install --requirement requirements.txt --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) install --editable '.[dev]'
	@touch $@
