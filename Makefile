VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export PYTHONDONTWRITEBYTECODE := 1

.PHONY: demo test test-slow check

demo: $(STAMP)
	$(BIN)/medft demo

test: $(STAMP)
	$(BIN)/pytest -m "not gpu and not slow"

test-slow: $(STAMP)
	$(BIN)/pytest -m "slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,deepspeed,dicom]"
	touch $@
