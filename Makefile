VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PYTHONDONTWRITEBYTECODE := 1

# an environment that is there, where nothing can be installed: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python

.PHONY: demo test test-slow proof upstream gpu check

demo: $(STAMP)
	$(BIN)/medft demo

test: $(STAMP)
	$(BIN)/pytest -m "not gpu and not slow and not proof and not upstream"

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu and not proof and not upstream"

proof: $(STAMP)
	$(BIN)/pytest -m "proof and not gpu" --result-table benchmarks/results/proof.json

upstream: $(STAMP)
	$(BIN)/pytest -m "upstream and not gpu"

gpu: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(STAMP))
	PYTHONPATH="$(CURDIR):$$PYTHONPATH" $(GPU_PYTHON) benchmarks/on_gpu.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,deepspeed,dicom]"
	touch $@
