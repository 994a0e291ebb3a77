# Development commands. Each target does all of its set-up; python3 is enough to start.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOCK := docker/locks/dev.lock
READY := $(VENV)/.ready
XLA := $(VENV)-xla
XLA_LOCK := docker/locks/xla-dev.lock
RESOLVE = $(VENV)-lock/bin/uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-header --quiet
IMAGE := --extra parquet --extra gcs --extra hf --extra obstore

.PHONY: help setup train test test-dist test-xla test-container chaos lint format docs bench pictures lock clean

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

test: $(READY) ## all tests that need no root, GPU or internet (28 min on 2 cores)
	$(BIN)/python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder --durations=40 \
		--ignore=tests/dist --ignore=tests/xla --ignore=tests/container

test-dist: $(READY) ## tests of several processes (kills, lost nodes); need an idle machine (12 min)
	$(BIN)/python -m pytest --durations=15 tests/dist

test-xla: $(XLA)/.ready ## tests on XLA's CPU runtime, in a separate environment with torch 2.9 (7 min)
	PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest --durations=10 tests/xla

$(XLA)/.ready: $(XLA_LOCK) pyproject.toml
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement $(XLA_LOCK)
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

test-container: $(READY) ## build the image and run the Kubernetes Job on podman; needs root
	$(BIN)/python -m pytest tests/container

chaos: $(READY) ## kill, stop and starve runs for MINUTES (10) with SEED (1); results must be identical
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)

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
		--no-emit-package triton --no-emit-package cuda-bindings --no-emit-package cuda-pathfinder
	$(RESOLVE) pyproject.toml docker/locks/pins-xla.txt $(IMAGE) \
		--no-emit-package triton --output-file docker/locks/xla.lock
	$(RESOLVE) pyproject.toml docker/locks/pins-xla.txt --group test --output-file $(XLA_LOCK)
	$(RESOLVE) docker/locks/build.txt --output-file docker/locks/build.lock

clean: ## remove everything the targets create, except runs
	rm -rf $(VENV) $(VENV)-lock $(XLA) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
