# Two commands: `make demo` and `make test`. Everything else here serves them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(shell find native -type f 2>/dev/null)

.PHONY: demo test test-all sanitize lint build clean

demo: $(STAMP)
	$(BIN)/pennyweight demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(STAMP) lint
	$(BIN)/python -m pytest -n auto

sanitize: $(STAMP)
	$(BIN)/python -m pytest tests/native/test_sanitizers.py

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

build: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,llm]'
	touch $(STAMP)

clean:
	rm -rf build $(VENV)
