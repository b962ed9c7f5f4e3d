# `make demo` trains on real images, `make test` tests; both install what they need into .venv first.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
CSRC := $(shell find csrc -type f)
# A file of tests on each core, in processes of one thread: on two cores all take half as long. tests/conftest.py says
# which files come first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(shell nproc) --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-all quick dist docs wheels distributions release test-installed test-wheels test-oldest test-peers \
	asan arm emulate bench gpu lint format clean

demo: $(VENV)/.installed
	$(BIN)/python -m train_ref fit --config digits_moco_v2_co2

test: $(VENV)/.installed
	$(PYTEST) -m "not thorough" $(PYTEST_ARGS)

# With the tests that are much like another, every place that is interrupted, every fault of the disk, 300 power cuts,
# 10,000 calls of the operators, more kills, longer trainings, and more examples in Triton's interpreter; one after the
# other, on all threads.
test-all: $(VENV)/.installed
	INTERRUPTS_EVERY=1 DISK_POWER_CUTS=300 DISK_FAULTS=1 CONTRASTIVE_OPS_FUZZ_CALLS=10000 KILLS=8 LONG_STEPS=1 \
		INTERPRETED_PROFILE=few $(BIN)/python -m pytest $(PYTEST_ARGS)

# What takes seconds, with few examples each.
quick: $(VENV)/.installed
	HYPOTHESIS_PROFILE=few $(PYTEST) -m "not slow and not thorough" $(PYTEST_ARGS)

# The oldest versions that are promised, with the quick selection, on a Python 3.12.
PYTHON_OLDEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3) python3.12)
test-oldest:
	$(MAKE) quick VENV=.venv-oldest PYTHON=$(PYTHON_OLDEST) CONSTRAINTS=constraints-oldest.txt

# The source distribution and this machine's wheel.
dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -c "from setuptools.build_meta import build_sdist, build_wheel as wheel; build_sdist('dist'), wheel('dist')"

