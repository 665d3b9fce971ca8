# Two commands: `make fit` trains the bundled tiny model, `make test` checks everything. Both install what they need.
# `make docs` builds the documentation into docs/_build/html. `make notebooks` executes the notebooks, into runs/notebooks.
# `make quick` runs the tests of one package, for example `make quick PACKAGE=marble_lightning/nft`.

PYTHON ?= python3
BIN := .venv/bin
PACKAGE ?= balancers

# packages are compiled as they are first imported: compiling all of them at installation takes longer
export PYTHONDONTWRITEBYTECODE :=

.PHONY: fit test quick lint docs notebooks clean

fit: .venv/installed
	$(BIN)/marble-lightning fit -c tiny

test: .venv/installed
	$(MAKE) --jobs=2 lint docs
	$(BIN)/pytest -m 'not slow and not gpu and not weights'

quick: .venv/installed
	$(BIN)/pytest --exitfirst tests/$(PACKAGE)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/sphinx-build -W --keep-going --quiet docs docs/_build/html
	@echo 'docs/_build/html/index.html'

notebooks: .venv/installed
	$(BIN)/python -m benchmarks.notebooks

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'pip>=25' # an older one, such as Python 3.11 brings, takes three times as long to choose versions
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv docs/_build docs/notebooks
