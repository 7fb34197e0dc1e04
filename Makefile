# Needs Python 3.11 or newer, make and git. Everything else goes into .venv.
PYTHON ?= python3
PROFILE ?= embedded
# numbers of notebooks, for example NOTEBOOKS=00,02; all by default
NOTEBOOKS ?=
CORES ?= all
# for example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small CPU build of torch
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/installed
GRAPH = $(BIN)/python -m snakemake --quiet all --cores $(CORES)
GIVEN = --config 'profile=$(PROFILE)' 'notebooks=$(NOTEBOOKS)'

.PHONY: help venv reproduce report test mutants lint clean

help:
	@echo "make venv       install lcco and what it needs into .venv (once; again when pyproject.toml changes)"
	@echo "make reproduce  run every notebook at PROFILE=embedded; tables, figures, README in results/embedded/"
	@echo "make report     the same results as pages, in results/embedded/html/"
	@echo "make test       run the tests; LCCO_DATA=<folder> adds those on real photographs"
	@echo "make mutants    break the code on purpose, line by line: every break must fail a test (half an hour)"
	@echo "make lint       check code and notebooks with ruff"
	@echo "make clean      remove caches; keeps .venv, runs/ and results/"

venv: $(STAMP)

$(STAMP): pyproject.toml
	@echo "== installing lcco into .venv (once; some minutes, torch is large)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lcco needs Python 3.11 or newer: make venv PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv \
		|| { echo "python3 has no venv: install python3-venv (Debian, Ubuntu)"; rm -rf .venv; exit 1; }
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -e ".[test]" \
		|| { echo "installation failed: pip says why above. It needs 7 GB on disk with torch for CUDA, 2 GB with PIP_ARGS of" \
		"the README; free here: $$(df -Ph . | awk 'NR == 2 {print $$4}'). Then the same command again goes on."; exit 1; }
	@touch $@
	@echo "== installed: $(BIN)/lcco --help"

reproduce: venv
	@echo "== the paper at profile $(PROFILE)"
	@$(GRAPH) $(GIVEN)

report: venv
	@$(GRAPH) html $(GIVEN)

test: venv
	@echo "== tests$(if $(LCCO_DATA),, (LCCO_DATA is not set: those on real photographs skip))"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

mutants: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

lint: venv
	@echo "== ruff over code and notebooks"
	$(BIN)/ruff check .

clean:
	@echo "== removing caches"
	rm -rf cache .pytest_cache .ruff_cache build *.egg-info
	find lcco tests workflow -name __pycache__ -prune -exec rm -rf {} +
