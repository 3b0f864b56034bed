# The two commands:
#   make demo            train a small video model on moving digits, sample from it, measure it (QUICK=1: a short form)
#   make test            run the tests, a worker a core (ARGS='-m "not slow" tests/ops' goes to pytest; single tests,
#                        as in ARGS='tests/test_masks.py::test_name --pdb', and '-n 0' run in one process)
# and: make lint, make aot (compile every kernel for sm_80, sm_90, sm_100 and inspect it), make cuda (build the kernels in
# CUDA C++ beside them, for which nvcc must be there), make clean
#
# Everything is installed into ./.venv, once. Other versions, and options of pip, fit into the variables below:
#   make test PYTHON=python3.12 VENV=.venv-3.12
#   make test TORCH=torch==2.11.0 TRITON=triton==3.6.0 NUMPY='numpy<2.4'

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
NUMPY  ?= numpy>=2.2,<2.5

# Whatever the shell says, Python keeps what it has compiled: the tests start dozens of processes, and each would compile
# the modules of torch anew.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
# --no-compile: Python compiles the few modules that are used when they are first imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# The stamp carries the pins in its name: other pins install anew, the same ones never do.
PINS := $(VENV)/.pins-$(shell printf '%s' '$(TORCH) $(TRITON) $(NUMPY)' | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready

.PHONY: demo test lint aot cuda clean same-python
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/sora-fast demo $(if $(QUICK),--quick) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

aot: $(READY)
	$(BIN)/python -m benchmarks.aot $(ARGS)

# Apart, since nothing above needs it, or waits for nvcc.
cuda: $(READY)
	SORA_FAST_REQUIRE_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf $(VENV) build dist *.egg-info sora_fast/*.so sora_fast/built.txt .pytest_cache .ruff_cache .hypothesis .benchmarks

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("$(PYTHON) is " + sys.version.split()[0] + \
	  ", but sora_fast needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# A PYTHON that was asked for is not passed over in silence because an environment is there already.
same-python: | $(BIN)/python
	@says='import sys; print("Python", *sys.version.split()[:1], "of", sys.base_prefix)'; \
	there=$$($(BIN)/python -c "$$says") && asked=$$($(PYTHON) -c "$$says") || exit 1; \
	test "$$there" = "$$asked" || { echo "$(VENV) holds $$there, but PYTHON=$(PYTHON) is $$asked: 'make clean' first," \
	  "or give it a folder of its own, as in VENV=.venv-other" >&2; exit 1; }

# torch comes first: whatever is built against it must see the torch it will run with.
$(PINS): | $(BIN)/python $(if $(filter file,$(origin PYTHON)),,same-python)
	$(PIP) 'setuptools>=77' wheel
	$(PIP) $(TORCH)
	$(PIP) $(TRITON) '$(NUMPY)'
	@rm -f $(VENV)/.pins-*
	@touch $@

# A line is left that says what was compiled.
$(READY): $(PINS) pyproject.toml setup.py $(wildcard csrc/*.py csrc/*.h csrc/cpu/*)
	SORA_FAST_SKIP_CUDA=1 $(PIP) --no-build-isolation --editable '.[dev]'
	@cat sora_fast/built.txt
	@touch $@
