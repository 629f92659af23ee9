# Every target creates the virtual environment it needs and uses it again the next time.
#
#   make quickstart                     the whole pipeline on a toy model, with a report
#   make test PYTHON=python3.12         another interpreter gets its own folder, .venv-3.12

.DEFAULT_GOAL := help
SHELL := /bin/sh
.DELETE_ON_ERROR:

PYTHON ?= python3
# An interpreter named by the user gets its own environment, so that several can live side by side.
ifeq ($(origin PYTHON),file)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
endif
READY := $(VENV)/.ready
EVAL_READY := $(VENV)/.ready-eval
CLIENTS := $(VENV)-clients
LOWEST := .venv-lowest
BIN := $(VENV)/bin

# A clone of VLMEvalKit, for test-eval: it is on no package index.
VLMEVALKIT ?=
# How many test files run at the same time; tests/conftest.py limits each to one thread.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile
# Tests that are not marked `gpu` compare CPU with CPU, on up to eight ranks: they must not find the one GPU of a machine.
ON_CPU := CUDA_VISIBLE_DEVICES=
SEES_GPU = $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
SOURCES := megatron_ross kernels tools examples benchmarks tests setup.py $(wildcard pretrain_ross.py)

.PHONY: help install quickstart test test-smoke test-slow test-layouts test-faults test-eval test-clients test-gpu test-lowest benchmark check format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		while IFS='|' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

$(READY): setup.py tools/setup_venv.sh
	@tools/setup_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(EVAL_READY): $(READY)
	@EXTRAS=eval tools/setup_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(CLIENTS)/.ready: setup.py tools/setup_venv.sh tools/setup_clients.sh
	@tools/setup_clients.sh "$(PYTHON)" "$(CLIENTS)"
	@touch $@

$(LOWEST)/.ready: setup.py tools/setup_venv.sh tests/lowest-requirements.txt
	@CONSTRAINTS=tests/lowest-requirements.txt tools/setup_venv.sh "$(PYTHON)" "$(LOWEST)"
	@touch $@

install: $(READY) ## create the environment, install everything

quickstart: $(READY) ## data, conversion, two training stages, export, report: examples/quickstart
	@$(BIN)/python examples/quickstart/run.py

test: $(READY) ## the tests; those that need a GPU run where there is one
	@$(ON_CPU) $(BIN)/python $(PYTEST) -m "not slow and not layouts and not faults and not eval and not smoke and not clients"
	@if $(SEES_GPU); then $(MAKE) --no-print-directory test-gpu; fi

test-smoke: $(READY) ## import, two-rank training, save, resume, export; minutes. With PYTHON=python3.12: another megatron-core
	@$(ON_CPU) $(BIN)/python -m pytest -m smoke tests/smoke

test-slow: $(READY) ## the tests that take minutes each
	@$(ON_CPU) $(BIN)/python $(PYTEST) -m slow

test-layouts: $(READY) ## every parallel layout against one process, the full product
	@$(ON_CPU) $(BIN)/python $(PYTEST) -m layouts

test-faults: $(READY) ## all of docs/reliability.md: kills, lost machines, full disks, hostile input; one test at a time
	@$(ON_CPU) $(BIN)/python -m pytest tests/distributed/test_reliability.py tests/fuzz
	@$(ON_CPU) $(BIN)/python -m pytest -m faults

test-eval: $(EVAL_READY) ## exported checkpoints through evaluation frameworks, without network
	@$(BIN)/python -c 'import lmms_eval' || { \
		echo "error: lmms-eval cannot be imported in $(VENV) (see above): rm $(EVAL_READY), then make test-eval" >&2; exit 1; }
	@$(ON_CPU) HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 VLMEVALKIT="$(VLMEVALKIT)" $(BIN)/python -m pytest tests/evaluation -m eval

test-clients: $(CLIENTS)/.ready ## exports in transformers 4 and 5, `transformers serve` and vLLM, in their environment
	@$(ON_CPU) $(CLIENTS)/bin/python -m pytest tests/clients -m clients

test-gpu: $(READY) ## only the tests that need a CUDA GPU
	@$(SEES_GPU) || { echo "error: make test-gpu needs a CUDA GPU, and torch sees none" >&2; exit 1; }
	@$(BIN)/python -m pytest -m gpu

test-lowest: $(LOWEST)/.ready ## the tests with the oldest supported versions of the dependencies
	@$(ON_CPU) $(LOWEST)/bin/python $(PYTEST) -m "not slow and not layouts and not faults and not eval and not smoke and not clients"

benchmark: $(READY) ## speed of steps, kernels and data on this machine, into benchmarks/results
	@$(BIN)/python -W ignore benchmarks/bench_step.py --stages '[1]' --json benchmarks/results/step_1_cpu.json
	@$(BIN)/python -W ignore benchmarks/bench_step.py --stages '[2]' --json benchmarks/results/step_2_cpu.json
	@$(BIN)/python -W ignore benchmarks/bench_kernels.py --dry-run --dtypes '[fp32]' --json benchmarks/results/kernels_dry_run.json
	@$(BIN)/python -W ignore benchmarks/bench_data.py --json benchmarks/results/data_cpu.json
	@$(BIN)/python benchmarks/results_table.py
	@$(BIN)/python benchmarks/plot_step_time.py

check: $(READY) ## lint, formatting, types
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy

format: $(READY) ## rewrite the sources in the house format
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

clean: ## remove environments, caches and build products; runs/ stays
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megatron_ross kernels tools examples benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
