# Two commands: `make fit` trains the bundled tiny model, `make test` checks everything. Both install what they need.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: fit test lint clean

fit: .venv/installed
	$(BIN)/marble-lightning fit -c tiny

test: lint
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv
