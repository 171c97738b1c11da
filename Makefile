PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.requirements-installed

.DEFAULT_GOAL := help
.PHONY: help venv backbone demo test test-slow table check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make the virtual environment, with the pinned requirements

$(INSTALLED): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.txt
	touch $@

backbone: $(INSTALLED) ## fetch the default backbone and print where it is
	$(BIN)/python -m clsgen.backbones

demo: $(INSTALLED) ## train the default task on the default backbone
	$(BIN)/python train_sft_cls.py

check: $(INSTALLED) ## lint, and check the formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: check ## check, then run the quick tests
	$(BIN)/python -m pytest

test-slow: $(INSTALLED) ## run the tests that need minutes
	$(BIN)/python -m pytest -m slow

table: $(INSTALLED) ## rebuild results/table.csv and table.md from the result files
	$(BIN)/python -m benchmarks.table

format: $(INSTALLED) ## fix what the linter can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches (outputs and the virtual environment stay)
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
