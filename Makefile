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

DEMO_EXTRAS := models,demo
ALL_EXTRAS := models,peft,demo,bench,dev
DECLARED := pyproject.toml constraints.txt
SAY_VERSION := import sys; print(sys.version_info[:2])
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help demo test lint types pytest compile-gate run-compiled gpu format install clean check-python

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
pytest: $(VENV)/.installed-all ## the tests alone (ARGS='-k name')
	@if $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		set -x; $(RUN) -m pytest $(ARGS); \
	else \
		set -x; OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS); \
	fi

compile-gate: $(VENV)/.installed-all ## compile every kernel for every card; fail on a spill or too much shared memory
	env -u TRITON_INTERPRET $(RUN) -m lora_kernels.cli compile-report

run-compiled: $(VENV)/.installed-all ## run the compiled kernels on the CPU, instruction by instruction
	for arch in sm_80 sm_86 sm_89 sm_90 sm_120; do \
		OMP_NUM_THREADS=1 TRITON_INTERPRET=0 COMPILED_FOR=$$arch $(RUN) -m pytest -q tests/compiled/compiled_code.py tests/compiled/compiled_tiles.py || exit 1; \
	done

# Installs nothing: PYTHON has torch, Triton, transformers, peft, pytest and pytest-xdist. A step that
# fails or runs out of its share of MINUTES does not stop the next; rows are written as they are
# measured, and a second call goes on (tuning begins anew). Interrupted, not killed, pytest still says
# what failed. Tests mostly wait for the compiler: processes side by side.
EACH_KERNEL := tests/algebra/test_masks.py tests/autograd/test_functional.py -k "every_gradient or project_draws or applied"
MINUTES ?= 50
GPU_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 16 ? (n + 1) / 2 : 8)))
seconds = $$(($(MINUTES) * 60 * $(1) / 100))
share = timeout -s INT -k 30 $(call seconds,$(1))
gpu: export PYTHONPATH := .
gpu: export PYTHONUNBUFFERED := 1
gpu: ## on a GPU, with what PYTHON has: test, check memory, measure, tune, plot (MINUTES=25: in half the time)
	-$(call share,28) $(PYTHON) -m pytest -q -m "not slow" --maxfail 20 -n $(GPU_WORKERS) --dist worksteal
	-@if command -v compute-sanitizer >/dev/null; then set -x; PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		$(call share,12) compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
		$(PYTHON) -m pytest -q $(EACH_KERNEL); else echo "no compute-sanitizer here"; fi
	-$(call share,12) $(PYTHON) -m bench kernels --quick --seconds $(call seconds,10)
	-$(call share,17) $(PYTHON) -m lora_kernels.cli tune --model roberta-base
	-$(call share,17) $(PYTHON) -m bench end_to_end --quick
	-$(call share,12) $(PYTHON) -m bench kernels --quick --seconds $(call seconds,10)
	-$(call share,2) $(PYTHON) -m bench plots

format: $(VENV)/.installed-all ## rewrite the sources in the house format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

install: $(VENV)/.installed-all ## make the environment and install everything, run nothing

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
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
