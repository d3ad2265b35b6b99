# Everything a fresh clone needs: `make demo`, `make test`. They create .venv and install the project first.
#
#   make demo         generate text with a small trained model
#   make test         every test that needs no GPU
#   make test-quick   the part that needs no downloaded weights either and takes a minute or two
#   make lint         ruff and mypy
#   make format       let ruff rewrite what it can
#   make environment  .venv and the installed project, which the above make first
#   make build        incremental build of the extension
#   make clean        remove builds and caches, keep the environment
#
# To use an environment of your own, with the `dev` extra's packages in it:
#   make build PYTHON=/path/to/venv/bin/python

VENV ?= .venv
# The interpreter that .venv is made from, the extra of pyproject.toml that it gets, and further requirements to install
# there (`REQUIRE=jax==0.11.2`).
BASE_PYTHON ?= $(shell .ci/pythons | head -n 1)
EXTRA ?= dev
REQUIRE ?=
# ON treats compiler warnings as errors, as CI does.
WERROR ?= OFF
PYTEST_FLAGS ?= -n auto --maxprocesses 4 --dist worksteal
PROMPT ?= The capital of France is

ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
endif

NATIVE_SOURCES := CMakeLists.txt csrc/CMakeLists.txt $(wildcard ffi/*.cc ffi/*.h csrc/*.h csrc/host/*.cc csrc/host/*.h \
                  csrc/host/tasks/*.cc csrc/host/tasks/*.h csrc/cuda/*.cc csrc/cuda/*.h csrc/device/*.cuh)
# Objects depend on the interpreter and on the XLA headers of its jaxlib.
BUILD_DIR ?= build/$(shell $(PYTHON) -c 'import sys, importlib.metadata as m; \
  print("cp%d%d-jaxlib%s" % (*sys.version_info[:2], m.version("jaxlib")))')
# Two builds in one folder would disturb each other.
LOCK := $(shell command -v flock >/dev/null && echo "flock $(CURDIR)/Makefile")

.PHONY: demo test test-quick lint format environment build clean

demo: $(BUILT)
	$(PYTHON) -m models.generate "$(PROMPT)"

test: $(BUILT)
	$(PYTHON) -m pytest $(PYTEST_FLAGS) -m "not gpu"

test-quick: $(BUILT)
	$(PYTHON) -m pytest $(PYTEST_FLAGS) -m "not gpu and not slow and not weights"

lint: $(INSTALLED)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

environment: $(BUILT)

build: $(INSTALLED)
	$(LOCK) $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable . \
	  --config-settings=build-dir=$(BUILD_DIR) --config-settings=cmake.define.JAX_MPK_WERROR=$(WERROR)
ifdef BUILT
	@touch $(BUILT)
endif

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# The first installation is the one every user gets: isolated, against the oldest supported jaxlib's headers. All Pythons
# build in one folder, since most objects depend on none. Python compiles what it imports: less than all there is.
$(VENV)/.installed: pyproject.toml
	@test -n "$(BASE_PYTHON)" || { echo "No Python >= 3.11 with venv and headers (python3-dev) found." >&2; exit 1; }
	"$(BASE_PYTHON)" -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --no-compile --upgrade pip
	$(LOCK) $(PYTHON) -m pip install --quiet --no-compile --editable '.[$(EXTRA)]' $(REQUIRE) \
	  --config-settings=build-dir=build/isolated --config-settings=cmake.define.JAX_MPK_WERROR=$(WERROR)
	@touch $(VENV)/.installed $(VENV)/.built

$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	@test -e $@ && test -z "$$(find $(NATIVE_SOURCES) -newer $@)" || $(MAKE) --no-print-directory build
