# poolgate: every task of the project. `make` alone lists them.
#
# Needs only make and Python 3.11 or newer. Everything else goes into $(VENV), a virtual environment of this folder:
#   VENV=/somewhere/else make up     moves it
#   PYTHON=python3.13 make up        picks the interpreter that makes it
# An install is skipped while pyproject.toml, the extras and the place of this folder are what they were.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
ARGS   ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The paths are quoted everywhere, and installs are checked by a stamp's content, not by make's own dependency
# rules: both so that folders with spaces in their names work.
py = "$(VENV)/bin/python"

.DEFAULT_GOAL := help
.PHONY: help up engine test engine-test browser browser-test installer-test debootstrap soak lint bench bench-peers clean venv install install-test

help: ## list the targets
	@echo 'poolgate: one OpenAI-compatible endpoint over a pool of GPU hosts'
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo
	@echo '  make up ARGS="--port 9000 --key my-own-test-key"    passes options to `poolgate up`'
	@echo '  VENV=/path make up                                  keeps the virtual environment elsewhere'

up: install ## start everything on this machine: stores, gateway, a node with a real engine
	@exec env POOLGATE_STOP_WITH_PARENT=1 $(py) -m gateway up $(ARGS)

engine: install ## build the CPU engine (2.7 GB on disk) and convert its model; skipped when they are there
	@exec $(py) -m nodes.agent.build --into "$(VENV)/engine" $(if $(filter engine,$(MAKECMDGOALS)),$(ARGS))

test: install-test ## run every test that needs no vLLM
	@exec $(py) -m pytest -m "not engine and not browser and not installer" $(ARGS)

engine-test: install-test engine ## run the tests against a real vLLM (builds the engine first)
	@exec $(py) -m pytest -m engine $(ARGS)

browser: ## install Debian's chromium with apt-get (as root); skipped when it is there
	@command -v chromium >/dev/null || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium >/dev/null; }

browser-test: install-test browser ## run the tests of pages in a real browser (installs it first)
	@exec $(py) -m pytest -m browser tests/browser $(ARGS)

debootstrap:
	@command -v debootstrap >/dev/null || { echo 'installing debootstrap with apt-get'; apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends debootstrap >/dev/null; }

installer-test: install-test debootstrap ## run the Linux installer in a clean Debian (as root; installs debootstrap)
	@exec $(py) -m pytest -m installer tests/installer $(ARGS)

soak: install-test ## run the long forms of the tests and write docs/soak.md (about an hour)
	@exec $(py) -m tests.soak $(ARGS)

lint: install-test ## ruff (rules and format) and mypy --strict
	@$(py) -m ruff check .
	@$(py) -m ruff format --check .
	@$(py) -m mypy

bench: install-test bench-peers ## measure what requests and streams cost, peers too, and write bench/RESULTS.md (about an hour and a half)
	@exec $(py) -m bench $(ARGS)

bench-peers: install-test ## install what poolgate is measured beside into .bench/, and nginx and h2load with apt-get (as root)
	@exec $(py) -m bench.peers

clean: ## remove caches and build products (keeps $(VENV) and data)
	@rm -rf .compiled* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find gateway nodes billing config tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the virtual environment -------------------------------------------------------------------------------------

venv:
	@if ! $(py) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			tried="$(or $(PYTHON),python3)"; \
			echo "poolgate needs Python 3.11 or newer; $$tried is $$("$$tried" --version 2>/dev/null | grep Python || echo "none")." >&2; \
			echo "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
		fi; \
		echo "making the virtual environment $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear "$(VENV)" || { \
			echo "The venv module is not whole: on Debian and Ubuntu, apt-get install python3-venv." >&2; exit 1; }; \
	fi

# $(call pip-install,STAMPS-THAT-SUFFICE,STAMP-TO-WRITE,WHAT): the stamp holds what was installed from, and where to.
define pip-install
@want="$$( { cat pyproject.toml; pwd -P; } | cksum )"; \
for stamp in $(1); do \
	if [ "$$(cat "$(VENV)/$$stamp" 2>/dev/null)" = "$$want" ]; then exit 0; fi; \
done; \
echo "installing poolgate's packages into $(VENV) (the first time takes about a minute)"; \
$(py) -m pip install --quiet -e '$(3)' && printf '%s\n' "$$want" > "$(VENV)/$(2)"
endef

install: venv
	$(call pip-install,.installed-test .installed,.installed,.[compile])
	@$(py) -m config.compiling

install-test: venv
	$(call pip-install,.installed-test,.installed-test,.[compile$(comma)test$(comma)bench])
	@$(py) -m config.compiling

comma := ,
