# The front door. `make` sets up, runs every notebook and builds the book; `make help` lists the rest.
# Needs make and Python 3.11 or newer: make PYTHON=python3.12 takes another than python3.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
BOOK := build/_build/html

# The longest first, so that two at once end together.
LONGEST := permuted_masks fashion_mnist cifar garments class_bias how_tickets_win basins_and_connectivity extreme_labels
NOTEBOOKS := $(wildcard $(LONGEST:%=notebooks/%.ipynb)) $(filter-out $(LONGEST:%=notebooks/%.ipynb),$(wildcard notebooks/*.ipynb))
EXECUTED := $(NOTEBOOKS:%=build/source/%)
FIGURES := build/source/book/figures/.drawn
LIBRARY := $(shell find permask_core -type f ! -path '*/__pycache__/*' 2>/dev/null)
PROSE := $(shell find book batch -type f ! -path '*/__pycache__/*' ! -path 'book/readme/*') _config.yml _toc.yml

# Finished stages of the experiments lie below, in the folder that a notebook's `runs` names.
export PERMASK_RUNS ?= $(CURDIR)/build
# Figures that a run of the book leaves for other pages; set for that run alone, or a notebook that is played with
# would change the landing page.
RESULTS := $(CURDIR)/build/source/book/results
# Notebooks and test processes run side by side; more threads each would only make them wait for one another.
export OMP_NUM_THREADS ?= 1
# Each module is compiled once, when it is first imported; some containers set this, and compile it in every process.
unexport PYTHONDONTWRITEBYTECODE
# The same for the processes of one notebook: two notebooks at once are enough.
build/source/notebooks/%.ipynb: export PERMASK_WORKERS ?= 1

# Unless the command line says otherwise (make -j1), two targets at once: that is, two notebooks.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += -j2
endif

.DELETE_ON_ERROR:
.PHONY: all book test test-long replicate lab zip batch readme bench address clean help

all: book ## set up, run what changed, build the book, say which claims hold (the default)

$(READY): requirements.txt constraints.txt pyproject.toml book/tools/install.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	@$(PYTHON) book/tools/install.py
	@touch $@

# A notebook runs again when it or the library changed; prose is no prerequisite.
# One that fails leaves its page up to the error, out of date, and the book goes on. PERMASK_SEED=1000 gives other seeds.
build/source/notebooks/%.ipynb: notebooks/%.ipynb $(LIBRARY) $(READY) book/tools/execute.py
	@PERMASK_DISPLAY=static PERMASK_FIGURES=$(RESULTS) $(BIN)/python -m book.tools.execute $< $@

# The page of results runs again when there are new ones.
build/source/notebooks/results.ipynb: $(wildcard build/batch/*/table.csv)

# The schematic figures of the prose pages.
$(FIGURES): book/figures.py $(LIBRARY) $(READY)
	@mkdir -p $(@D)
	$(BIN)/python book/figures.py $(@D)
	@touch $@

# Always a build from nothing: a partial one keeps old navigation, and forgets the warnings of pages it does not read again.
$(BOOK)/index.html: $(EXECUTED) $(FIGURES) $(PROSE) $(LIBRARY) $(READY)
	@rm -rf build/_build $(filter-out $(EXECUTED),$(wildcard build/source/notebooks/*.ipynb))
	@mkdir -p $(RESULTS)
	@find build/source/book -mindepth 1 -maxdepth 1 ! -name results ! -name figures -exec rm -rf {} +
	@cp -R book batch _config.yml _toc.yml build/source/
	@# What the landing page shows, if its notebooks failed: the results that were committed.
	@cp -n book/readme/*.svg book/readme/*.md $(RESULTS)
	$(BIN)/python -m book.tools.claims page $(RESULTS)/claims.md
	$(BIN)/jupyter-book build --quiet -W --keep-going -n build/source --path-output build

book: $(BOOK)/index.html
	@echo "The book: file://$(CURDIR)/$(BOOK)/index.html"
	@$(BIN)/python -m book.tools.claims summary

test: $(READY) ## style, notebooks without outputs, the book and its claims, pytest (with browser tests)
	@printf '\n== Style\n'
	$(BIN)/ruff check .
	@printf '\n== Notebooks as committed\n'
	$(BIN)/pytest -q tests/test_notebooks.py
	@printf '\n== The book\n'
	@$(MAKE) book
	@printf '\n== Claims\n'
	@$(BIN)/python -m book.tools.claims check
	@printf '\n== Tests\n'
	@# Three at once on two cores, because some wait for a browser, for SLURM or for other processes. The longest files come
	@# first, or one process would wait for the others.
	@$(EMPTY_STORE); $(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests

test-long: $(READY) ## pytest with slow tests and with more, and random, examples of every property; every notebook as a job, and live
	@$(EMPTY_STORE); PERMASK_HYPOTHESIS=long $(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests
	@printf '\n== Notebooks as jobs\n'
	@$(EMPTY_STORE); PERMASK_DISPLAY=live $(MAKE) --no-print-directory batch GRID=tests/batch/every.yaml OUTPUT="$$store/jobs" STORE="$$store/runs" ARGS=--quiet
	@printf '\n== Notebooks live\n'
	@# Finished stages are those of the book, where it was built.
	@test -z '$(NOTEBOOKS)' || PERMASK_DISPLAY=live PERMASK_FIGURES=$(CURDIR)/build/live $(BIN)/pytest -q -n 2 --dist loadfile --nbval-lax --nbval-current-env $(NOTEBOOKS)

# A store of its own, removed when the line of the recipe ends.
EMPTY_STORE = set -e; store=$$(mktemp -d); trap 'rm -rf "$$store"' EXIT; export PERMASK_RUNS="$$store/runs" PERMASK_FIGURES="$$store/figures"; mkdir "$$store/figures"

replicate: $(READY) ## repeat every notebook with N other seeds and 3 kinds of arithmetic: make replicate N=10
	@$(BIN)/python -m book.tools.replicate $(or $(N),10)

lab: $(READY) ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. notebooks

zip: build/permask-book.zip ## pack the rendered book into build/permask-book.zip

build/permask-book.zip: $(BOOK)/index.html book/tools/pack.py
	$(BIN)/python book/tools/pack.py $(BOOK) $@

# Snakemake divides the cores among jobs itself: no -j2 of make's. ARGS go to Snakemake.
batch: $(READY) ## run a grid of runs: make batch GRID=smoke [OUTPUT=folder] [STORE=folder]; ARGS=-n lists its jobs and runs none
	@$(BIN)/snakemake -s batch/Snakefile --config "grid='$(GRID)'" $(if $(OUTPUT),"output='$(OUTPUT)'") $(if $(STORE),"store='$(STORE)'") $(ARGS)

readme: book ## bring the picture and the table in README.md up to date
	$(BIN)/python book/tools/readme.py

bench: $(READY) ## run the benchmarks, one after the other; that of the GPU where there is one
	@for script in $(filter-out $(if $(shell command -v nvidia-smi),,%_gpu.py),$(wildcard benchmarks/[!_]*.py)); do \
		printf '\n== %s\n' "$$script"; $(BIN)/python "$$script" || exit 1; \
	done

address: $(READY) ## set the repository's address: make address URL=https://github.com/owner/name (empty: none)
	$(BIN)/python book/tools/address.py "$(URL)"

clean: ## remove what was built, keep .venv
	rm -rf build

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile
