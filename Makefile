# mmkit: one command each. `make` alone lists them; README.md has the plain commands behind every one.
.PHONY: help setup tour tuner lab test bench ledger clean
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV  := .venv
BIN   := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
DATA  ?=
OUT   ?= tour
JOBS  ?= 2
TESTS := tests $(foreach t,export structure chapters library,--ignore=tests/test_$(t).py)
say    = @printf '\n\033[1mmmkit\033[0m · %s\n'
# The first Python that is 3.10 or newer: yours if you name one (make tour PYTHON=/path/to/python3.12).
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)
tour tuner test bench ledger: export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

help:
	@echo 'make tour              run the tour on the procedural lesions; leaves a notebook and one HTML page in tour/'
	@echo 'make tour DATA=folder  the same on your own data set'
	@echo 'make tuner             a page with sliders on a model that trains; to this machine alone, Ctrl-C ends it'
	@echo 'make lab               open JupyterLab at the tour'
	@echo 'make setup             only set up .venv, as the first of the above does by itself'
	@echo 'make test              lint, every notebook and every test'
	@echo 'make bench             measured speeds, with machine, seed and command'
	@echo 'make ledger            measure the claims again (over an hour); make ledger ONLY=C24 for one, SEEDS=7 for more seeds'
	@echo 'make clean             remove what running left behind (.venv stays; make clean ALL=1 removes it too)'

setup: $(VENV)/.ready-tour

tour: $(VENV)/.ready-tour
	$(say) 'running nbs/index.ipynb$(if $(DATA), on $(DATA)); a few minutes on two cores'
	@$(BIN)/mmkit tour --out '$(OUT)' $(if $(DATA),--data '$(DATA)')

tuner: $(VENV)/.ready-tour
	$(say) 'serving the live tuner; Ctrl-C here ends it'
	@$(BIN)/mmkit tuner $(if $(PORT),--port $(PORT))

lab: $(VENV)/.ready-tour
	$(say) 'opening JupyterLab at nbs/index.ipynb; Ctrl-C twice here ends it'
	@$(BIN)/mmkit lab nbs $(if $(PORT),--port $(PORT))

# A part that fails does not keep the later ones from running; `make test` fails at the end.
FAILED := $(VENV)/.test-failed
test: $(VENV)/.ready-dev
	@rm -f $(FAILED)
	$(say) '1 of 5 · format and lint'
	@$(BIN)/ruff format --check nbs tests setup.py && $(BIN)/ruff check nbs tests setup.py || touch $(FAILED)
	$(say) '2 of 5 · is mmkit/ what the notebooks export, and in shape?'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests/test_export.py tests/test_structure.py || touch $(FAILED)
	$(say) '3 of 5 · every notebook, top to bottom; $(JOBS) at a time'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v -n $(JOBS) --maxschedchunk 1 --durations=20 tests/test_chapters.py tests/test_library.py || touch $(FAILED)
	$(say) '4 of 5 · the tests; $(JOBS) files at a time'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not alone' --durations=10 $(TESTS) || touch $(FAILED)
	$(say) '5 of 5 · in a browser; $(JOBS) files at a time'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m alone --durations=5 $(TESTS) || touch $(FAILED)
	@if [ -e $(FAILED) ]; then rm $(FAILED); echo 'mmkit: some part of the tests failed; see above'; exit 1; fi

bench: $(VENV)/.ready-dev
	$(say) 'measuring; close what else is running'
	@$(BIN)/python tests/bench/run.py $(ONLY)

ledger: $(VENV)/.ready-dev
	$(say) 'measuring claims; interrupt it when you like, the same command goes on'
	@$(BIN)/python tests/ledger/run.py $(ONLY) --seeds $(or $(SEEDS),5)

clean:
	$(say) 'removing builds, caches and the tour'
	rm -rf build dist *.egg-info tour runs .pytest_cache .hypothesis nbs/.last_checked
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
	$(if $(ALL),rm -rf $(VENV))

# ---- setting up, once; again only when a pin or a requirement changes --------------------------------------------
$(VENV)/bin/activate:
	@if [ -z '$(PYTHON)' ]; then \
	  echo 'mmkit needs Python 3.10 or newer, and found none on the PATH ('"$$(python3 --version 2>&1 || true)"').'; \
	  echo 'Install one, or name it: make tour PYTHON=/path/to/python3.12'; exit 1; fi
	$(say) "setting up $(VENV) with $$($(PYTHON) --version), once (two to five minutes, about 2 GB)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'Python could not make an environment. On Debian and Ubuntu: sudo apt install python3-venv'; exit 1; }

# torch first and alone. Without an NVIDIA card on Linux, its CPU build (0.2 GB) instead of the CUDA one (3 GB).
$(VENV)/.ready-torch: constraints.txt | $(VENV)/bin/activate
	$(say) '$(TORCH), and then the rest of constraints.txt'
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)"[7:])' 2>/dev/null; then \
	  echo '$(TORCH) is here already'; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(BIN)/pip install -qq -c constraints.txt '$(TORCH)+cpu' 2>/dev/null || \
	  $(BIN)/pip install -qq -c constraints.txt --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu '$(TORCH)+cpu' 2>/dev/null || \
	  $(BIN)/pip install -qq -c constraints.txt '$(TORCH)'; \
	else $(BIN)/pip install -qq -c constraints.txt '$(TORCH)'; fi
	@touch $@

$(VENV)/.ready-%: $(VENV)/.ready-torch constraints.txt settings.ini setup.py
	$(say) 'installing mmkit and what "make $*" needs'
	@$(BIN)/pip install -qq -c constraints.txt -e '.$(if $(filter-out tour,$*),[$*])'
	@touch $@
