# One command each, on a machine with nothing but make, pip and Python 3.11 or newer.
#   make bench ARGS="--lora-device cuda"     more options for pytest
#   make test ARGS=tests/test_bounds.py      one file of tests
#   make test PYTHON=python3.12              another Python for a new .venv
#   make nightly MUTANTS=1000                every mutant, and not only those that the date draws

PYTHON ?= python3
ARGS ?=
MUTANTS ?= 40
INSTALLED := .venv/installed

.PHONY: help bench test selftest downstream nightly lint format clean
.DELETE_ON_ERROR:

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST)

bench: $(INSTALLED)  ## measure every set-up on the device there is; pytest prints the table and where the report lies
	.venv/bin/python -m pytest suites/gpu --benchmark $(ARGS)

test: $(INSTALLED)  ## the project's own tests, two at a time: no GPU, no network, no download
	.venv/bin/python -m pytest -n 2 $(ARGS)

selftest: $(INSTALLED)  ## show that the checks find planted bugs and leave alone what is right (minutes)
	.venv/bin/python -m lora_bench selftest $(ARGS)

downstream: $(INSTALLED)  ## judge libraries that need an environment of their own (gigabytes)
	for name in torchtune litgpt adapters keras; do downstream/run $$name || exit; done

nightly: $(INSTALLED)  ## thousands of cases for each correct implementation, kills and resumes, some mutation tests (hours)
	.venv/bin/python -m lora_bench selftest --correct-examples 300 --lora-output .lora_bench/nightly
	.venv/bin/python tests/nightly/kill_and_resume.py --kills 10
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	    .venv/bin/python -m pip install --editable '.[dev,nightly]'
	rm -rf .lora_bench/mutants && mkdir -p .lora_bench/mutants
	cp -r lora_bench tests conftest.py pyproject.toml .lora_bench/mutants    # mutated where they stand: never the checkout
	cd .lora_bench/mutants && export PATH="$(CURDIR)/.venv/bin:$$PATH" PYTHONPATH=. HYPOTHESIS_PROFILE=ci OMP_NUM_THREADS=1 && \
	    for of in definition bounds checks; do \
	        cosmic-ray init tests/nightly/$$of.toml $$of.sqlite && \
	        cr-filter-operators $$of.sqlite tests/nightly/$$of.toml && \
	        python tests/nightly/draw_mutants.py $$of.sqlite $(MUTANTS) $$(date +%Y%m%d) && \
	        cosmic-ray baseline tests/nightly/$$of.toml && \
	        cosmic-ray exec tests/nightly/$$of.toml $$of.sqlite && \
	        cr-report --surviving-only --show-diff $$of.sqlite || exit; \
	    done

lint: $(INSTALLED)  ## formatting, ruff's rules and types
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy

format: $(INSTALLED)  ## format, and repair what ruff can repair
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .

clean:  ## remove .venv, caches and builds; measured results stay
	rm -rf .venv __pycache__ .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find lora_bench suites tests -name __pycache__ -prune -exec rm -rf {} +

# The second constraint is for what builds the package: newer pips read only that one there.
$(INSTALLED): .venv/bin/python pyproject.toml constraints.txt
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	    .venv/bin/python -m pip install --editable '.[dev]'
	touch $@

# Debian ships pip without ensurepip; such a pip can fill a .venv from outside.
.venv/bin/python:
	@$(PYTHON) -c 'import sys' 2>/dev/null || { \
	    echo 'lora-bench needs Python 3.11 or newer, and $(PYTHON) does not run: make PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit( \
	    "lora-bench needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=/path/to/python" % v[:2])'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	    $(PYTHON) -m venv --clear .venv; \
	elif $(PYTHON) -c 'import pip, venv' 2>/dev/null; then \
	    $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install pip; \
	else \
	    echo '$(PYTHON) can make no virtual environment: install its ensurepip (Debian: python3-venv) or pip' >&2; \
	    exit 1; \
	fi
