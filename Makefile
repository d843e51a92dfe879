# Everything runs in a virtual environment of its own; PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready

# CPU=1 installs PyTorch without CUDA: 1.7 GB in place of 6.2. uv knows where such builds are;
# TORCH_INDEX=ADDRESS names an index to take them from instead.

.PHONY: help demo test test-browser torture check format docs words site wheel bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

$(CORE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifdef CPU
ifdef TORCH_INDEX
	$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) 'torch>=2.4' 'torchvision>=0.19'
else
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu 'torch>=2.4' 'torchvision>=0.19'
endif
endif
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(READY): $(CORE)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(CORE)  ## set up and run the whole tool on generated pictures
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

site: $(READY)  ## build the documents as a web site in site/, with search and an API reference
	$(BIN)/python -m mkdocs build --quiet --strict

wheel: $(READY)  ## build the wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

bench: $(READY)  ## measure both phases: make bench BENCH="--data DIR --backbone DIR" GRADED=DIR
	$(BIN)/python benchmarks/phase_one.py $(BENCH)
	$(BIN)/python benchmarks/phase_two.py
	$(BIN)/python benchmarks/quality.py $(GRADED)

clean:  ## remove the virtual environment and what tests leave
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
