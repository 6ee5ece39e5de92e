# On a fresh clone every target sets itself up: python3 is all it needs.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := lora_kit tests benchmarks tools examples
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,dev,docs,eval,export,plot,preferences,serve,sign,sweep]'
	@touch $@

.PHONY: install
install: $(READY) ## make .venv with everything in it (the other targets do this themselves)

.PHONY: demo
demo: $(READY) ## three tasks on the built-in base: train, compare, swap, merge
	@$(OFFLINE) $(BIN)/lora-kit demo

.PHONY: test
test: $(READY) ## the tests, offline, a process for each core, but for those marked slow
	@$(OFFLINE) $(BIN)/pytest -m 'not slow' --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: test-long
test-long: $(READY) ## all tests: the slow ones, long storms and more kills too
	@$(OFFLINE) LORA_KIT_LONG=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: format-check
format-check: $(READY)
	@$(BIN)/ruff format --check --quiet --output-format concise $(SOURCES) || { echo "not formatted: run 'make fix'" >&2; exit 1; }

.PHONY: lint
lint: $(READY)
	@$(BIN)/ruff check --quiet --output-format concise $(SOURCES)

.PHONY: types
types: $(READY)
	@$(BIN)/mypy

.PHONY: docs
docs: $(READY) ## the documentation as a site, in site/; every warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: check
check: format-check lint types docs test ## formatting, lint, types, the site and tests: what .ci/run runs

.PHONY: fix
fix: $(READY) ## format, and mend what ruff can mend
	@$(BIN)/ruff format --quiet $(SOURCES)
	@$(BIN)/ruff check --fix --quiet $(SOURCES)

.PHONY: release
release: $(READY) ## wheel and sdist built, installed in a clean environment, every verb tried; uploads nothing; ten minutes
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build hatchling
	@$(BIN)/python -m tools.release

.PHONY: bench
bench: $(READY) ## what things cost beside PEFT, in short; five minutes on two idle cores, writes nothing
	@$(OFFLINE) $(BIN)/python -m benchmarks --short

.PHONY: bench-full
bench-full: $(READY) ## all of it, written to benchmarks/results and the pages; about an hour and a half
	@$(OFFLINE) $(BIN)/python -m benchmarks --write

.PHONY: scan-models
scan-models: $(READY) ## an adapter on a tiny model of every class of transformers; an hour, writes docs/models-scan.md
	@$(OFFLINE) $(BIN)/python -m tools.scan_models

.PHONY: faults
faults: $(READY) ## every fault of the table, PEFT beside it; five minutes, writes docs/reliability.md
	@$(OFFLINE) $(BIN)/python -m tests.faults --write

.PHONY: soak
soak: $(READY) ## an hour of what a bank can do, at random, against a slow plain model; MINUTES=60
	@$(OFFLINE) $(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),60)

.PHONY: fuzz
fuzz: $(READY) ## bytes without end for everything that reads files of others; 20 minutes, guided where atheris is installed
	@$(OFFLINE) $(BIN)/python -m tools.fuzz

.PHONY: test-programs
test-programs: $(READY) ## the programs that read our files, installed from PyPI and npm into .programs and run; an hour the first time
	@$(BIN)/python -m tests.programs --write

.PHONY: serve-check
serve-check: $(READY) ## what the server promises: exact answers, storms, faults, load, latency; writes benchmarks/results/serve.json; half an hour
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'httpx<1' 'openai<3'
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.serving_check --write

.PHONY: bench-quality
bench-quality: $(READY) ## E2E NLG on kit-base; E2E_DATA=folder with train, valid and test.jsonl; about 40 minutes
	@test -n "$(E2E_DATA)" || { echo "E2E_DATA=FOLDER is needed: train.jsonl, valid.jsonl, test.jsonl" >&2; exit 2; }
	@$(OFFLINE) $(BIN)/python -m benchmarks.quality --data $(E2E_DATA)
