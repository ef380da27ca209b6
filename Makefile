# make quickstart   train a tiny language model and make its page
# make test         set up and pass the tests
# make ci           lint, all tests, slow and rival ones too
PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# One tested set of versions per Python; CONSTRAINTS=constraints/py3.12-jax0.11.txt chooses another.
CONSTRAINTS ?= $(lastword $(sort $(wildcard constraints/py$(VERSION)-*.txt)))
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: quickstart test lint ci ci_rest

$(VENV)/.run: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "tinyjax needs Python 3.11 to 3.13; this is $(VERSION): make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.rivals: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,rivals,aot]'
	@touch $@

# JAX with the CUDA compiler but neither a GPU nor CUDA's libraries: what the GPU kernels are compiled with in tests.
$(VENV)-gpu/.run: $(VENV)/.run
	$(PYTHON) -m venv $(VENV)-gpu
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(VENV)-gpu/bin/python -m pip install --quiet --disable-pip-version-check jax==$$version && \
	$(VENV)-gpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	@touch $@

quickstart: $(VENV)/.run
	$(BIN)/python -m experiments.run quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

ci: test ci_rest

ci_rest: lint $(VENV)/.rivals $(VENV)-gpu/.run
	XLA_FLAGS= TINYJAX_GPU_PYTHON=$(abspath $(VENV)-gpu/bin/python) $(BIN)/python -m pytest -m "slow or rivals" --durations 10
	XLA_FLAGS= $(BIN)/python -m pytest tests/kernels -m "not slow" --numprocesses auto --dist worksteal
