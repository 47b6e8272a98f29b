# `make` alone prints what each target is for.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The contract as last released; `make breaking` compares with it.
BASELINE := protos/released.binpb
IMAGE := build/contract.binpb
# Tests that break things and watch how long it takes: one at a time, and nothing beside them.
ALONE := tests/faults tests/gateway/test_envoy_workers.py tests/process/test_renewal.py
# Those that wait for leases to end most of the time, and demand nothing that a busy machine is too slow for: by two.
WAITING := tests/cluster

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); latchgate needs Python 3.11 or newer. Name it with: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("latchgate needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another with: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "This Python can not make environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (about half a minute, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --require-hashes -r requirements-dev.txt \
		|| { echo "The packages can not be installed, for the reason above: most often that no package index can be reached"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: setup
setup: $(STAMP) ## Make the environment: packages pinned by hash, and latchgate itself

.PHONY: run
run: $(STAMP) ## Start the service with its embedded database, and show a key's life
	@exec $(BIN)/latchgate run

# Tests start many processes: compiled files are kept for them, whatever the environment says.
.PHONY: test
test: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## Run the tests against a real PostgreSQL that they start themselves
	@$(BIN)/python -m pytest -q -m "not bench" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(ALONE) $(WAITING))
	@$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder $(WAITING)
	@$(BIN)/python -m pytest -q $(ALONE)

.PHONY: test-bench
test-bench: $(STAMP) ## Run the tests of the benchmarks as wholes, which `make test` leaves out: they take both cores
	@$(BIN)/python -m pytest -q -m bench tests/bench

.PHONY: faults
faults: $(STAMP) ## Break a cluster of real processes in every way, for 15 minutes; writes docs/reliability.md
	@$(BIN)/python tests/cluster/run.py $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Check style, import rules, the contract's style and the Dockerfile
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports
	@$(BIN)/buf format --diff --exit-code protos
	@$(BIN)/python protos/generate.py image $(IMAGE)
	@$(BIN)/buf lint $(IMAGE) --config protos/buf.yaml
	@$(BIN)/hadolint Dockerfile

.PHONY: format
format: $(STAMP) ## Rewrite code and protos in the project's style
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format
	@$(BIN)/buf format --write protos

.PHONY: types
types: $(STAMP) ## Check types, strictly, in service, tests, stubs and scripts
	@$(BIN)/mypy

.PHONY: generate
generate: $(STAMP) ## Make stubs, the API reference and the transcoder's descriptor set from the protos
	@$(BIN)/python protos/generate.py stubs

.PHONY: generated
generated: generate ## Fail if what is committed differs from what the protos give
	@git diff --exit-code --stat -- generated docs/api.md deploy/envoy/apikeys.binpb
	@test -z "$$(git ls-files --others --exclude-standard -- generated)" || { echo "generated/ has files that are not committed"; exit 1; }

.PHONY: breaking
breaking: $(STAMP) ## Fail if the contract breaks a client of the last release
	@$(BIN)/python protos/generate.py image $(IMAGE)
	@$(BIN)/buf breaking $(IMAGE) --against $(BASELINE) --config protos/buf.yaml --exclude-imports

.PHONY: baseline
baseline: $(STAMP) ## At a release: take the contract as the one to stay compatible with
	@$(BIN)/python protos/generate.py baseline $(BASELINE)

.PHONY: check
check: ## Everything that CI runs
	@bash .ci/run

.PHONY: bench
bench: $(STAMP) ## Measure Validate against a no-op of the same size; writes docs/performance.md
	@$(BIN)/python tests/bench/run.py

.PHONY: model
model: $(STAMP) ## Search all that the coherence protocol can do, and that each mistake is found
	@$(BIN)/python tests/model/run.py

.PHONY: simulate
simulate: $(STAMP) ## Run 5000 simulated schedules of workers, network and database
	@$(BIN)/python tests/simulation/run.py --seeds 5000

.PHONY: bench-effective
bench-effective: $(STAMP) ## Measure how long revocations take with 1, 4 and 20 workers; writes docs/effective.md
	@$(BIN)/python tests/bench/effective.py

.PHONY: bench-settings
bench-settings: $(STAMP) ## Measure what choices of how gRPC is run cost, side by side; writes docs/settings.md
	@$(BIN)/python tests/bench/settings.py

.PHONY: bench-workers
bench-workers: $(STAMP) ## Measure what a second worker adds; writes docs/workers.md
	@$(BIN)/python tests/bench/workers.py

.PHONY: bench-flood
bench-flood: $(STAMP) ## Measure what good keys notice of a flood of made-up tokens; writes docs/flood.md
	@$(BIN)/python tests/bench/flood.py

.PHONY: bench-gateway
bench-gateway: $(STAMP) ## Measure what it costs Envoy to ask about keys; writes docs/gateways/performance.md
	@$(BIN)/python tests/bench/gateway.py $(ARGS)

.PHONY: bench-limits
bench-limits: $(STAMP) ## Measure what shared rate limits take, and how well they are kept; writes docs/limits.md
	@$(BIN)/python tests/bench/limits.py

.PHONY: bench-memory
bench-memory: $(STAMP) ## Measure what a key takes in a worker's memory; writes docs/memory.md
	@$(BIN)/python tests/bench/memory.py

.PHONY: bench-same-server
bench-same-server: $(STAMP) ## Measure Validate against a no-op on the same server; writes docs/same-server.md
	@$(BIN)/python tests/bench/same_server.py

.PHONY: bench-usage
bench-usage: $(STAMP) ## Measure what it takes to count how keys are used, and to tell it; writes docs/usage-performance.md
	@$(BIN)/python tests/bench/usage.py

.PHONY: soak
soak: $(STAMP) ## Load two workers for an hour, and see whether anything grows; writes docs/soak.md
	@$(BIN)/python tests/bench/soak.py $(ARGS)

.PHONY: lock
lock: $(STAMP) ## Pin the newest allowed packages, with hashes, for every platform and Python
	@$(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" pyproject.toml --extra embedded --extra dev -o requirements-dev.txt
	@$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" pyproject.toml -c requirements-dev.txt -o requirements.txt

.PHONY: clean
clean: ## Remove what the other targets made; the embedded database in .latchgate stays
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
