# Every target sets itself up: the first call creates .venv, later calls cost nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
LAUNCH_VENV := .venv-launch
LAUNCH_STAMP := $(LAUNCH_VENV)/.installed
# The tested set is of the oldest Megatron-Core that is admitted; this is the newest.
NEWEST_MEGATRON := 0.19.2
NEWEST_VENV := .venv-newest
NEWEST_STAMP := $(NEWEST_VENV)/.installed-$(NEWEST_MEGATRON)
QUICKSTART_DIR ?= runs/quickstart
# Two files of tests at a time: much of a test is waiting.
WORKERS ?= --numprocesses 2 --dist loadfile

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart test test-slow test-newest gpu-check lint models clean

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

# Everything of $(VENV) but its Megatron-Core, which the newest one hides. It declares Python 3.12 or newer and works on 3.11 too; hence without that check.
$(NEWEST_STAMP): $(TEST_STAMP)
	$(RUN) -m venv $(NEWEST_VENV)
	$(RUN) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > $$($(NEWEST_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tested_set.pth
	$(NEWEST_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python megatron-core==$(NEWEST_MEGATRON)
	touch $(NEWEST_STAMP)

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
	$(RUN) -m pytest $(WORKERS) -m "not slow and not gpu" $(PYTEST_OPTIONS)

test-slow: $(TEST_STAMP) $(LAUNCH_STAMP)
	$(RUN) -m pytest $(WORKERS) -m "slow and not gpu" $(PYTEST_OPTIONS)

# The suite and the quickstart's first steps with the newest Megatron-Core, but for tests/slurm and tests/browser, which no version of it changes.
test-newest: $(NEWEST_STAMP)
	@$(NEWEST_VENV)/bin/python -c "import sys; from importlib.metadata import version; \
	  declared = sys.version_info >= (3, 12); \
	  print('megatron-core', version('megatron-core'), 'on Python', sys.version.split()[0], '' if declared else '(not a declared combination: it asks for 3.12)')"
	$(NEWEST_VENV)/bin/python -m pytest $(WORKERS) -m "not slow and not gpu" --ignore tests/slurm --ignore tests/browser $(PYTEST_OPTIONS)
	rm -rf runs/newest
	$(NEWEST_VENV)/bin/python -m recipes.run quickstart --nproc-per-node 4 --run-dir runs/newest training.steps=10

# On a GPU node, by the Python that is given: a GPU container brings its own torch, beside which .venv would put one for the CPU. Installs nothing.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK_OPTIONS)

lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(LAUNCH_VENV) $(NEWEST_VENV) runs
