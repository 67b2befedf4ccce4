# Works from a fresh clone with any target: the environment is made first, and made again when its pins change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DOMAIN ?= legal
DOMAINS ?=
SEEDS  ?=
ARGS   ?=
WORKERS ?= 2
BIN    := .venv/bin
READY  := .venv/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run study test docs lab bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'
	@echo '  e.g. make run DOMAIN=finance SEEDS=0,1,2 ARGS="--set epochs=4"'

run: $(READY) ## fine-tune DOMAIN freely, held to its base and on correct answers, evaluate all, write the executed notebook and the report
	$(BIN)/blockem run $(DOMAIN) $(if $(SEEDS),--set "seeds=$(SEEDS)") $(ARGS)

study: $(READY) ## find the latents on finance, then train freely, held and blocked in all six domains, one table of all
	$(BIN)/blockem study $(if $(SEEDS),--seeds "$(SEEDS)") $(if $(DOMAINS),--domains "$(DOMAINS)") $(ARGS)

test: export IN_TEST = 1
test: export HF_HUB_OFFLINE = 1
test: export TOKENIZERS_PARALLELISM = false
test: export OMP_NUM_THREADS = 1
test: $(READY) ## run every notebook as a test (WORKERS at a time), then pytest; needs no network
	$(BIN)/nbdev_test --n_workers $(WORKERS) --timing
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests $(ARGS)

docs: $(READY) ## render README.md and the site in _docs/, plots interactive, no network needed to read it
	$(BIN)/python docs/build.py readme
	$(BIN)/python docs/build.py site

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

bench: $(READY) ## time the steps that cost
	$(BIN)/blockem bench $(ARGS)

clean: ## remove the environment, the site and caches; runs/ stays
	rm -rf .venv _docs _proc .pytest_cache .hypothesis *.egg-info
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The second pip line finds nothing to do for a CPU build of torch; a CUDA build gets the CUDA libraries it pins.
$(READY): requirements.lock settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo 'no Python found; name one of 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "blockem needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --no-deps -r requirements.lock
	$(PIP) install --quiet -c requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
