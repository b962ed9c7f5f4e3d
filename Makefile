# `make demo` trains on real images, `make test` runs every test; both install what they need into .venv first.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CSRC := $(shell find csrc -type f)

.PHONY: demo test bench lint format clean

demo: .venv/.installed
	$(BIN)/python -m train_ref fit --config train_ref/recipes/digits_moco_v2_co2.yaml

test: .venv/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/.installed
	$(BIN)/python -m bench

lint: .venv/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: .venv/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf .venv build *.egg-info contrastive_ops/*.so

# The build's own needs come first because the build runs in this environment, not in one of its own.
.venv/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel pybind11 torch
	touch $@

.venv/.installed: .venv/.dependencies setup.py $(CSRC)
	$(PIP) --no-build-isolation --editable '.[test,train]'
	$(BIN)/python -c "import contrastive_ops as c; [print(f'{n:10}', s) for n, s in c.available_backends().items()]"
	touch $@

.venv/.linters: .venv/.installed
	$(PIP) ruff mypy clang-format
	touch $@
