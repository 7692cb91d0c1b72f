# make train   trains the tiny model on the built-in corpus and prints what it wrote
# make test    the whole test suite
# Both set everything up in .venv first.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/tiny
# Two cores: tests run in two processes of one thread each, training in one process of two threads.
export OMP_NUM_THREADS ?= 2
# Threads that wait for each other spin a little, then sleep: on a busy machine, spinning takes the core the other needs.
export GOMP_SPINCOUNT ?= 10000

.PHONY: train test lint format mutants docs clean

train: .venv/ready
	$(BIN)/python train.py tiny --out $(RUN)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

mutants: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/ready
	$(BIN)/python docs/figure.py
	$(BIN)/python docs/gallery.py
	$(BIN)/python notebooks/build.py
	$(BIN)/python docs/tables.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fast,test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
