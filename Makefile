# Everything runs in .venv, made here with pip. A stamp file stands for each set of extras installed there, so that
# nothing is installed twice until pyproject.toml, constraints.txt or the C sources change.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
NATIVE := hatch_build.py $(wildcard src/moesaic/layer/kernels/native/csrc/*)
REQUIREMENTS := pyproject.toml constraints.txt $(NATIVE)
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt --editable
# DeepSpeed imports the torch of the environment while it builds. As an extra it would be built beside another torch.
DEEPSPEED := DS_BUILD_OPS=0 $(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation deepspeed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check lint format docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed-demo ## train a small MoE beside a dense model, sample from it, draw its routing
	$(BIN)/moesaic demo $(ARGS)

test: .venv/.installed-dev ## run the test suite; ARGS are handed to pytest
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

check: lint docs test ## everything that CI checks

lint: .venv/.installed-dev ## style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/.installed-dev ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/.installed-dev ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove the environment, caches and built files; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moesaic needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed-demo: .venv/.created $(REQUIREMENTS)
	@echo "Installing moesaic into .venv (PyTorch is large: the first time takes minutes)"
	$(INSTALL) .
	@touch $@

.venv/.installed-dev: .venv/.created $(REQUIREMENTS)
	@echo "Installing moesaic with its development tools into .venv (the first time takes minutes)"
	$(INSTALL) ".[train,lora,plots,analysis,eval,docs,dev]"
	$(DEEPSPEED) || echo "DeepSpeed can't be installed here: tests that compare with it will be skipped"
	@touch $@ .venv/.installed-demo
