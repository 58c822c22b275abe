# Everything sets itself up: the virtual environment is made on first use and brought up to date when pyproject.toml changes.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHARED ?= ../shared/data

# Real data for local checks, where it is at hand; tests that need it say so and skip where it isn't.
ifneq ($(wildcard $(SHARED)/splits),)
export ADAPTKIT_SPLITS_DIR ?= $(abspath $(SHARED)/splits)
export ADAPTKIT_FEATURES_DIR ?= $(abspath $(SHARED)/features)
endif
# Whole datasets, where somebody has unpacked the zips beside themselves; the heavier checks run on them.
ifneq ($(wildcard $(SHARED)/images/eurosat/2750),)
export ADAPTKIT_DATA_ROOT ?= $(abspath $(SHARED)/images)
endif

.PHONY: help run test slow check bench setup clean

help:  ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## make the virtual environment

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing adaptkit and its dependencies into $(VENV) (about two minutes the first time) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,lora,quantised,onnx,ray,serve,studio,tensorboard]'
	@touch $(READY)

run: $(READY)  ## a real few-shot experiment on real images, with the embedded backbone
	@$(BIN)/adaptkit compare digits --protocol base-to-novel --shots 16 --methods zero-shot,linear-probe,tip-adapter,tip-adapter-f,clip-adapter,coop,maple --out runs/first --overwrite
	@echo && echo "Predict an image with the best adapter just saved:"
	@echo "  $(BIN)/adaptkit predict runs/first/best tests/images/three.png"

test: $(READY)  ## the tests, on every core (at most four)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

slow: $(READY)  ## the heavier checks
	@$(BIN)/python -m pytest -m slow

check: $(READY)  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)  ## speed, as ratios against a plain path in the same run (JSON in benchmarks/speed/results)
	@$(BIN)/python -m benchmarks.speed

clean:  ## remove what was made here, the virtual environment too
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
