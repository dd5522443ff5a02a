# Every target sets itself up: the first call creates .venv, later calls cost nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
LAUNCH_VENV := .venv-launch
LAUNCH_STAMP := $(LAUNCH_VENV)/.installed
QUICKSTART_DIR ?= runs/quickstart
# Two files of tests at a time: much of a test is waiting.
WORKERS ?= --numprocesses 2 --dist loadfile

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test test-slow gpu-check lint models clean

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[demo]"
	touch $(STAMP)

# mistral-common brings released vocabularies to test with. It asks for numpy below 2.4 on Python 3.11, which the tested set is beyond and what is used of it
# does not mind: hence without its dependencies. Those it does need are in the extra `test`.
$(TEST_STAMP): $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[demo,test,tracking]"
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt --no-deps mistral-common
	touch $(TEST_STAMP)

# nemo-run and what it needs, without torch: enough to launch, and more than agrees with the set above. The file is whole: no dependency is looked for.
$(LAUNCH_STAMP): .ci/constraints-launch.txt
	$(PYTHON) -m venv $(LAUNCH_VENV)
	$(LAUNCH_VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r .ci/constraints-launch.txt
	touch $(LAUNCH_STAMP)

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

test: $(TEST_STAMP) $(LAUNCH_STAMP)
	$(RUN) -m pytest $(WORKERS) -m "not slow and not gpu"

test-slow: $(TEST_STAMP) $(LAUNCH_STAMP)
	$(RUN) -m pytest $(WORKERS) -m "slow and not gpu" $(PYTEST_OPTIONS)

# On a GPU node, by the Python that is given: a GPU container brings its own torch, beside which .venv would put one for the CPU. Installs nothing.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK_OPTIONS)

lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(LAUNCH_VENV) runs
