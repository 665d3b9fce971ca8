# Two commands: `make fit` trains the bundled tiny model, `make test` checks everything. Both install what they need.

PYTHON ?= python3
BIN := .venv/bin
TINY := marble_lightning/tinyworld/weights/sd3/model_index.json

.PHONY: fit test lint clean

fit: .venv/installed $(TINY)
	$(BIN)/marble-lightning fit -c configs/tiny.yaml

test: lint
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# The tiny world's models, where they are not there yet: which takes long, and goes on where it was stopped.
$(TINY): | .venv/installed
	$(BIN)/python -m marble_lightning.tinyworld.train

clean:
	rm -rf .venv
