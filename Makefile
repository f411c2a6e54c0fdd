SHELL := /bin/bash -o pipefail
# `make help` lists the targets. Each sets up .venv first if it is missing or out of date. EXTRA=cuda installs for an
# NVIDIA GPU; CONFIG and ARGS go to `fit`, TABLE and ARGS to `evidence`.

PYTHON ?= python3
EXTRA ?= cpu
CONFIG ?= math.yaml
ARGS ?=
TABLE ?=
VENV := .venv
BIN := $(VENV)/bin
PINS := requirements$(if $(filter cuda,$(EXTRA)),-cuda).txt
STAMP := $(VENV)/.installed-$(EXTRA)
unexport PYTHONDONTWRITEBYTECODE  # without compiled modules every process takes six seconds more to start

# uv does not read pip's settings: hand over where this machine's pip looks for wheels, unless uv has been told itself.
UV_SETTINGS = \
	setting() { $(BIN)/python -m pip config list | sed -n "s/^[^=]*[.]$$1='\(.*\)'$$/\1/p" | tail -n 1; }; \
	links="$$(setting find-links)"; index="$$(setting index-url)"; extra="$$(setting extra-index-url)"; \
	[ -z "$$links" ] || export UV_FIND_LINKS="$${UV_FIND_LINKS:-$$(echo $$links | tr ' ' ',')}"; \
	[ -z "$$index" ] || export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; \
	[ -z "$$extra" ] || export UV_INDEX="$${UV_INDEX:-$$extra}" UV_INDEX_STRATEGY="$${UV_INDEX_STRATEGY:-unsafe-best-match}"

.PHONY: help setup fit evidence test slow faults gpu torture mutants audit lint format ui docs requirements clean
.DEFAULT_GOAL := setup

help:  ## this list
	@sed -nE 's/^([a-z]+):.*  ## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: $(STAMP)  ## set up .venv

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) uv

$(STAMP): pyproject.toml $(PINS) | $(BIN)/uv
	@$(UV_SETTINGS); \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(PINS) --editable '.[$(EXTRA),dev]'
	@touch $@

fit: $(STAMP)  ## train with CONFIG (math.yaml); ARGS are further options
	$(BIN)/python experiments/run.py fit --config $(CONFIG) $(ARGS)

evidence: $(STAMP)  ## the tables of evidence and what they cost; TABLE=lab makes one, ARGS=--rebuild from its rows
	$(BIN)/python analysis/evidence.py $(TABLE) $(ARGS)

# Three files at a time, one thread each: on two cores, since many tests wait for other processes. In their order, since
# those with the fewest tests, which xdist would put last, are the longest.
test: $(STAMP)  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not torture and not gpu" -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

slow: $(STAMP)  ## the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not torture" -n 2 --dist loadfile $(ARGS)

faults: $(STAMP)  ## what a run survives, as a table
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "fault and not slow and not torture" -n 3 --dist loadfile $(ARGS)

gpu: $(STAMP)  ## the tests that need a GPU
	$(BIN)/python -m pytest -o addopts= -W default tests/gpu -n 4 $(ARGS)

torture: $(STAMP)  ## the same after 200 kills
	$(BIN)/python -m pytest -m "fault and torture" $(ARGS)

mutants: $(STAMP)  ## faults planted in the algorithm, one at a time: do the tests notice?
	$(BIN)/python tests/mutants.py $(ARGS)

# pip-audit brings its own environment. Strict: a pin that it could not look up is no pin without holes.
audit: $(STAMP)  ## known holes of the pinned packages
	@$(UV_SETTINGS); for pins in requirements.txt requirements-cuda.txt; do \
		$(BIN)/uv tool run pip-audit --strict --progress-spinner off --no-deps --disable-pip --requirement $$pins || \
		{ echo "$$pins: a known hole, or PyPI's advisories cannot be reached from here (then: 'not found on PyPI')" >&2; \
		exit 1; }; \
	done

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## mend and format the code by ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(STAMP)  ## MLflow's pages on 127.0.0.1, with the addresses of runs and charts
	$(BIN)/python -m ogls.tracking.ui $(ARGS)

docs: $(STAMP)  ## the site, docs/_build/html/index.html
	$(BIN)/sphinx-build --fail-on-warning --quiet -b html docs docs/_build/html

# Versions only: no hosts, no hashes, and no local versions such as +cpu, which other machines cannot resolve. For GPUs
# from the index alone: a +cpu wheel of torch among this machine's own asks for none of what torch needs on a GPU.
requirements: | $(BIN)/uv  ## pin the newest packages that fit
	@$(UV_SETTINGS); \
	pin() { $(BIN)/uv pip compile --quiet --upgrade --python $(BIN)/python --no-header --no-annotate \
		--extra $$1 --extra dev $$3 pyproject.toml | sed 's/+[a-z0-9.]*$$//' > $(VENV)/pins && mv $(VENV)/pins $$2; }; \
	pin cpu requirements.txt; unset UV_FIND_LINKS; \
	pin cuda requirements-cuda.txt "--python-platform x86_64-manylinux_2_28"

clean:  ## take away .venv and what is built
	rm -rf $(VENV) docs/_build docs/_generated build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
