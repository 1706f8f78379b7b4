# Two commands do everything on a fresh machine: `make reproduce` and `make test`. Both set up what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
# Tools and stages find one another by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compiled modules are worth keeping: a stage starts in half the time.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := pytest --numprocesses logical --maxprocesses 4

.PHONY: reproduce reproduce-all test test-fast test-all lint format ui serve setup docs lock clean help

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

reproduce: setup ## run the whole pipeline on the offline demo; ends with a report
	@python -m flows.reproduce

reproduce-all: setup ## the same with every ablation, for all tables of the paper
	@python -m flows.reproduce --all

test: setup ## pass the unit and integration tests, and a smoke test of each system
	@$(PYTEST) -m "not system or smoke"

test-fast: setup ## pass the unit tests, in a minute or two
	@$(PYTEST) -m "not integration and not system"

test-all: setup ## pass all tests, with coverage
	@$(PYTEST) --cov --cov-report=term:skip-covered

lint: setup ## ruff, ruff format, import-linter, mypy
	@ruff check .
	@ruff format --check .
	@lint-imports
	@mypy

format: setup ## let ruff mend what it can
	@ruff check --fix .
	@ruff format .

ui: setup ## show Prefect and MLflow, and print both addresses
	@python -m flows.ui

serve: setup ## show both, with forms that start reproductions and sweeps
	@python -m flows.serve

setup: $(VENV)/.installed ## make .venv from the lock; nothing when nothing changed

$(VENV)/.installed: requirements.lock pyproject.toml infra/setup.sh infra/uv.txt
	@bash infra/setup.sh $(VENV)
	@touch $@

docs: setup ## write docs/params.md from the configuration types
	@python -m lotlip.config.reference

lock: setup ## resolve the dependencies anew, with hashes and without any registry's address
	@uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --upgrade \
		--quiet --custom-compile-command "make lock" --output-file requirements.lock

clean: setup ## remove what stages wrote, and scratch; your files, the environment and DVC's cache stay
	@python -m flows.clean
