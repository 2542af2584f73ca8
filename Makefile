# Two commands: `make demo` and `make test`. Everything else here serves them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(shell find native -type f 2>/dev/null)

.PHONY: demo test test-all sanitize lint build browser clean

demo: $(STAMP)
	$(BIN)/pennyweight demo

test: $(STAMP) lint browser
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(STAMP) lint browser
	$(BIN)/python -m pytest -n auto

sanitize: $(STAMP)
	$(BIN)/python -m pytest tests/native/test_sanitizers.py

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

build: $(STAMP)

# Tests of the report look at it in Chromium, from Debian; without one, and without the right to install it, they are skipped.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { [ "$$(id -u)" = 0 ] && apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1; } \
	  || echo "no Chromium: the report is not tested in a browser"

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,llm]'
	touch $(STAMP)

clean:
	rm -rf build $(VENV)
