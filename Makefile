# make test   lint, types, imports, tests (the default)
# make demo   the main job on the embedded checkpoint; the result lies in memscrub-demo/
# make help   every target
#
# PYTHON is the interpreter that .venv is made from: python3 where it is 3.10 to 3.13, else the first of
# python3.13 to python3.10 that is. Choose another with `make demo PYTHON=python3.12`.
# torch: constraints.txt pins the version, not the build. On Linux x86 a plain torch from PyPI pulls several
# gigabytes of CUDA packages; where the CPU is enough, run once before `make`:
#   export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.memscrub-installed
PYTEST_FLAGS ?= -q -n 2 --dist worksteal
FUZZ_INPUTS ?= 1000000

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: test demo lint types imports pytest fuzz format bench wheel clean help

test: lint types imports pytest  ## everything CI checks

demo: $(STAMP)  ## run the main job on the embedded checkpoint into memscrub-demo/
	$(BIN)/memscrub demo --out memscrub-demo

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .

types: $(STAMP)  ## strict mypy
	$(BIN)/mypy

imports: $(STAMP)  ## the layers of pyproject.toml
	$(BIN)/lint-imports

pytest: $(STAMP)  ## the tests alone, two at a time; PYTEST_FLAGS=-q for one
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_FLAGS)

fuzz: $(STAMP)  ## a million inputs for the parsers of untrusted files, watched by Atheris (12 minutes of a core)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --inputs $(FUZZ_INPUTS)

format: $(STAMP)  ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every method and baseline on the embedded checkpoint, into memscrub-bench/ (over an hour)
	$(BIN)/python benchmarks/bench_policy.py memscrub/embedded --out memscrub-bench --run 16
	$(BIN)/memscrub bench memscrub/embedded/checkpoint --policy memscrub-bench/policy.toml \
		--json memscrub-bench/bench.json --markdown memscrub-bench/bench.md --plot memscrub-bench/bench.svg

wheel: $(STAMP)  ## sdist and wheel into dist/
	$(BIN)/python -m build

clean:  ## remove build products and caches, keep .venv
	rm -rf build dist memscrub-demo memscrub-bench *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python -o -n "$(PYTHON)" || { echo "memscrub needs Python 3.10 to 3.13; none was found. \
	Install one, or name it: make PYTHON=/path/to/python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual \
	environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
