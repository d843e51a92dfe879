# Everything runs in a virtual environment of its own; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-browser torture check format docs words bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## set up and run the whole tool on generated pictures
	$(BIN)/mirip-fast demo

test: $(READY)  ## set up and run all tests, a process of them per core
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-browser: $(READY)  ## the tests of the report page, in headless Chromium, which has to be there
	MIRIP_FAST_BROWSER=required $(BIN)/python -m pytest -m browser

torture: $(READY)  ## kills, power losses, flipped bits, full disks, races against the store (minutes)
	$(BIN)/python tests/torture.py

check: $(READY)  ## lint, format, types, and whether generated files are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## write the settings file, option tables and pages of commands from the code
	$(BIN)/python docs/generate.py

words: $(READY)  ## bring the catalogues of translations up to date with the messages in the code
	$(BIN)/python docs/messages.py

bench: $(READY)  ## measure both phases: make bench BENCH="--data DIR --backbone DIR" GRADED=DIR
	$(BIN)/python benchmarks/phase_one.py $(BENCH)
	$(BIN)/python benchmarks/phase_two.py
	$(BIN)/python benchmarks/quality.py $(GRADED)

clean:  ## remove the virtual environment and what tests leave
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
