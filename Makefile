# make demo: the main job on a real model, on the CPU. make test: every check CI runs.
# Both set up .venv on first use; nothing but Python 3.11+ is needed for the demo.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types unit native digits cli-docs gpu-check wheel clean

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

test: lint types native unit

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

# One thread a test process: two processes with two threads each slow each other down.
unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --ignore tests/native

native: $(VENV)/.dev
	$(BIN)/python tools/build_native.py $(if $(BITNET_REQUIRE_NATIVE),--require)

digits: $(VENV)/.dev
	$(BIN)/python tools/digits_table.py

cli-docs: $(VENV)/.dev
	$(BIN)/python tools/make_cli_docs.py

wheel: $(VENV)/.dev
	$(BIN)/python tools/build_native.py --release --require
	$(BIN)/python tools/build_wheel.py

gpu-check:
	$(PYTHON) tools/gpu_check.py $(GPU_CHECK_FLAGS)

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.created
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.created
	$(PIP) torch==2.13.0
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf build dist out *.egg-info plugins/build*
