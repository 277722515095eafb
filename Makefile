# `make demo` and `make test` need Python >= 3.11 and nothing else: the environment is made on the first call.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Test processes run side by side, so each keeps to one thread; each takes a half of the tests, in their order, then of the rest.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
PAPERS := papers/src papers/tests

ifneq ($(wildcard ../shared/data),)
export TAULEARN_DATA ?= $(CURDIR)/../shared/data
endif

.PHONY: help env demo test test-papers test-all coverage lint format types docs dist bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## the virtual environment .venv with pinned versions

$(STAMP): pyproject.toml papers/pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "taulearn needs Python >= 3.11, but '$(PYTHON)' is not on the PATH; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "taulearn needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[test]' --editable './papers[ray]'
	@touch $@

demo: $(STAMP) ## train and prune a residual network on the digits, and leave a report
	$(BIN)/taulearn train --data digits --network resnet --hidden-layers 6 --width 100 --l1 0.01 --prune 0.01 --lr 0.05 \
	  --batch-size 20 --epochs 30 --seed 0 --run runs/demo --overwrite
	@test -f runs/demo/report.html

test: $(STAMP) ## the tests and the examples in the docstrings, without the long ones and the papers'
	$(PYTEST)

test-papers: $(STAMP) ## the tests of the papers' suites, without the long ones
	$(PYTEST) $(PAPERS)

test-all: $(STAMP) ## every test
	$(PYTEST) -m "" src tests $(PAPERS)

coverage: $(STAMP) ## the tests, and which lines of the package they reach: at least 90 %
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90

lint: $(STAMP) ## ruff: rules and layout; import-linter: rooms import downwards
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## mypy
	$(BIN)/mypy

docs: $(STAMP) ## the documentation, strictly: every code cell is run
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -b html -E -W --keep-going -q docs docs/_build/html

dist: $(STAMP) ## wheel and source archive in dist/, each tried in an empty environment, with core dependencies alone and with [app]
	rm -rf dist build/try && mkdir -p build
	$(BIN)/python -m build --outdir dist >/dev/null
	$(BIN)/python -c "import re; print(re.search('\`\`\`python\n(import torch.*?)\`\`\`', open('README.md').read(), re.S)[1])" >build/first_block.py
	for file in dist/*.whl dist/*.tar.gz; do \
	  $(PYTHON) -m venv --clear build/try; \
	  build/try/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt "$$file"; \
	  (cd build && try/bin/python -W error::DeprecationWarning:taulearn first_block.py | tail -1); \
	  build/try/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt "$$file[app]"; \
	  (cd build && try/bin/taulearn train --epochs 2 --run try/run --overwrite --seed 0 && test -f try/run/report.html); \
	done
	@ls -l dist

bench: $(STAMP) ## seconds per epoch against hand-written loops
	$(BIN)/python benchmarks/training_step.py

clean: ## remove build output and caches; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov docs/_build
	find src tests papers -name __pycache__ -type d -prune -exec rm -rf {} +
