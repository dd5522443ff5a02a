# Every target sets itself up: the first call creates .venv, later calls cost nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
QUICKSTART_DIR ?= runs/quickstart

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test test-slow lint models clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[demo,test]"
	touch $(STAMP)

quickstart: setup
	$(RUN) -m recipes.run quickstart --check > /dev/null
	$(VENV)/bin/torchrun --standalone --nproc-per-node 4 -m recipes.run quickstart --run-dir $(QUICKSTART_DIR)

test: setup
	$(RUN) -m pytest -m "not slow and not gpu"

test-slow: setup
	$(RUN) -m pytest -m "slow and not gpu"

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) runs
