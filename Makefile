# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS ?= arliss adapters packing deberta best_of_n dmoerm_inner train lora_train mixture_train decoder_pairs moe
BENCH_OPTIONS ?=

# One thread for each test process: small tensors gain nothing from more, and two processes would fight for the cores.
test: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test soak browser lint format bench clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
		printf '  make %-8s %s\n' "$$name" "$$what"; done

demo: $(INSTALLED) ## Train and compare small reward models on built-in data, offline
	@$(BIN)/moreward demo

test: $(INSTALLED) ## Run the tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

soak: $(INSTALLED) ## Run the long tests of the server and print their figures (about an hour)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[soak]"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/soak -m soak -s

browser: ## Install Chromium for the tests of the page, which are skipped without it (Debian, as root)
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }

lint: $(INSTALLED) ## Check style, formatting, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(INSTALLED) ## Format the code and fix what can be fixed by machine
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: $(INSTALLED) ## Run the benchmarks against the peers and write the page of results (hours)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[bench]"
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(BENCH_OPTIONS); done
	@$(BIN)/python -m benchmarks.report

clean: ## Remove .venv, caches and build products; runs/ stays
	@rm -rf $(VENV) build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moreward needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	@echo "Installing into $(VENV); the first time takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
