# Two commands do all set-up on a fresh machine with Python 3.11 to 3.13: `make run` and `make test`.

SHELL := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
HOST ?= 127.0.0.1
PORT ?= 8000
# More options of `stepserve serve`, such as --config or --allow-anonymous.
OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test test-all check coverage format docs bench clean help

help:  ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train]'
	touch $@

# Under a terminal the service gets a process group of its own: Ctrl-C then reaches the service and
# not make, which would otherwise report an interrupt although the service drained and exited 0.
run: $(INSTALLED)  ## Serve on HOST:PORT and make a first image into out/.
	@if [ -t 0 ]; then set -m; fi; \
	$(BIN)/stepserve serve --host $(HOST) --port $(PORT) --first-image out $(OPTIONS); exit $$?

# What measures seconds and memory, or computes on every core, has the machine to itself. Of the rest
# two run at once: services, which mostly wait, and what computes, on one thread each.
ALONE := $(addprefix tests/integration/test_,chaos.py endurance.py load.py service.py uploads.py)
SERVICES := tests/browser tests/integration $(ALONE:%=--ignore=%) --ignore=tests/integration/test_cli.py
OTHERS := tests/integration/test_cli.py tests/parity tests/unit
CHOSEN := -m "not slow"
PYTEST = $(BIN)/python -m pytest --durations=12 $(CHOSEN)
# A file goes to one worker as a whole, which starts what it needs once.
TWO_AT_ONCE = $(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)  ## Run every test that is not marked slow.
	@status=0; \
	$(PYTEST) $(ALONE) || status=1; \
	$(TWO_AT_ONCE) $(SERVICES) || status=1; \
	$(TWO_AT_ONCE) $(OTHERS) || status=1; \
	exit $$status

test-all: CHOSEN :=
test-all: test  ## Run every test.

check: $(INSTALLED)  ## What CI runs first: format, lint, types, import direction, words.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_words.py

coverage: $(INSTALLED)  ## Print which lines the unit tests run.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --cov --cov-report=term:skip-covered tests/unit

format: $(INSTALLED)  ## Format the code and mend what the linter can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The theme announces its successor at each build; the pages are built by pinned versions.
docs: $(INSTALLED)  ## Build the documentation as a site into site/; it needs no network.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(INSTALLED)  ## Race the service against two others for five minutes; the page is out/bench/benchmarks.md.
	$(BIN)/python -m loadtests.race --servers stepserve fastapi-lock ray-batch-keyed --rounds 1 \
	  --requests 40 --in-flight 10 --calibration-repeats 1 --no-knees --out out/bench/race.json
	$(BIN)/python -m loadtests.report out/bench/race.json --out out/bench/benchmarks.md

bench-engine: $(INSTALLED)  ## Measure the engine against plain diffusers, side by side.
	$(BIN)/python -m loadtests.engine_bench
	$(BIN)/python -m loadtests.limit_bench
	$(BIN)/python -m loadtests.http_bench

clean:  ## Remove the virtual environment and caches.
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build site *.egg-info
