# make train   install into .venv and train on the digits
# make test    everything: lint, types and all tests
# make check   before each commit: lint, types, imports and unit tests, in less than a minute
# make docs    the documentation as a site, in site/
# make dist    build the wheel, install it into an empty environment, and use it there
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: train test check lint dist docs clean

train: $(VENV)/.run
	$(BIN)/accelerate launch train.py

test: lint
	$(BIN)/python -m pytest -n 2

check: lint
	$(BIN)/python -m pytest -n 2 -q tests/unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist:
	rm -rf dist build
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/pip install --quiet --upgrade pip
	dist/venv/bin/pip wheel --quiet --no-deps . --wheel-dir dist
	dist/venv/bin/pip install --quiet dist/*.whl
	cd dist && venv/bin/diffusion train --config digits --train.steps 20 --sample.n 10 --sample.steps 5
	cd dist && venv/bin/diffusion sample --ckpt runs/digits --n 10 --steps 5
	cd dist && venv/bin/diffusion evaluate --ckpt runs/digits --n 10 --steps 5
	cd dist && venv/bin/diffusion convert openai runs/digits --out digits.pt
	rm -rf build dist/venv dist/runs dist/digits.pt

docs: $(BIN)/python
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) dist build site
