# Everything sets itself up: a Python (3.11 or later), gcc and pip are all that must be there.
SHELL := /bin/bash
PYTHON ?= $(shell scripts/find-python)
VENV ?= .venv
BIN := $(VENV)/bin
# The two versions that are tested; later ones may do: make TORCH=torch ...
TORCH ?= $(shell $(PYTHON) -c 'import sys; print("torch==2.13.0" if sys.version_info < (3, 12) else "torch==2.14.1")')
STAMP := $(VENV)/.esper-installed
PROTO := esper/leyline/proto/v1
NATIVE := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*.* csrc/cuda/*.*)

.PHONY: setup demo test test-fast test-gpu sanitize lint bench cuda-resources proto clean

setup: $(STAMP)

# torch comes first and by itself: the build then links against it, and no build-isolation
# environment ever fetches a second one.
$(STAMP): $(NATIVE)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -U pip setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" numpy pybind11 ninja cmake
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test]" "$(TORCH)"
	touch $@

demo: setup
	$(BIN)/esper train examples/digits.yaml

test: setup lint
	$(BIN)/python -m pytest -q

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow"

test-gpu: setup
	@if $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/python -m pytest -q -m gpu; \
	else echo "no GPU here: with one, this runs 'pytest -m gpu', the tests of compiled kernels, slots, uploads, the blend (C++ and Triton) and the Triton kernels on a device"; \
	fi

# Some four minutes on two cores, most of it a second build of the extension.
sanitize: setup
	scripts/sanitize $(BIN)/python

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy esper

bench: setup
	mkdir -p benchmarks/results
	$(BIN)/python -m pip install -q --disable-pip-version-check peft
	$(BIN)/python -m pytest -q benchmarks --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python -m benchmarks.page benchmarks/results/latest.json benchmarks/results/latest.html

# Registers, shared memory and spills of every CUDA kernel, as ptxas says. Needs nvcc, no GPU.
cuda-resources: setup
	$(BIN)/python -m tests.csrc.cuda_resources

# The generated code is kept in the repository. Its generator is an old one on purpose: the
# code runs with the protobuf of its generator and later ones, up to the next major.
proto:
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install -q --disable-pip-version-check "grpcio-tools==1.76.0" setuptools
	.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. $(PROTO)/*.proto
	.venv-proto/bin/python -m grpc_tools.protoc -I. --grpc_python_out=. $(PROTO)/library.proto $(PROTO)/events.proto

clean:
	rm -rf $(VENV) build esper.egg-info esper/*.so
