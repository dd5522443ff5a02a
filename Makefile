# Every target sets itself up: the first call creates .venv, later calls cost nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
QUICKSTART_DIR ?= runs/quickstart

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test test-slow lint models clean

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[demo]"
	touch $(STAMP)

# mistral-common brings released vocabularies to test with. It asks for numpy below 2.4 on Python 3.11, which the tested set is beyond and what is used of it
# does not mind: hence without its dependencies. Those it does need are in the extra `test`.
$(TEST_STAMP): $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[demo,test]"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt --no-deps mistral-common
	touch $(TEST_STAMP)

quickstart: setup
	$(RUN) -m recipes.run quickstart --nproc-per-node 4 --run-dir $(QUICKSTART_DIR) $(QUICKSTART_OPTIONS)
	$(RUN) tools/show_answers.py $(QUICKSTART_DIR)

# Remake the models that the CPU recipes start from: recipes/assets/tiny_*.
models: setup
	$(RUN) tools/make_tiny_models.py --out runs/tiny
	for name in tiny_teacher tiny_student tiny_deep_student tiny_reader tiny_merged_teacher; do \
	  $(RUN) -m recipes.run $$name --nproc-per-node 2 --run-dir runs/$$name && \
	  rm -rf recipes/assets/$$name && cp -r runs/$$name/hf recipes/assets/$$name || exit; \
	done

test: $(TEST_STAMP)
	$(RUN) -m pytest -m "not slow and not gpu"

test-slow: $(TEST_STAMP)
	$(RUN) -m pytest -m "slow and not gpu"

lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) runs
