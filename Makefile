# make demo   set up .venv and run the main job: warm start, RLSD, evaluation before and after
# make test   set up .venv and run everything that CI runs
# make bench  side-by-side benchmarks on this machine

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench clean

demo: $(READY)
	PYTHON=$(BIN)/python bash examples/run_rlsd_tiny.sh

test: lint models/SmolLM2-135M-Instruct/config.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/embedded_engine.py

models/SmolLM2-135M-Instruct/config.json: | $(READY)
	$(BIN)/python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct

# torch comes first and alone: its exact version has a CPU build, a looser one pulls CUDA along.
$(READY): requirements/cpu.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements/cpu.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache
