# `make setup` makes .venv; every other target sees to it first. `make help` lists the targets.

VENV := .venv
PYTHON_BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RUN := $(PYTHON_BIN) -m
PIP := $(RUN) pip --disable-pip-version-check
# Passed on to the tool that a target runs: make test ARGS="-k layout -x"
ARGS ?=
# Processes that share the tests, by file, in the order of the folders: those of the last folders are
# the short ones, which leave no process without work at the end.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: FORCE help setup demo test test-all test-gpu test-keys lint format fuzz bench clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the project with its development tools

# The stamp is written last: an interrupted run is done again, and so is one whose Python is gone.
# A .venv that works is updated in place. Build tools come first: the build uses the pinned ones.
$(STAMP): pyproject.toml constraints.txt .python-version $(if $(realpath $(PYTHON_BIN)),,FORCE)
	@rm -f $@
	@$(RUN) pip --version >/dev/null 2>&1 || { \
	    python=$$(scripts/find-python) && rm -rf $(VENV) && \
	    echo "making $(VENV) with $$python" && "$$python" -m venv $(VENV); }
	@echo "installing into $(VENV) (the first time this takes minutes and about 6 GB)"
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip hatchling
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --group dev --editable .
	@touch $@

FORCE:

demo: $(STAMP) ## small models of all families there and back; MODEL=<folder or hub id>, FAMILY=<name>
	@$(PYTHON_BIN) examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(if $(FAMILY),--family "$(FAMILY)") $(ARGS)

test: $(STAMP) ## the fast test suite
	$(RUN) pytest $(SHARED) $(ARGS)

test-all: $(STAMP) ## every test, the slow ones included
	$(RUN) pytest $(SHARED) -m "slow or not slow" $(ARGS)

test-gpu: $(STAMP) ## the comparisons with transformers on a GPU, and what a GPU alone can answer
	@$(PYTHON_BIN) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'there is no GPU')"
	$(RUN) pytest tests/oracle $(ARGS)

test-keys: $(STAMP) ## the table of config keys beside another transformers; VERSION=5.24.0
	@mkdir -p build && rm -rf build/transformers
	$(PIP) download --quiet --no-deps --dest build/transformers "transformers==$(VERSION)"
	@cd build/transformers && ../../$(PYTHON_BIN) -m zipfile -e transformers-*.whl .
	TRANSFORMERS_SOURCE=build/transformers/transformers \
	    $(RUN) pytest tests/oracle/test_config_keys.py -k "config_classes or modeling or mrope" $(ARGS)

fuzz: $(STAMP) ## fuzz all that reads files of strangers; SECONDS=<for each reader>, ARGS=<of libFuzzer>
	@for target in $$(PYTHONPATH=tests $(RUN) fuzz 2>/dev/null); do \
	    echo "fuzzing $$target" && PYTHONPATH=tests $(RUN) fuzz $$target \
	        -max_total_time=$(or $(SECONDS),60) $(ARGS) || exit; \
	done

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## let ruff rewrite the code
	$(RUN) ruff check --fix
	$(RUN) ruff format

bench: $(STAMP) ## import, export and verify against a plain copy, 5 rounds of 4 GB (35 GB of disk); see docs/benchmarks.md
	$(RUN) benchmarks $(ARGS)

clean: ## remove caches and build results
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove .venv too
	rm -rf $(VENV)
