# `make demo` and `make test` need Python 3.11 or newer and make; the rest is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
# two workers: most tests keep one core busy, those of two ranks both
PYTEST := -m pytest --numprocesses 2 --dist worksteal
INSTALLED := .venv/installed
INSTALLED_LOW := .venv-low/installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-low check bench

demo: $(INSTALLED)
	$(BIN)/ebbtide train recipes/tiny.yaml nproc=2
	$(BIN)/ebbtide bench recipes/tiny-long.yaml --strategies plain,gc+ce,streambp,seco --repeats 2 --steps 3

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# with the lowest versions that pyproject.toml allows, in .venv-low
test-low: $(INSTALLED_LOW)
	OMP_NUM_THREADS=1 .venv-low/bin/python $(PYTEST) -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/loop.py

# torch comes first and builds are not isolated: a build that wants torch must find this one, not fetch another
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Ebbtide needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv, which takes a few minutes"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools ninja torch
	$(PIP) --no-build-isolation --editable ".[dev,trl]"
	@touch $@

$(INSTALLED_LOW): pyproject.toml constraints-low.txt
	$(PYTHON) -m venv .venv-low
	.venv-low/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-low.txt setuptools ninja torch
	.venv-low/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-low.txt \
		--no-build-isolation --editable . pytest pytest-xdist
	@touch $@