# Wheels that need no compiler, in dist, for each Python of PYTHONS: for any Linux that has the glibc of torch's own
# wheels, with kernels for each torch of MINORS (all that are supported, where it is not given). Each takes a core
# some 20 minutes; what was compiled before is used again.
PYTHONS ?= $(PYTHON)
RELEASE := build/release
TORCHES := build/torches
wheels: $(RELEASE)/.installed
	rm -rf build/wheels dist/*.whl
	$(RELEASE)/bin/python .ci/torches.py $(TORCHES) $(MINORS)
	for python in $(PYTHONS); do CONTRASTIVE_OPS_TORCHES=$(TORCHES) $$python -m pip --disable-pip-version-check \
		wheel --quiet --no-deps --wheel-dir build/wheels . || exit 1; done
	PATH="$(abspath $(RELEASE))/bin:$$PATH" .ci/repair dist build/wheels/*.whl
	$(RELEASE)/bin/twine check --strict dist/*.whl

# What is published: the wheels, and the source distribution.
distributions: wheels
	rm -rf dist/*.tar.gz
	$(RELEASE)/bin/python -m build --sdist --outdir dist
	$(RELEASE)/bin/twine check --strict dist/*

# The present state as version VERSION: built, committed and tagged, or refused.
release: $(RELEASE)/.installed
	$(RELEASE)/bin/python .ci/release.py "$(VERSION)"

# The wheel as its users have it: installed, and tested in a folder without the source. All else comes from VENV.
ELSEWHERE := build/elsewhere
PURELIB := python -c "import sysconfig; print(sysconfig.get_path('purelib'))"
INSTALLED := -m "not slow" tests/test_installation.py tests/test_readme.py tests/test_backends.py \
	tests/test_functional.py tests/classifier/test_classifier.py tests/train_ref/test_cli.py tests/train_ref/test_help.py
define install_elsewhere
	rm -rf $(ELSEWHERE) && mkdir -p $(ELSEWHERE)
	$(BIN)/python -m venv --without-pip $(ELSEWHERE)/.venv
	$(BIN)/python -m pip --quiet --disable-pip-version-check --python $(ELSEWHERE)/.venv/bin/python install \
		--no-deps --no-index --find-links dist --only-binary :all: contrastive-ops
	$(BIN)/$(PURELIB) > $$($(ELSEWHERE)/.venv/bin/$(PURELIB))/others.pth
	cp -r tests bench docs README.md pyproject.toml $(ELSEWHERE)
endef

test-installed: dist
	$(install_elsewhere)
	cd $(ELSEWHERE) && CONTRASTIVE_OPS_SOURCE=$(CURDIR) .venv/bin/python -m pytest $(INSTALLED)

# The same of what `make wheels` left, where there is neither a compiler nor anything else.
test-wheels: $(VENV)/.installed
	$(install_elsewhere)
	cd $(ELSEWHERE) && env --ignore-environment HOME="$$HOME" PATH="$$PWD/.venv/bin" CONTRASTIVE_OPS_TEST_WHEEL=1 \
		.venv/bin/python -m pytest tests/test_wheel.py $(INSTALLED)

# The peers' own tests of the losses that contrastive_ops/adapters has under their names, with the adapters in their place.
# Packages on an index come without these tests, so they are fetched from where the peers are developed; the variables may
# name copies. One of lightly's is known to fail: docs/adapters.md says why.
PEERS := build/peers
LIGHTLY ?= https://github.com/lightly-ai/lightly
SOLO_LEARN ?= https://github.com/vturrisi/solo-learn
OPEN_CLIP ?= https://github.com/mlfoundations/open_clip
FETCH_PEER = rm -rf $@ && git init --quiet $@ && git -C $@ fetch --quiet --depth 1 $(1) $(2) && \
	git -C $@ checkout --quiet FETCH_HEAD
TEST_PEER = PYTHONPATH=.:src:$(abspath tests/adapters):$(abspath $(PEERS)/needed) OMP_NUM_THREADS=1 \
	$(abspath $(BIN))/python -m pytest --rootdir=. --config-file=/dev/null -p in_their_place $(PYTEST_ARGS)
test-peers: $(VENV)/.installed $(PEERS)/lightly $(PEERS)/solo-learn $(PEERS)/open_clip $(PEERS)/needed
	cd $(PEERS)/lightly && $(TEST_PEER) tests/loss/test_ntx_ent_loss.py tests/loss/test_co2.py \
		--deselect tests/loss/test_ntx_ent_loss.py::TestNTXentLoss::test_forward_pass_neg_temp
	cd $(PEERS)/solo-learn && $(TEST_PEER) tests/losses/test_simclr.py tests/losses/test_mocov2plus.py \
		tests/losses/test_mocov3.py
	cd $(PEERS)/open_clip && $(TEST_PEER) tests/test_loss.py tests/test_factory_task.py tests/test_clap_task.py

$(PEERS)/lightly:
	$(call FETCH_PEER,$(LIGHTLY),e8d317fc5a87f4387a85a35e689869039ec249ee)

$(PEERS)/solo-learn:
	$(call FETCH_PEER,$(SOLO_LEARN),9187ea39c2c3f43c455ab06664d2b019a9802954)

$(PEERS)/open_clip:
	$(call FETCH_PEER,$(OPEN_CLIP),89fb801f1e6087880e951fc8354b8a2077b79c6d)

# What lightly's tests and open_clip need beyond [test,train].
$(PEERS)/needed: $(VENV)/.dependencies
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
		pytest-mock==3.17.0 ftfy==6.3.1 regex==2026.11.19 wcwidth==0.9.4

# Calls of the operators, right and wrong, and the tests of the active set, on C++ whose every access to memory gcc's
# sanitizers watch: their first report ends it. It has a build of its own.
ASAN := build/asan
asan: $(VENV)/.installed
	CONTRASTIVE_OPS_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-lib $(ASAN)
	cp -r tests pyproject.toml $(ASAN)
	cd $(ASAN) && CONTRASTIVE_OPS_FUZZ_CALLS=10000 ATEN_CPU_CAPABILITY=default ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python -m pytest -q -p no:faulthandler --capture=sys tests/test_ops_fuzz.py \
		tests/classifier/test_store.py

# The kernels as 64-bit ARM has them, compiled by setup.py as it is run there, and their tests, in qemu's emulation of such
# a processor. Debian's Python for ARM lies in a folder of its own, and so does the oldest torch that is promised: later
# ones for ARM link CUDA. A process of this Python cannot start another, so tests that do are left out.
ARM := build/arm
ARM_ROOT := $(abspath $(ARM))/root
ARM_SITE := $(abspath $(ARM))/site
ARM_QEMU = $(or $(shell command -v qemu-aarch64),$(shell command -v qemu-aarch64-static),qemu-aarch64)
ARM_PYTHON = QEMU_LD_PREFIX=$(ARM_ROOT) $(ARM_QEMU) -cpu max $(ARM_ROOT)/usr/bin/python3
ARM_APT := apt-get --quiet=2 -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false \
	-o APT::Sandbox::User= -o Debug::NoLocking=true -o Dir::State=$(abspath $(ARM))/apt \
	-o Dir::State::status=$(abspath $(ARM))/apt/status -o Dir::Cache=$(abspath $(ARM))/apt
ARM_TESTS ?= tests/test_co2.py tests/test_nt_xent.py tests/test_conic.py tests/test_rows_ops.py tests/test_range.py \
	tests/test_ops_fuzz.py tests/classifier/test_store.py
arm: $(ARM)/.installed
	headers=$$(echo $(ARM_ROOT)/usr/include/python3.*) && MAX_JOBS=$(shell nproc) PYTHONPATH=$(ARM_SITE) \
		CPPFLAGS="-I$$headers -idirafter $(ARM_ROOT)/usr/include" \
		$(ARM_PYTHON) setup.py --quiet build --build-lib $(ARM)/lib
	cp -r tests pyproject.toml $(ARM)/lib
	cd $(ARM)/lib && PYTHONPATH=$(ARM_SITE) OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=interpreted $(ARM_PYTHON) -m pytest \
		-m "not slow and not thorough" -k "not compiles and not reference" $(ARM_TESTS) $(PYTEST_ARGS)

$(ARM)/.installed: constraints-oldest.txt
	@missing=; \
	for needed in apt-get:apt dpkg-deb:dpkg aarch64-linux-gnu-g++:g++-aarch64-linux-gnu $(ARM_QEMU):qemu-user \
		/usr/aarch64-linux-gnu/include/stdio.h:libc6-dev-arm64-cross; do \
		command -v $${needed%%:*} > /dev/null || test -e $${needed%%:*} || missing="$$missing $${needed##*:}"; \
	done; \
	test -z "$$missing" || { echo "make arm needs Debian's packages$$missing: apt-get install$$missing" >&2; exit 1; }
	rm -rf $(ARM) && mkdir -p $(ARM)/apt/lists/partial $(ARM)/apt/archives/partial $(ARM_ROOT) && touch $(ARM)/apt/status
	$(ARM_APT) update
	$(ARM_APT) install --yes --download-only python3-dev libstdc++6 libgomp1
	for package in $(ARM)/apt/archives/*.deb; do dpkg-deb --extract $$package $(ARM_ROOT) || exit 1; done
	$(PYTHON) -m venv $(ARM)/pip
	version=$$(basename $(ARM_ROOT)/usr/include/python3.*) && for packages in "--no-deps torch" \
		"setuptools numpy pytest hypothesis filelock typing-extensions sympy networkx jinja2 fsspec"; do \
		$(ARM)/pip/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
			--target $(ARM_SITE) --only-binary :all: --python-version $${version#python} \
			--platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 $$packages || exit 1; \
	done
	touch $@

# The kernels as they are compiled for two generations of GPUs, by the present Triton and by an older one, and by NVRTC, in
# the emulator of tests/gpu_emulator. Volta's need NVRTC 12.
EMULATED := tests/test_co2.py tests/test_conic.py tests/test_nt_xent.py tests/test_ops.py tests/test_rows_ops.py \
	tests/test_seam.py
OLDER_TRITON := build/triton-3.6
NVRTC_12 := build/nvrtc-12
emulate: $(VENV)/.installed $(OLDER_TRITON) $(NVRTC_12)
	for triton in "" $(abspath $(OLDER_TRITON)); do for gpu in sm_80 sm_90; do \
		PYTHONPATH=$$triton GPU_EMULATOR=$$gpu HYPOTHESIS_PROFILE=interpreted $(PYTEST) -k triton $(EMULATED) || exit 1; \
		PYTHONPATH=$$triton GPU_EMULATOR=$$gpu $(PYTEST) -k emulated tests/test_gpu_emulator.py || exit 1; \
	done; done
	for gpu in sm_75 sm_80 sm_90; do \
		GPU_EMULATOR=$$gpu HYPOTHESIS_PROFILE=interpreted $(PYTEST) -k cuda $(EMULATED) || exit 1; \
	done
	$(PYTEST) tests/test_cuda_kernels.py

$(OLDER_TRITON): $(VENV)/.dependencies
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

$(NVRTC_12): $(VENV)/.dependencies
	$(BIN)/python -m pip install --quiet --no-deps --target $@ nvidia-cuda-nvrtc-cu12

bench: $(VENV)/.installed
	$(BIN)/python -m bench

# Everything that needs a GPU, in the environment of PYTHON, which must have the package with [test,train,disk]: in the
# order of its worth, for as many seconds as the GPU is to be had. Called again, it goes on with what was left.
OUT ?= bench/results
SECONDS ?= 7200
gpu:
	$(PYTHON) -m bench.parts --seconds $(SECONDS) --output $(OUT)

# The documentation's site, in build/site. It is built from source alone, so its environment has no torch. A link to nothing,
# an anchor that is not there and a page that the navigation lacks are warnings, which end it; with --quiet MkDocs would not
# count them. (The variable silences what the theme's authors say about a later MkDocs.)
DOCS := build/docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

# Each of these has an environment of its own, with what pyproject.toml's extra of its name asks for and no torch.
$(DOCS)/.installed $(RELEASE)/.installed: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'] \
		['$(notdir $(@D))'], sep='\n')" > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
		--requirement $(@D)/requirements.txt
	touch $@

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/typed_client.py
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typed_client.py
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info contrastive_ops/*.so

# Torch comes first because the build runs in this environment, not in one of its own.
$(VENV)/.dependencies: pyproject.toml $(CONSTRAINTS)
	@test -e $@ || echo "Downloading torch and what it needs into $(VENV): some 3 GB that take 6 GB there, \
	and minutes. Then the C++ kernels are compiled, some minutes more. Both happen once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies setup.py $(CSRC)
	$(PIP) --no-build-isolation --editable '.[test,train,disk]'
	$(BIN)/python -c "import contrastive_ops as c; [print(f'{n:10}', s) for n, s in c.available_backends().items()]"
	touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(PIP) ruff mypy 'pyright[nodejs]' clang-format
	touch $@
