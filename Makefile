PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.requirements-installed
SPACE_INSTALLED := $(VENV)/.space-installed
RAY_INSTALLED := $(VENV)/.ray-installed
BENCH_INSTALLED := $(VENV)/.bench-installed
SLOW_INSTALLED := $(VENV)/.slow-test-installed
BROWSER_INSTALLED := tests/browser/node_modules/.installed
OLAH_VENV := .venv-olah
MODEL ?= outputs/trial_claims/model

.DEFAULT_GOAL := help
.PHONY: help venv backbone demo test test-slow test-quantized table bench bench-table ray space test-space \
	test-clients check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test-slow: $(SLOW_INSTALLED) ## run the tests that need minutes
	$(BIN)/python -m pytest -m slow

test-quantized: $(INSTALLED) ## install bitsandbytes and test training on 4-bit weights
	$(BIN)/python -m pip install bitsandbytes==0.50.2
	$(BIN)/python -m pytest -m quantized

table: $(INSTALLED) ## rebuild results/table.csv and table.md from the result files
	$(BIN)/python -m benchmarks.table

bench: $(BENCH_INSTALLED) ## measure all of benchmarks/ again on a quiet machine (CLINIFACT=folder), and print the ratios
	@test -n "$(CLINIFACT)" || { echo "Name a CliniFact checkout: make bench CLINIFACT=folder"; exit 1; }
	@test -f $(MODEL)/config.json || { echo "There is no checkpoint in $(MODEL): run 'make demo' first, or name one with MODEL=folder."; exit 1; }
	$(BIN)/python -m benchmarks.inference --model $(MODEL) --data_dir $(CLINIFACT)
	$(BIN)/python -m benchmarks.serving --model $(MODEL)
	$(BIN)/python -m benchmarks.training --data_dir $(CLINIFACT)
	$(BIN)/python -m benchmarks.long_documents
	$(BIN)/python -m benchmarks.scoring_ray --model $(MODEL)
	$(BIN)/python -m benchmarks.report

bench-table: $(INSTALLED) ## print the ratios of benchmarks/results
	$(BIN)/python -m benchmarks.report

$(RAY_INSTALLED): requirements-ray.txt $(INSTALLED)
	$(BIN)/python -m pip install --requirement requirements-ray.txt
	touch $@

$(BENCH_INSTALLED): benchmarks/requirements.txt $(RAY_INSTALLED)
	$(BIN)/python -m pip install --requirement benchmarks/requirements.txt
	touch $@

ray: $(RAY_INSTALLED) ## install what score_ray.py needs

$(SLOW_INSTALLED): tests/requirements-slow.txt $(RAY_INSTALLED)
	$(BIN)/python -m pip install --requirement tests/requirements-slow.txt
	touch $@

$(SPACE_INSTALLED): space/requirements.txt $(INSTALLED)
	$(BIN)/python -m pip install --requirement space/requirements.txt
	touch $@

$(BROWSER_INSTALLED): tests/browser/requirements.txt tests/browser/package.json $(SPACE_INSTALLED)
	$(BIN)/python -m pip install --requirement tests/browser/requirements.txt
	npm install --prefix tests/browser --no-package-lock --no-audit --no-fund
	touch $@

space: ## show the checkpoint of `make demo` in a browser
	@test -f $(MODEL)/config.json || { echo "There is no checkpoint in $(MODEL): run 'make demo' first, or name one with MODEL=folder."; exit 1; }
	@$(MAKE) --no-print-directory $(SPACE_INSTALLED)
	CLSGEN_MODEL=$(MODEL) $(BIN)/python space/app.py

test-space: ## test the Space's page in headless Chromium
	@command -v chromium && command -v chromedriver && command -v npm || { echo "Chromium, ChromeDriver or npm is missing: apt-get install chromium chromium-driver npm"; exit 1; }
	@$(MAKE) --no-print-directory $(BROWSER_INSTALLED)
	$(BIN)/python -m pytest -m browser

$(OLAH_VENV)/.installed: tests/other_clients/requirements.txt tests/other_clients/package.json $(INSTALLED)
	$(BIN)/python -m venv $(OLAH_VENV)
	$(OLAH_VENV)/bin/python -m pip install --requirement tests/other_clients/requirements.txt
	npm install --prefix tests/other_clients --no-package-lock --no-audit --no-fund
	touch $@

test-clients: ## test what is published with other software that speaks the Hub's protocol
	@command -v npm || { echo "npm is missing: apt-get install npm"; exit 1; }
	@$(MAKE) --no-print-directory $(OLAH_VENV)/.installed
	$(BIN)/python -m pytest -m clients

format: $(INSTALLED) ## fix what the linter can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches (outputs and the virtual environment stay)
	rm -rf .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
