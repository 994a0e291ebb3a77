# Development commands. Each target does all of its set-up; python3 is enough to start.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := docker/locks/dev.lock
READY := $(VENV)/.ready
XLA := $(VENV)-xla
XLA_LOCK := docker/locks/xla-dev.lock
PYTHON312 ?= python3.12
CUDA := $(VENV)-cuda
RESOLVE = $(VENV)-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-header --quiet
# torch.compile needs it, which is for GPUs.
NOT_COMPILED := --no-emit-package setuptools
IMAGE := --extra parquet --extra timm --extra gcs --extra hf --extra obstore

.PHONY: help setup train test test-dist test-xla test-container test-cuda bench-cuda cuda-rehearsal rehearse-tests \
	rehearse-benchmarks cuda-machine cuda-wheels cuda-data chaos fuzz lint format docs bench pictures lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv with the locked dependencies and lightship, editable

$(READY): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

train: $(READY) ## train and test on the embedded handwritten digits
	$(BIN)/lightship fit --config digits

test: $(READY) ## all tests that need no root, GPU or internet (15 min on 2 cores)
	$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder --durations=40 \
		--ignore=tests/dist --ignore=tests/xla --ignore=tests/container --ignore=tests/cuda

test-dist: $(READY) ## tests of several processes (kills, lost nodes); need an idle machine (4 min)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=15 tests/dist

test-xla: $(XLA)/.ready ## tests on XLA's CPU runtime, in a separate environment with torch 2.9 (6 min)
	PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest --numprocesses=2 --dist=loadgroup --durations=10 tests/xla

$(XLA)/.ready: $(XLA_LOCK) pyproject.toml
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(XLA_LOCK)
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

test-container: $(READY) ## build the image and run the Kubernetes Job on podman; needs root
	$(BIN)/python -m pytest tests/container

test-cuda: $(READY) ## tests of a GPU; without one each is skipped (DEVICE=cpu: what can be rehearsed)
	$(BIN)/python -m pytest --durations=10 tests/cuda

bench-cuda: $(READY) ## benchmarks of a GPU within BUDGET_S (280), on the files of cuda-data (PARTS=NAME,NAME)
	$(BIN)/python -m benchmarks.cuda --budget-s $(or $(BUDGET_S),280) $(if $(PARTS),--parts $(PARTS))

cuda-rehearsal: rehearse-tests rehearse-benchmarks ## the two above on the CPU at toy size: an error of import or flags shows (2 min)

rehearse-tests: $(READY)
	DEVICE=cpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet --numprocesses=2 tests/cuda

rehearse-benchmarks: $(READY)
	DEVICE=cpu $(BIN)/python -m benchmarks.cuda --data build/cuda --budget-s 900

cuda-machine: cuda-wheels $(CUDA)/.ready ## tests/cuda/run.sh on the CPU, in an environment as on that machine (PYTHON312=; 10 min)
	DEVICE=cpu OMP_NUM_THREADS=1 WORKERS=2 LIMIT_S=2000 PYTHON=$(CUDA)/bin/python bash tests/cuda/run.sh

$(CUDA)/.ready: tests/cuda/machine.txt
	$(PYTHON312) -m venv --clear $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

cuda-wheels: $(READY) ## build/cuda/wheels: what a machine with a GPU and no network lacks (tests/cuda/README.md)
	$(BIN)/python -m tests.cuda.wheels

cuda-data: $(READY) ## build/cuda: the files of bench-cuda (CIFAR10_TAR=, TRASHNET_TAR=, AIRBENCH_DIR=)
	$(BIN)/python -m benchmarks.cuda_data "$(CIFAR10_TAR)" "$(TRASHNET_TAR)" "$(AIRBENCH_DIR)"

chaos: $(READY) ## kill, stop and starve runs for MINUTES (10) with SEED (1); results must be identical
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)

fuzz: $(READY) ## mutated files through every reader for MINUTES (10) with SEED (1)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)

lint: $(READY) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## fix and format with ruff
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(READY) ## generate docs/settings.md from src/lightship/config.py
	$(BIN)/python -m tests.support.settings_page

bench: $(READY) ## benchmarks beside other libraries (TABLES=NAMES; CIFAR10=, IMAGENET=class folders)
	$(BIN)/python -m benchmarks $(TABLES)

pictures: $(READY) ## make the README's pictures from a real run (CIFAR10=class folders); needs Chromium and tmux
	$(BIN)/python -m tests.support.pictures $(if $(CIFAR10),--cifar10 $(CIFAR10))

lock: ## update docker/locks: the tests' dependencies and each image's, with hashes
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(RESOLVE) pyproject.toml --group dev --extra parquet \
		--constraints docker/locks/pins.txt --output-file $(LOCK)
	$(RESOLVE) pyproject.toml $(IMAGE) --constraints $(LOCK) --output-file docker/locks/cuda.lock
	$(RESOLVE) pyproject.toml $(IMAGE) --constraints $(LOCK) --output-file docker/locks/cpu.lock \
		--no-emit-package triton --no-emit-package cuda-bindings --no-emit-package cuda-pathfinder \
		$(NOT_COMPILED)
	$(RESOLVE) pyproject.toml docker/locks/pins-xla.txt $(IMAGE) \
		--no-emit-package triton --output-file docker/locks/xla.lock $(NOT_COMPILED)
	$(RESOLVE) pyproject.toml docker/locks/pins-xla.txt --group test --output-file $(XLA_LOCK)
	$(RESOLVE) docker/locks/build.txt --output-file docker/locks/build.lock

clean: ## remove everything the targets create, except runs
	rm -rf $(VENV) $(VENV)-lock $(XLA) $(CUDA) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
