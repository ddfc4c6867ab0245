# `make demo` and `make test` set everything up in .venv the first time. ARGS passes options: make demo ARGS="--seeds 1"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.handful-ready
# Threads that spin while they wait make two busy cores ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-quick test-browser docs lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(READY)  ## make .venv with handful and its development tools

# pip itself is upgraded too: those of older Pythons do not read every wheel's metadata.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## a published model and other people's digits: what a handful is worth, table, pictures
	$(BIN)/handful demo $(ARGS)

# The tests' networks are tiny: a second thread only waits, and on a busy machine holds up the first. A file's tests share
# what they set up, so a file stays with one process.
SIDE_BY_SIDE ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test test-quick: export OMP_NUM_THREADS ?= 1

test: lint docs  ## format, lint, types, the documentation, and every test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-quick: $(READY)  ## the tests that take less than ten seconds each
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow' $(ARGS)

# Debian's chromium where no browser is there; where neither is to be had, this says so and fails.
test-browser: $(READY)  ## the report in a real, headless browser; HANDFUL_SCREENSHOTS=DIR keeps pictures of it
	@command -v chromedriver >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } || \
	  { echo "NO BROWSER: the report was NOT tested in one. Install chromium and chromedriver."; exit 1; }
	HANDFUL_BROWSER=1 $(BIN)/python -m pytest tests/report/test_browser.py $(ARGS)

docs: $(READY)  ## the documentation as a site in build/site, strictly
	$(BIN)/mkdocs build --quiet

lint: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove .venv and caches; nothing that a run wrote
	rm -rf $(VENV) .pytest_cache .ruff_cache build src/*.egg-info
