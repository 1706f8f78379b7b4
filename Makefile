# On a fresh machine, run `make reproduce` or `make test`. Both set up the environment if needed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
# Puts the environment's tools on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Cached bytecode halves the start-up time of a stage.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := pytest --numprocesses logical --maxprocesses 4

.PHONY: reproduce reproduce-all test test-fast test-all lint format ui serve setup docs lock clean help team-up team-down team-backup team-restore

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

reproduce: setup ## run the whole pipeline on the offline demo and write a report
	@python -m flows.reproduce

reproduce-all: setup ## run the pipeline with every ablation, for all tables of the paper
	@python -m flows.reproduce --all

test: setup ## run the unit and integration tests
	@$(PYTEST) -m "not system"

test-fast: setup ## run the unit tests that are not marked slow
	@$(PYTEST) -m "not slow and not integration and not system"

# System tests wait for servers for a fifth of their time, so there is a worker more than cores.
test-all: setup ## run all tests, with coverage
	@coverage erase
	@status=0; $(PYTEST) -p tests.measured --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 5 \
		|| status=$$?; coverage combine --quiet; coverage report --skip-covered || status=$$?; exit $$status

lint: setup ## run ruff, ruff format, import-linter and mypy
	@ruff check .
	@ruff format --check .
	@lint-imports
	@mypy

format: setup ## fix and format with ruff
	@ruff check --fix .
	@ruff format .

ui: setup ## serve Prefect and MLflow and print their addresses
	@python -m flows.ui

serve: setup ## serve Prefect and MLflow, with forms that start reproductions and sweeps
	@python -m flows.serve

setup: $(VENV)/.installed ## create or update .venv from requirements.lock

$(VENV)/.installed: requirements.lock pyproject.toml infra/setup.sh infra/uv.txt
	@bash infra/setup.sh $(VENV)
	@touch $@

docs: setup ## generate docs/params.md from the configuration types
	@python -m lotlip.config.reference

lock: setup ## update requirements.lock, with hashes and without registry addresses
	@uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --upgrade \
		--quiet --custom-compile-command "make lock" --output-file requirements.lock
	@for image in servers services; do \
		uv pip compile infra/images/$$image.in --constraint requirements.lock --universal --python-version 3.11 \
			--generate-hashes --no-annotate --quiet --custom-compile-command "make lock" \
			--output-file infra/images/$$image.txt; \
	done

# With Docker: COMPOSE="docker compose". Its services are in docs/team.md.
COMPOSE ?= podman-compose
TEAM := $(COMPOSE) --file infra/compose.yaml --env-file infra/local/settings.env
TEAM_EXEC := $(TEAM) exec -T backup bash /etc/lotlip/run.sh bash /etc/lotlip/backup.sh

team-up: ## start a team's servers with podman-compose, or COMPOSE="docker compose"
	@bash infra/team/init.sh $(HOST)
	@$(TEAM) up --build --detach

team-down: ## stop the team's servers; their data stays
	@$(TEAM) down

team-backup: ## dump the team's databases now
	@$(TEAM_EXEC) once

team-restore: ## restore the dump NAME into empty databases; without NAME, list the dumps
	@$(TEAM_EXEC) $(if $(NAME),restore '$(NAME)',list)

clean: setup ## remove outputs of stages and scratch files, but not your files, .venv and DVC's cache
	@python -m flows.clean
