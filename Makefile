# make env | train | test | test-all | lint | bench | profile: each makes .venv when it is not there.
# make gpu: tests and benchmarks on a GPU with the python3 that is there (PYTHON=...), nothing installed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
NATIVE := .venv/native
TRITON := triton==3.9.0
TORCHAUDIO := torchaudio==2.11.0

.PHONY: env train test test-all lint bench gpu profile clean

env: $(NATIVE)

# The CPU build of torch brings no triton: one is added for the interpreter. torchaudio is for tests alone, and its
# compiled libraries, which nothing here needs, fail beside a CPU build of torch: they are taken out of .venv then.
$(READY): requirements.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make env PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TRITON)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(TORCHAUDIO)
	$(BIN)/python -c 'import torchaudio' 2>/dev/null || rm -f .venv/lib/python*/site-packages/torchaudio/lib/*.so
	$(BIN)/python -c 'import torch, torchaudio, triton, soundfile, soxr, safetensors, tyro, transformers'
	touch $(READY)

# Operations in C. Without a compiler the line says so, and everything runs without them.
$(NATIVE): $(READY) setup.py $(wildcard kernels/native.* kernels/*/native*)
	$(BIN)/python setup.py --quiet build_ext --inplace >$(NATIVE).log 2>&1 || true
	$(BIN)/python -c 'from kernels.selective_scan import native; print("operations in C:", native.refuses() or native.LIBRARY.instruction_set())'
	touch $(NATIVE)

train: $(NATIVE)
	$(BIN)/python -m train.run --fused

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint $(NATIVE)
	$(BIN)/python -m pytest tests/

test-all: lint $(NATIVE)
	$(BIN)/python -m pytest tests/ --slow

bench: $(NATIVE)
	$(BIN)/python -m bench.run

gpu:
	$(PYTHON) -m bench.gpu

profile: $(NATIVE)
	$(BIN)/python -m bench.profile

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache kernels/*/_native*
