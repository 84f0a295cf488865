# Everything runs in .venv, which the first target that needs it makes.
#   make PYTHON=python3.13 ...    another interpreter (3.11 or newer)
#   make TORCH_ARGS=... ...       more arguments for `pip install torch`, such as an index of CPU-only wheels

PYTHON ?= python3
TORCH_ARGS ?=
ARGS ?=
RESULTS ?= benchmarks/results
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
ORACLE := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(PIP) install -q -c constraints.txt --no-deps --no-build-isolation

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-emulated test-asan aot gpu-test gpu-bench fuzz hf-mixins lint venv clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED) ## quantize, evaluate and run the bundled models
	$(BIN)/python -m quamba.demo

test: $(INSTALLED) ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu"

# The kernels' tests on another build of the library.
KERNEL_TESTS = QUAMBA_CPU_LIBRARY=$(1)/libquamba_cpu.so $(BIN)/python -m pytest -q tests/kernels/test_cpu_*.py \
	tests/kernels/test_recording.py tests/kernels/test_int8_onednn_avx2.py

SANITIZER = ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so)

test-emulated: $(INSTALLED) ## the AVX-512 and VNNI kernels, their instructions emulated
	cmake -S kernels -B build/emulated -DCMAKE_BUILD_TYPE=Release -DQUAMBA_EMULATED=ON
	cmake --build build/emulated -j2 --target quamba_cpu same_bits
	build/emulated/same_bits
	$(call KERNEL_TESTS,build/emulated)

test-asan: $(INSTALLED) ## the kernels under the address and undefined behaviour sanitizers
	cmake -S kernels -B build/asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DQUAMBA_SANITIZED=ON
	cmake --build build/asan -j2
	$(SANITIZER) $(call KERNEL_TESTS,build/asan)
	cmake -S kernels -B build/asan-emulated -DCMAKE_BUILD_TYPE=RelWithDebInfo -DQUAMBA_SANITIZED=ON -DQUAMBA_EMULATED=ON
	cmake --build build/asan-emulated -j2 --target quamba_cpu same_bits
	ASAN_OPTIONS=detect_leaks=0 build/asan-emulated/same_bits

aot: $(INSTALLED) ## compile all Triton kernels with all their tiles for six GPUs that need not be here
	$(BIN)/python -m pytest --timeout 0 -m slow tests/triton/test_aot.py

# These two run with the Python at hand, its torch and its triton: no .venv is made, nothing is installed.
gpu-test: ## the kernels on this machine's GPU against float64
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -rs tests/gpu $(ARGS)

gpu-bench: ## their speed, in under ten minutes (RESULTS=folder)
	$(PYTHON) benchmarks/gpu.py --json $(RESULTS)/gpu.json --markdown $(RESULTS)/gpu.md

fuzz: $(INSTALLED) ## damage checkpoints at random and load them, for about half an hour
	$(BIN)/python -m tests.quamba.formats.fuzz --mutants 100000 --seed $${SEED:-1}

hf-mixins: $(INSTALLED) ## transformers' own modelling tests on our classes, fetched from PyPI
	$(BIN)/python -m tests.hf_mixins

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

venv: $(INSTALLED) ## make or refresh .venv

clean: ## remove caches and build leftovers, but not .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch comes first and pinned, so that no dependency can pull another version.
# Editable: what runs is the checkout, so an edit needs no reinstall; only a change of the files below does.
# mamba-ssm is a test oracle: its build wants torch and what is installed beside it, and may fail.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard kernels/CMakeLists.txt kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "quamba needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch==2.13.0
	$(PIP) install -c constraints.txt -e ".[dev]"
	@echo "mamba-ssm (optional, compared with by some tests):"
	@$(PIP) install -q -c constraints.txt einops ninja packaging setuptools wheel && $(ORACLE) mamba-ssm \
		&& echo "  installed" || echo "  NOT INSTALLED: the tests that compare with it will be skipped"
	@touch $@
