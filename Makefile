# Needs make and Python 3.11 or newer (another one: make PYTHON=python3.12 ...). Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Test files run beside each other, each worker with servers of its own (3 GB); 0: one after the other.
WORKERS ?= 2
TYPED := $(wildcard tests examples benchmarks) deploy/sbom.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo secure test check fmt protos protos-go check-protos bench soak fuzz sim sbom clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## replicate between two real Milvus servers on this machine, with everything shown
	@$(BIN)/python -m examples.demo $(ARGS)

secure: $(INSTALLED) ## the same in short with mutual TLS on every connection, by deploy/examples/secure
	@$(BIN)/python -m examples.secure

test: $(INSTALLED) ## all tests, on real servers (ARGS='-k name' for some; Kafka needs Java and Maven)
	@$(BIN)/python -m pytest -m 'not soak' -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED) check-protos ## style, types, layers, protos
	@echo '== ruff'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo '== mypy'
	@$(BIN)/mypy
	@$(BIN)/mypy $(TYPED)
	@echo '== import-linter'
	@$(BIN)/lint-imports

fmt: $(INSTALLED) ## format the code and fix what can be fixed
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

protos: $(INSTALLED) ## generate the committed stubs below clients/ from protos/
	@PYTHON=$(BIN)/python protos/generate.sh

protos-go: $(INSTALLED) ## the same for the Go client below clients/go/ (needs Go)
	@PYTHON=$(BIN)/python clients/go/generate.sh

check-protos: $(INSTALLED) ## the committed stubs are what the protos generate, and the protos pass buf lint
	@echo '== protos'
	@PYTHON=$(BIN)/python protos/check.sh

bench: $(INSTALLED) ## measure throughput, lag and memory on real servers
	@$(BIN)/python -m benchmarks $(ARGS)

soak: $(INSTALLED) ## long crash runs, each verified row by row (ARGS go to pytest)
	@$(BIN)/python -m pytest -m soak --timeout=0 $(ARGS)

fuzz: $(INSTALLED) ## a million mutated inputs for each decoder (ARGS='--target "log entry" --seed 7')
	@$(BIN)/python -m tests.fuzz $(ARGS)

sim: $(INSTALLED) ## both services in made-up worlds of virtual time (ARGS='--seed 7 --trace' for the story of one)
	@$(BIN)/python -m tests.sim --seeds 10000 $(ARGS)

sbom: $(INSTALLED) ## what is installed with milvus-cdc, in which versions: build/sbom.cdx.json (CycloneDX)
	@$(BIN)/python deploy/sbom.py build/sbom.cdx.json

clean: ## remove .venv and caches; servers unpacked for tests stay in ~/.cache/milvus-cdc
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is not Python 3.11 or newer: name one that is, as in  make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu  apt-get install python3-venv" >&2; exit 1; }
	@echo 'Installing the project and its tools into $(VENV): about a minute, 1 GB on disk ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
