# `make demo` trains on real images, `make test` runs every test; both install what they need into .venv first.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CSRC := $(shell find csrc -type f)

.PHONY: demo test bench gpu lint format clean

demo: .venv/.installed
	$(BIN)/python -m train_ref fit --config train_ref/recipes/digits_moco_v2_co2.yaml

test: .venv/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: .venv/.installed
	$(BIN)/python -m bench

# Everything that needs a GPU, in the environment of PYTHON, which must have the package with [test,train]. What was
# measured is left in OUT; a part that fails does not stop the rest.
OUT ?= bench/results
gpu:
	-HYPOTHESIS_PROFILE=few $(PYTHON) -m pytest -q tests/test_co2.py tests/test_conic.py tests/test_nt_xent.py \
		tests/test_ops.py tests/test_rows_ops.py tests/test_gpu.py
	-$(PYTHON) -m pytest -q -s bench/test_gpu_promises.py
	-$(PYTHON) -m train_ref validate --network resnet18 --accelerator gpu --output $(OUT)/validate-resnet18
	-$(PYTHON) -m train_ref validate --network resnet50 --dataset synthetic --image_size 224 --batch_size 256 \
		--queue_size 65536 --precision bf16-mixed --steps 10 --accelerator gpu --output $(OUT)/validate-resnet50
	-$(PYTHON) -m bench --device cuda --output $(OUT)/gpu.json
	-$(PYTHON) -m bench.instances --device cuda --output $(OUT)/gpu-instances.json

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
