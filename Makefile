# `make demo` shows the zoo at work, `make test` tests it; both first set up .venv by themselves.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
MODULES = $(subst /,.,$(basename $(wildcard equizoo/[a-z]*.py equizoo/*/[a-z]*.py))) \
	equizoo.tensor_products.analysis
# Compiled programs are kept between runs: most of a test's time is compilation. Reading them back,
# XLA warns of another machine even on the same one; the log level keeps that out of the output.
# Large arrays on 2 MB pages: far fewer page faults.
TEST_ENV := JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

# The versions that tests/parity compares with: torch by itself first, since its build for the CPU may
# come from another place than the rest.
PARITY := .venv-parity
PARITY_TESTS := tests/parity \
	tests/tensor_products/test_matrix_product.py::test_equals_the_fused_tensor_of_e3x \
	tests/eval/test_benchmark.py::test_peers_compute_the_same_map
TORCH = $(shell sed -n 's/.*"\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: help demo test test-slow parity lint format types doctest docs examples readme clean

help:
	@echo "make demo       the zoo at work, on the CPU, offline once installed"
	@echo "make test       all tests but the slow ones; make test-slow: those"
	@echo "make parity     tests against other libraries, in an environment of its own (.venv-parity)"
	@echo "make lint types doctest docs examples"
	@echo "make format     rewrite the code as 'make lint' wants it"
	@echo "make readme     rewrite tables (README, published OC20 and OC22 results) and docs/zoo.html"
	@echo "make clean      remove .venv, caches and what was built"
	@echo "Another Python (3.11 or newer): make PYTHON=python3.13 demo"

demo: $(VENV)/installed
	@rm -rf demo-output  # of an earlier demo
	$(BIN)/equizoo demo --out demo-output

# In `make test` LLVM does not optimise compiled code, and XLA writes fused loops in its older way where
# it still has it (jaxlib 0.10): that takes a sixth of the time to compile, and leaves the passes that
# change a program as they are. Everything else (slow tests, doctests, parity, examples, demo) has the
# code that users get, and so has `make test COMPILE=`.
COMPILE ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

# Two processes, each with whole files (tests/conftest.py): what one test compiles, others there use.
test: $(VENV)/installed-dev
	$(TEST_ENV) XLA_FLAGS="$$($(BIN)/python tests/known_xla_flags.py $(COMPILE))" \
		$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" $(PYTEST_ARGS)

# pytest exits with 5 where no test is marked slow.
test-slow: $(VENV)/installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]

parity: $(PARITY)/installed
	$(TEST_ENV) EQUIZOO_PARITY=1 $(PARITY)/bin/python -m pytest $(PARITY_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/installed-dev
	$(BIN)/mypy

doctest: $(VENV)/installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest --doctest-modules equizoo $(PYTEST_ARGS)

docs: $(VENV)/installed-dev
	$(BIN)/pdoc --docformat restructuredtext --math --output-directory build/docs $(MODULES)

# make_dataset.py is not among them: it takes hours, and needs PySCF.
examples: $(VENV)/installed
	$(TEST_ENV) $(BIN)/python examples/predict.py
	$(TEST_ENV) $(BIN)/python examples/finetune.py

readme: $(VENV)/installed
	$(BIN)/python docs/models_table.py
	$(BIN)/python docs/open_catalyst_table.py
	$(BIN)/python docs/equiformer_table.py
	$(BIN)/python docs/tdn_table.py
	$(BIN)/python docs/fine_tuning_table.py
	$(BIN)/python docs/zoo_page.py

clean:
	rm -rf $(VENV) $(PARITY) .venv-newest .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# A new pyproject.toml installs anew; the code itself is used where it lies.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/installed $@

$(PARITY)/installed: pyproject.toml
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet $(TORCH)
	$(PARITY)/bin/python -m pip install --quiet --editable '.[dev,parity,peers]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "equizoo needs Python 3.11 or newer, and '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 || true)."; \
		echo "Name one that is newer, for example: make PYTHON=python3.12 $(or $(MAKECMDGOALS),demo)"; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$$($(PYTHON) --version) cannot make virtual environments: install its venv module" \
			"(on Debian and Ubuntu the package python3-venv)."; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
