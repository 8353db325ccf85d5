# make demo   set up .venv and run the main job: warm start, RLSD, evaluation before and after
# make test   set up .venv and run everything that CI runs
# make bench  side-by-side benchmarks on this machine

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LATEST := .venv-megatron-latest

.PHONY: demo test lint bench clean

demo: $(READY)
	PYTHON=$(BIN)/python bash examples/run_rlsd_tiny.sh

test: lint models/SmolLM2-135M-Instruct/config.json $(LATEST)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest tests/distributed -m megatron_range

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

# Only Megatron-Core is its own here; everything else is found in $(VENV). Its newest releases ask
# for Python 3.12 but run on 3.11.
$(LATEST)/.ready: requirements/megatron-latest.txt $(READY)
	rm -rf $(LATEST)
	$(BIN)/python -m venv --without-pip $(LATEST)
	$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> $$($(LATEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	$(BIN)/pip --python $(LATEST)/bin/python install --quiet --disable-pip-version-check \
		--no-deps --ignore-requires-python -r requirements/megatron-latest.txt
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) build *.egg-info .mypy_cache .ruff_cache
