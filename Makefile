# Bare `make` lists the targets. Each target that runs something builds .venv first; that costs nothing when it is
# built already. Needs git, make and Python 3.12 or 3.13 (PYTHON=/path/to/python3.12 make ... names one).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PY := .venv/bin/python
SHELL_FILES = $(shell git ls-files --cached --others --exclude-standard '*.sh' .ci/run)
RECIPES = llmjp-v4-midtraining aurora-cpt openseek-cpt snakmodel-danish latxa-instruct

.PHONY: help venv demo demo-clean recipes recipes-clean test test-fast test-full faults check format bench docs doctor clean cluster-packages browser-package

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

venv:  ## build .venv with the pinned requirements and this package
	@installers/venv.sh

demo: venv  ## the tutorial: from documents to a trained, merged and evaluated model, on CPU
	@$(PY) -m tasks.demo.run

demo-clean:  ## remove what the demo wrote
	@rm -rf runs/demo

recipes: venv  ## the five recipes in small, one after the other, with checks of their results
	@for recipe in $(RECIPES); do printf '\n#### %s\n' "$$recipe"; $(PY) -m "tasks.$$recipe.mini"; done

recipes-clean:  ## remove what the recipes wrote
	@rm -rf runs/mini runs/short $(RECIPES:%=runs/%)

test: venv cluster-packages browser-package  ## run the test-suite but for the long matrices of test-full
	@$(PY) -m pytest -q -m "not full" --durations=25

test-fast: venv  ## run the tests that take seconds
	@$(PY) -m pytest -q -m "not slow and not cluster and not full"

# -v: one line a test as it ends, with its seconds (tests/conftest.py), so that a run cut short still says where the time went
test-full: venv cluster-packages  ## run the long matrices only: every layout, family, fault and short recipe
	@$(PY) -m pytest -v -m full --durations=25

faults: venv  ## kill, fill, flip and replace: the fault suite (docs/reliability.md)
	@$(PY) -m pytest -q tests/faults

check: venv  ## format, lint, types, shell files and the policy tests
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@.venv/bin/shellcheck $(SHELL_FILES)
	@$(PY) -m pytest -q tests/test_policy.py

format: venv  ## rewrite the sources in the one format
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

bench: venv  ## run the benchmarks and print their tables
	@for file in benchmarks/*.py; do echo "== $$file"; OMP_NUM_THREADS=1 $(PY) "$$file"; done

docs: venv  ## write docs/reference/ from the code
	@$(PY) tools/write_reference.py

doctor: venv  ## say what is missing or incompatible on this machine
	@$(PY) -m megatron_cpt doctor

browser-package:
	@installers/browser_package.sh

cluster-packages:
	@installers/cluster_packages.sh

clean:  ## remove .venv and caches (runs/ and data/ stay)
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
