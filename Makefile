# `make demo` and `make test` need Python 3.11 or newer and make; the rest is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
# two workers: most tests keep one core busy, those of two ranks both
PYTEST := -m pytest --numprocesses 2 --dist worksteal
INSTALLED := .venv/installed
INSTALLED_LOW := .venv-low/installed
INSTALLED_AUDIT := .venv-audit/installed
INSTALLED_DOCS := .venv-docs/installed
LOCKS := docker/requirements-cpu.lock docker/requirements-cuda.lock
LOCK := .venv-audit/bin/uv pip compile pyproject.toml --quiet --constraints constraints.txt --generate-hashes \
	--no-annotate --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28
# where the CPU build of torch is found; or: make lock TORCH_CPU="--find-links FOLDER"
TORCH_CPU := --torch-backend cpu
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-low check audit sbom lock bench docs

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
	@$(MAKE) --no-print-directory audit

# known vulnerabilities of what the images install; without network one line, and no failure
audit:
	@if $(MAKE) --silent $(INSTALLED_AUDIT) 2>/dev/null; then .venv-audit/bin/python docker/audit.py $(LOCKS); \
	else echo "not audited: the tools of the audit cannot be installed"; fi

# what the images consist of, as CycloneDX
sbom: $(INSTALLED_AUDIT)
	@mkdir -p out
	@for kind in cpu cuda; do .venv-audit/bin/cyclonedx-py requirements --output-reproducible \
		--output-file out/sbom-$$kind.json docker/requirements-$$kind.lock && echo "written: out/sbom-$$kind.json"; done

# for Linux on x86_64 and Python 3.11
lock: $(INSTALLED_AUDIT)
	$(LOCK) $(TORCH_CPU) --output-file docker/requirements-cpu.lock
	$(LOCK) --output-file docker/requirements-cuda.lock

bench: $(INSTALLED)
	$(BIN)/python benchmarks/loop.py

# out/site, which asks no other host for anything; a warning fails
docs: $(INSTALLED_DOCS)
	@rm -rf out/site
	.venv-docs/bin/sphinx-build --quiet --fail-on-warning --keep-going --conf-dir docs --doctree-dir out/doctrees . out/site
	@.venv-docs/bin/python docs/asks.py out/site
	@echo "written: out/site/index.html"

# torch comes first and builds are not isolated: a build that wants torch must find this one, not fetch another
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Ebbtide needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv, which takes a few minutes"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools ninja torch
	$(PIP) --no-build-isolation --editable ".[dev,trl,torchft]"
	@touch $@

$(INSTALLED_AUDIT): constraints.txt
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install -qq --disable-pip-version-check --retries 1 --constraint constraints.txt \
		pip-audit cyclonedx-bom uv
	@touch $@

$(INSTALLED_DOCS): constraints.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt sphinx furo myst-parser
	@touch $@

$(INSTALLED_LOW): pyproject.toml constraints-low.txt
	$(PYTHON) -m venv .venv-low
	.venv-low/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-low.txt setuptools ninja torch
	.venv-low/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints-low.txt \
		--no-build-isolation --editable . pytest pytest-xdist markdown-it-py
	@touch $@
