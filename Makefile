# Each target installs its own requirements. Only Python 3.11 or later and make must be installed.
SHELL := /bin/sh
.DEFAULT_GOAL := help
# Without cached bytecode, most processes spend more time on compiling than on their work.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
PATRONI := .venv-patroni
WORKERS ?= 2
PYTEST = $(RUN)/python -m pytest -n $(WORKERS) --dist worksteal
REQUIREMENTS ?= requirements.txt
COMPILE := $(RUN)/uv pip compile pyproject.toml --extra embedded --extra tiger --extra archive --group dev --universal \
	--upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet

.PHONY: help setup demo test test-system test-docker test-slow test-settings test-lowest test-wheel
.PHONY: soak screenshots lint format schema bench bench-check bench-trail lock drills
.PHONY: migrate revision downgrade current history check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv, at the locked versions

# requirements.txt is also the constraints file, because pip would otherwise require a hash for the
# newest version of each package that is required with an extra.
$(READY): $(REQUIREMENTS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "tiger_db needs Python 3.11 or later" >&2; exit 1; }
	@echo "setting up $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r $(REQUIREMENTS) -c $(REQUIREMENTS)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## show accounts, API keys, events and refreshes in a real PostgreSQL
	@$(RUN)/python examples/demo.py

test: $(READY) ## run the tests (two minutes) on TIGER_DB_TEST_URL, else Docker, else the embedded PostgreSQL
	@$(PYTEST) $(ARGS)

test-system: $(READY) ## run the tests on the PostgreSQL that is installed on this machine
	@TIGER_DB_TEST_URL=system $(PYTEST) $(ARGS)

test-docker: $(READY) ## run the tests in a container: needs a Docker engine, which DOCKER_HOST can name
	@TIGER_DB_TEST_URL=docker $(PYTEST) $(ARGS)

test-slow: $(READY) ## run the slow tests, which take a quarter of a second or more each
	@$(PYTEST) -m slow $(ARGS)

test-settings: $(READY) ## run the tests as other users, with other Pythons and other PostgreSQLs (an hour)
	@ONLY="$(ONLY)" ARGS="$(ARGS)" $(RUN)/python -m tests.machine_settings

test-lowest: $(READY) ## run the tests with the lowest allowed versions of the dependencies
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) --resolution lowest-direct --output-file .venv-lowest.txt
	@$(MAKE) --no-print-directory test VENV=.venv-lowest REQUIREMENTS=.venv-lowest.txt

soak: $(READY) ## run the stress tests at their full length (minutes)
	@TIGER_DB_SOAK=1 $(PYTEST) -m "not wheel" tests/audit tests/refresh_worker/test_chaos.py tests/test_cancellation.py \
		tests/crud/token_status/test_index_use.py tests/crud/audit_logs/test_index_use.py $(ARGS)

drills: $(READY) $(PATRONI)/.ready ## run the drills of restores and failovers: needs PostgreSQL, pgbackrest and etcd
	@PATH="$(CURDIR)/$(PATRONI)/bin:$$PATH" $(RUN)/python -m pytest -m "drill or slow" tests/drills $(ARGS)

# The user postgres runs Patroni, and cannot enter the folder of root's own Python.
$(PATRONI)/.ready:
	@$(firstword $(wildcard /usr/bin/python3) $(PYTHON)) -m venv --clear $(PATRONI)
	@$(PATRONI)/bin/python -m pip install --quiet --disable-pip-version-check "patroni[etcd3]~=4.1" "psycopg[binary]~=3.3"
	@touch $@

test-wheel: $(READY) ## build the wheel, install it into an empty environment, and test it there
	@$(RUN)/python -m pytest -m wheel $(ARGS)

screenshots: $(READY) ## write the pictures of docs/dashboard.md: needs Chromium
	@TIGER_DB_SCREENSHOTS=1 $(RUN)/python -m pytest -m slow tests/examples/test_dashboard_browser.py

lint: $(READY) ## check style, types and the SQL of the migrations; changes nothing
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy
	@$(RUN)/python -m tests.squawk

format: $(READY) ## format the code, and fix its style
	@$(RUN)/ruff format .
	@$(RUN)/ruff check --fix .

schema: $(READY) ## write docs/schema.md from the models and the migrated database
	@$(RUN)/python -m tests.docs.schema

bench: $(READY) ## compare with plain asyncpg, and write benchmarks/RESULTS.md
	@$(RUN)/python -m benchmarks $(SIZES)

bench-check: $(READY) ## name the most important paths that are slower than in benchmarks/RESULTS.md
	@$(RUN)/python -m benchmarks.check

bench-trail: $(READY) ## load, seal and verify a million events, and write a section of benchmarks/RESULTS.md
	@$(RUN)/python -m benchmarks.trail

lock: $(READY) ## write the newest allowed versions of the dependencies to requirements.txt, with hashes
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) --output-file requirements.txt

migrate: $(READY) ## run the pending migrations of the database
	@$(RUN)/tiger-db migrate

revision: $(READY) ## write a migration from the models: make revision m="add a column"
	@$(RUN)/tiger-db revision -m "$(m)"

downgrade: $(READY) ## undo the last migration, or all after a revision: make downgrade r=REVISION
	@$(RUN)/tiger-db downgrade $(if $(r),$(r),-1)

current: $(READY) ## show the revision of the database
	@$(RUN)/tiger-db current

history: $(READY) ## show every migration
	@$(RUN)/tiger-db history

check: $(READY) ## list the differences between the models and the database
	@$(RUN)/tiger-db check

clean: ## remove .venv, caches and builds, but no data
	@rm -rf $(VENV) .venv-* dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
