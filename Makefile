# One environment in .venv; every target sets up what it needs. `make setup` sets up all of it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TOOLS := $(VENV)/.tools
export OMP_NUM_THREADS := 1

.PHONY: setup demo check test test-all bench gpu-check proto diagrams model screenshots clean

setup: $(STAMP) $(TOOLS)

# torch first and by its exact version, so that no later package pulls a CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "pdserve needs $(PYTHON); set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,planner,ray,dev]'
	touch $(STAMP)

# What tests use beyond Python, where the system lets us install it.
$(TOOLS): scripts/install_test_tools.sh | $(STAMP)
	sh scripts/install_test_tools.sh
	touch $(TOOLS)

demo: $(STAMP)
	$(BIN)/python -m deploy.demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_stubs.py --check
	$(BIN)/python scripts/check_asserts.py

# Files in their order, so that the long ones of tests/e2e come first and none is left at the end.
test: setup
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not peer" $(PYTEST_FLAGS)

test-all: setup
	$(BIN)/pytest -q -m "not peer"

bench: $(STAMP)
	$(BIN)/python -m bench

# On a machine with a GPU, whose own Python has torch: `make gpu-check PYTHON_GPU=python3`.
PYTHON_GPU ?= $(BIN)/python
GPU_CHECK_FLAGS ?= --device cuda
gpu-check:
	$(PYTHON_GPU) -m bench.gpu_check $(GPU_CHECK_FLAGS)

proto: $(STAMP)
	$(BIN)/python scripts/generate_stubs.py

diagrams: $(STAMP)
	$(BIN)/python scripts/generate_diagrams.py
	$(BIN)/python scripts/generate_metrics_table.py

# Pictures of the planner's report for the docs; says so and does nothing without Chromium.
screenshots: $(STAMP)
	$(BIN)/python -m scripts.screenshot_report --output docs/images

model: $(STAMP)
	$(BIN)/python scripts/train_demo_model.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
