VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PYTHONDONTWRITEBYTECODE := 1

.PHONY: demo test test-slow proof upstream check

demo: $(STAMP)
	$(BIN)/medft demo

test: $(STAMP)
	$(BIN)/pytest -m "not gpu and not slow and not proof and not upstream"

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu and not proof and not upstream"

proof: $(STAMP)
	$(BIN)/pytest -m "proof and not gpu" --proof-table benchmarks/results/proof.json

upstream: $(STAMP)
	$(BIN)/pytest -m "upstream and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,deepspeed,dicom]"
	touch $@
