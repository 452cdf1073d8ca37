# `make demo` and `make test` do all of it on a fresh machine; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# pytest workers where there is no GPU; on a GPU the tests share it in one process.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# Half of what nproc counts, since that is often two a core.
THREADS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? 1 : n / 2)))
ARGS ?=
# What `make coverage` runs; CI takes a part.
COVERED ?= tests
# What `make versions` looks at; empty: all that pyproject.toml names.
VERSIONS ?=

DEMO_EXTRAS := models,demo
ALL_EXTRAS := models,peft,quantised,demo,bench,dev
DECLARED := pyproject.toml constraints.txt
SAY_VERSION := import sys; print(sys.version_info[:2])
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help demo test lint types pytest coverage nightly compile-gate run-compiled versions releases benchmark \
	gpu format install clean check-python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo "variables: PYTHON=python3.12 (3.10 to 3.13), VENV=.venv, WORKERS=2, ARGS='more arguments'"

# The model is small: on a CPU more threads than cores would only wait for one another.
demo: $(VENV)/.installed-demo ## make the environment, install, fine-tune the embedded default into runs/demo
	OMP_NUM_THREADS=$(THREADS) $(RUN) -m models.train --epochs 2 --learning-rate 2e-3 --output-dir runs/demo $(ARGS)

test: lint types pytest ## make the environment, install, check style, types and behaviour

lint: $(VENV)/.installed-all ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.installed-all ## mypy
	$(RUN) -m mypy

# Without a GPU the kernels run on CPU tensors (tests/conftest.py), with one thread a worker.
define run_pytest
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		set -x; $(RUN) -m pytest $(1) $(ARGS); \
	else \
		set -x; OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(1) $(ARGS); \
	fi
endef

pytest: $(VENV)/.installed-all ## the tests alone (ARGS='-k name')
	$(call run_pytest,)

# Before Python 3.12 counting lines more than doubles the time of the interpreter's kernels.
coverage: $(VENV)/.installed-all ## the tests again, with the share of lines that they run (COVERED=tests/layers)
	$(call run_pytest,--cov --cov-report=term:skip-covered $(COVERED))

# The tests marked nightly compile every kernel for every card and dtype, as compile-gate does.
nightly: $(VENV)/.installed-all ## what is too long for make test: tests marked nightly, all compiled kernels
	$(call run_pytest,-m nightly)
	$(MAKE) run-compiled releases

compile-gate: $(VENV)/.installed-all ## compile every kernel for every card; fail on a spill or too much shared memory
	env -u TRITON_INTERPRET $(RUN) -m lora_kernels.cli compile-report

run-compiled: $(VENV)/.installed-all ## run the compiled kernels on the CPU, instruction by instruction
	for arch in sm_80 sm_86 sm_89 sm_90 sm_120; do \
		OMP_NUM_THREADS=1 TRITON_INTERPRET=0 COMPILED_FOR=$$arch $(RUN) -m pytest -q tests/compiled/compiled_code.py tests/compiled/compiled_tiles.py || exit 1; \
	done

versions: $(VENV)/.installed-all ## whether each supported Python parses, resolves, imports (VERSIONS='3.10 3.13')
	$(RUN) .ci/versions.py $(VERSIONS) $(ARGS)

releases: $(VENV)/.installed-all ## train a step on the oldest and the newest torch and Triton that pyproject.toml admits
	$(RUN) .ci/releases.py

benchmark: $(VENV)/.installed-all ## the kernel cases through pytest-benchmark; on a CPU only toys
	$(RUN) -m pytest bench --benchmark-only $(ARGS)

# Installs nothing; bench/on_gpu.py says what PYTHON must have, and what each step does.
MINUTES ?= 50
GPU_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 16 ? (n + 1) / 2 : 8)))
gpu: ## on a GPU, with what PYTHON has: test, check memory, measure, tune, plot (MINUTES=25: in half the time)
	PYTHONPATH=. $(PYTHON) -m bench.on_gpu --minutes $(MINUTES) --workers $(GPU_WORKERS)

format: $(VENV)/.installed-all ## rewrite the sources in the house format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

install: $(VENV)/.installed-all ## make the environment and install everything, run nothing

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Says in one line what is wrong with the interpreter, before anything is downloaded.
check-python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' here: install Python 3.10 to 3.13," \
		"or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
		"error: $(PYTHON) is Python %d.%d; 3.10 to 3.13 are supported: make PYTHON=python3.12 ..." % v)'
	@if test -x $(RUN); then \
		test "$$($(RUN) -c '$(SAY_VERSION)')" = "$$($(PYTHON) -c '$(SAY_VERSION)')" || \
			{ echo "error: $(VENV) was made by another Python than $(PYTHON):" \
				"run 'make clean', or add VENV=another-folder" >&2; exit 1; }; \
	else \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
			{ echo "error: $(PYTHON) cannot make environments (no venv or no ensurepip):" \
				"on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; \
	fi

$(RUN): | check-python
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; the larger set also serves the demo.
$(VENV)/.installed-demo: $(DECLARED) | $(RUN)
	@echo "Installing into $(VENV): some minutes the first time, nothing the next."
	$(INSTALL) -e '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.installed-all: $(DECLARED) | $(RUN)
	@echo "Installing into $(VENV): some minutes the first time, nothing the next."
	$(INSTALL) -e '.[$(ALL_EXTRAS)]'
	@touch $@ $(VENV)/.installed-demo
