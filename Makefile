# Two commands are enough: `make quickstart` and `make test`. Both make .venv and install on the first call.
#
#   PYTHON=python3.12      the interpreter .venv is made from (3.11 or 3.12)
#   PIP_FLAGS=...          passed to pip, e.g. an index with CPU-only torch wheels (see docker/README.md)
#   JOBS=2                 how many workers run tests; each has a Ray of its own (about 4 GB)
#   ARGS=...               passed to the command, e.g. make quickstart ARGS="--seed 1"

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)
PIP_FLAGS ?=
JOBS ?= 2
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --no-loadscope-reorder
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test check chaos chaos-cluster lint bench clean

help:
	@echo "make quickstart   install, then fine-tune and align a small GPT-2 (about 4 minutes on 2 cores)"
	@echo "make test         install, then ruff, mypy, import contracts and every test (about 20 minutes on 2 cores)"
	@echo "make check        the quick part of it (about 2 minutes)"
	@echo "make chaos        runs whose processes are killed at random moments (about 25 minutes)"
	@echo "make chaos-cluster  one run on nodes that die, drain and join, and whose processes die and stop"
	@echo "make bench        speed against transformers' generate; what working ahead gains (about 8 minutes)"
	@echo "                  which algorithm learns how fast, and what old samples cost: tests/benchmarks/{learning,staleness}.py"
	@echo "make install      only make .venv"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "raylign needs Python 3.11 or 3.12: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "== making .venv with $(PYTHON) and installing raylign (1 to 5 minutes, about 2 GB)"
	$(PYTHON) -m venv .venv
	@# torch first and pinned: asked for by range, pip would take the newest build, whatever it is
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

quickstart: $(STAMP)
	@echo "== raylign quickstart $(ARGS)"
	$(BIN)/python -m pipeline quickstart $(ARGS)

lint: $(STAMP)
	@echo "== ruff, mypy and the order of the rooms"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

test: lint
	@echo "== every test"
	$(PYTEST) $(ARGS)

check: lint
	@echo "== quick tests"
	$(PYTEST) -m "not slow" --hypothesis-profile quick $(ARGS)

chaos: $(STAMP)
	@echo "== processes are killed and stopped; runs must end as if nothing had happened"
	$(BIN)/python -m pytest -s tests/chaos/chaos_processes.py tests/chaos/chaos_driver.py $(ARGS)

chaos-cluster: $(STAMP)
	@echo "== nodes and processes of a cluster die, stop, drain and join; the run must end as if nothing had happened"
	$(BIN)/python -m pytest -s tests/chaos/chaos_cluster.py $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/generation.py $(ARGS)
	$(BIN)/python tests/benchmarks/overlap.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
