# Each target makes its own virtual environment in $(VENV), with the exact versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DEMO_ARGS ?=
UV ?= uv
# The versions that are pinned already stay; empty it to take the newest of everything.
CONSTRAINTS_ARGS ?= -c constraints.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo demo-short test lint types unit test-long test-versions package-check evidence-smoke gpu-check-rehearsal docs docs-serve constraints clean

help:
	@echo "make demo        three short pretrainings on the CPU: full precision, 4 bits, 4 bits with Stable-SPAM"
	@echo "make demo-short  the same in under a minute, to see that it runs"
	@echo "make test        lint, types and all tests"
	@echo "make test-long   the tests marked long: minutes to hours"
	@echo "make test-versions  the Trainer's tests under each supported transformers, in environments of their own"
	@echo "make package-check  build sdist and wheel, install the wheel elsewhere, and run the quick start there"
	@echo "make evidence-smoke  repeat a small part of the committed evidence and compare, in minutes"
	@echo "make gpu-check-rehearsal  benchmarks/gpu_check.sh at tiny sizes on the CPU, in Triton's interpreter"
	@echo "make docs        build the documentation into site/, a warning is an error; make docs-serve shows it"
	@echo "make constraints resolve constraints.txt anew, with uv"
	@echo "make clean       remove the virtual environment, caches and demo output"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed, got $$($(PYTHON) --version); say which with make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python setup.cfg constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[plot,report,cpu]'
	@touch $@

$(VENV)/.dev: $(BIN)/python setup.cfg constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: $(BIN)/python setup.cfg constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --output_dir demo $(DEMO_ARGS)

demo-short: $(VENV)/.demo
	$(BIN)/python examples/demo.py --output_dir demo --smoke $(DEMO_ARGS)

# Types have a core to themselves for half a minute, so the tests begin beside them.
test: lint
	@$(MAKE) --no-print-directory -j 2 types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# One thread per worker: two workers share two cores.
unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-long: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(PYTEST_ARGS)

test-versions: $(BIN)/python
	PYTHON=$(PYTHON) tests/versions.sh $(VENV)-versions

package-check: $(BIN)/python
	PYTHON=$(PYTHON) tests/package.sh $(VENV)-package

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

evidence-smoke: $(VENV)/.dev
	$(BIN)/python benchmarks/evidence_smoke.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long tests/benchmarks/test_gpu_check.py

gpu-check-rehearsal: $(VENV)/.dev
	rm -rf .cache/gpu_check
	PYTHON=$(BIN)/python benchmarks/gpu_check.sh .cache/gpu_check --rehearse

# What CUDA builds of torch bring along is left out: with a CPU build none of it is installed.
constraints:
	$(UV) pip compile --quiet --universal --python-version 3.10 --all-extras --no-header --no-annotate \
		$(CONSTRAINTS_ARGS) setup.cfg >constraints.new
	{ head -1 constraints.txt; grep -vE '^(cuda|nvidia)-|^setuptools==' constraints.new; } >constraints.merged
	mv constraints.merged constraints.txt && rm constraints.new

clean:
	rm -rf $(VENV) $(VENV)-versions $(VENV)-package .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info demo
