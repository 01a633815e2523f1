# One environment in .venv; every target sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export OMP_NUM_THREADS := 1

.PHONY: setup demo check test test-all bench proto diagrams model screenshots clean

setup: $(STAMP)

# torch first and by its exact version, so that no later package pulls a CUDA build.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "pdserve needs $(PYTHON); set PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,planner,ray,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/python -m deploy.demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_stubs.py --check
	$(BIN)/python scripts/check_asserts.py

test: setup
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not slow and not peer"

test-all: setup
	$(BIN)/pytest -q -m "not peer"

bench: setup
	$(BIN)/python -m bench

proto: setup
	$(BIN)/python scripts/generate_stubs.py

diagrams: setup
	$(BIN)/python scripts/generate_diagrams.py
	$(BIN)/python scripts/generate_metrics_table.py

# Pictures of the planner's report for the docs; says so and does nothing without Chromium.
screenshots: setup
	$(BIN)/python -m scripts.screenshot_report --output docs/images

model: setup
	$(BIN)/python scripts/train_demo_model.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis out
