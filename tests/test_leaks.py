"""No secrets in the database's files, dumps, the server's log and error messages."""

import asyncio
import base64
import os
import re
import subprocess
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.embedded_servers import discard, reachable_folder, settings_for
from tests.support.encryption_keys import K1, K2
from tests.support.factories import plain
from tiger_db import (
    APIKeyScope,
    AuditAction,
    AuditLog,
    Database,
    Settings,
    crud,
    embedded,
    encryption_key_rotation,
)
from tiger_db.connections import connect, maintenance_engine
from tiger_db.crud import accounts
from tiger_db.embedded import EmbeddedServer
from tiger_db.errors import AlreadyExists, DatabaseUnavailable, InvalidValue
from tiger_db.migrations import upgrade

FIELDS = ("tiger_id", "private_key", "secret_key", "access_token", "refresh_token")
FIRST = {name: f"first-{name}-of-nobody" for name in FIELDS}
SECOND: dict[str, Any] = {name: f"second-{name}-of-nobody" for name in FIELDS}
THIRD = {name: f"third-{name}-of-nobody" for name in FIELDS}
PUBLIC = "51230321"  # what must be found, or nothing was looked at
SEEN = "an order of nobody"  # the same of events

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Witness:
    """A server that has logged everything, and what was raised meanwhile."""

    server: EmbeddedServer
    settings: Settings
    secrets: list[str]
    raised: list[str]

    def assert_safe(self, content: bytes) -> None:
        for secret in self.secrets:
            raw = secret.encode()
            assert raw not in content, secret
            assert raw.hex().encode() not in content.lower(), secret
            assert base64.b64encode(raw)[: len(raw)] not in content, secret


@pytest.fixture(scope="module")
def witness() -> Iterator[Witness]:
    with reachable_folder() as base:
        settings = settings_for(base / "home")
        server = embedded.start(settings)
        secrets, raised = asyncio.run(live(settings))
        yield Witness(server, settings, secrets, raised)
        discard(base / "home")


async def live(settings: Settings) -> tuple[list[str], list[str]]:
    """Do all that touches a secret; tell the secrets, and what was raised."""
    admin = await connect(settings, database="postgres")
    for name, value in {
        "log_statement": "all",
        "log_error_verbosity": "verbose",
        "log_parameter_max_length_on_error": "-1",
    }.items():
        await admin.execute(f"ALTER SYSTEM SET {name} = '{value}'")
    await admin.execute("SELECT pg_reload_conf()")
    await admin.execute(f'CREATE DATABASE "{settings.database}"')
    await admin.close()
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    raised: list[str] = []
    async with Database(settings, key_provider=K1) as database:
        async with database.session() as session:
            account = await factories.account(session, account_number=PUBLIC, **FIRST)
            key, raw_key = await crud.api_keys.create_api_key(
                session, name="key", scopes=[APIKeyScope.MCP_READ], tiger_account_id=account.id
            )
        async with database.session() as session:
            assert await crud.api_keys.verify_api_key(session, raw_key)
            _, successor = await crud.api_keys.rotate(session, key.id)
            await accounts.update(session, account.id, **SECOND)
            await accounts.update_tokens(
                session,
                account.id,
                access_token=THIRD["access_token"],
                refresh_token=THIRD["refresh_token"],
            )
            await accounts.record_error(session, account.id, message=f"{THIRD} {raw_key}")
            told: dict[str, Any] = {"of": SEEN, "keys": [raw_key], "deep": {"secret_key": FIRST}}
            event = AuditLog(action=AuditAction.TRADE_PLACE_ORDER, details=told)
            await crud.audit_logs.log_events(session, [event])
            await crud.audit_logs.record_event(session, action=event.action, new_values=told)
            assert await accounts.list_by_tiger_id(session, SECOND["tiger_id"])
            claim = await factories.claim(session, of=account)
            await crud.token_status.complete(session, claim, access_token="fourth-token-of-nobody")
        for refused, error in (
            ({"account_number": PUBLIC, **FIRST}, AlreadyExists),
            ({"status": "closed", **FIRST}, InvalidValue),
        ):
            with pytest.raises(error) as caught:
                async with database.session() as session:
                    await factories.account(session, **refused)
            raised.append("".join(traceback.format_exception(caught.value)))
        raised.append(await cut_off(database))
    async with Database(settings, key_provider=K2) as database:
        assert (await encryption_key_rotation.rotate(database)).rotated == 1
        async with database.session() as session:
            stored = await accounts.get(session, account.id)
            assert stored is not None
            assert plain(stored.private_key) == SECOND["private_key"]
            await accounts.close(session, account.id)
    given = {*FIRST.values(), *SECOND.values(), THIRD["access_token"], THIRD["refresh_token"]}
    return [*given, "fourth-token-of-nobody", raw_key[-64:], successor[-64:]], raised


async def cut_off(database: Database) -> str:
    """What is raised where the connection is lost in the middle of storing secrets."""

    async def store() -> None:
        async with database.session() as session:
            await factories.account(session, **FIRST)

    async with database.session() as session:
        await session.execute(text("LOCK TABLE tiger_accounts"))
        task = asyncio.create_task(store())
        async with asyncio.timeout(30):
            while not await session.scalar(
                text(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
            ):
                await session.execute(text("SELECT pg_stat_clear_snapshot()"))
                await asyncio.sleep(0.01)
        with pytest.raises(DatabaseUnavailable) as caught:
            await task
    return "".join(traceback.format_exception(caught.value))


def test_errors_contain_no_secret(witness: Witness) -> None:
    assert len(witness.raised) == 3
    for shown in witness.raised:
        witness.assert_safe(shown.encode())


@pytest.mark.parametrize("format_", ["plain", "custom", "directory", "plain --inserts"])
def test_a_dump_contains_no_secret(witness: Witness, tmp_path: Path, format_: str) -> None:
    programs = Path(psutil.Process(witness.server.pid).exe()).parent
    arguments = witness.server.connect_args(witness.settings)
    dump = tmp_path / "dump"
    subprocess.run(
        [
            programs / "pg_dump", "--compress=0", "--format", *format_.split(), "--file", dump,
            "--host", witness.server.socket_folder, "--username", arguments["user"],
            witness.settings.database,
        ],
        check=True,
        env={**os.environ, "PGPASSWORD": arguments["password"].get_secret_value()},
    )  # fmt: skip
    content = contents(dump)
    assert PUBLIC.encode() in content
    assert SEEN.encode() in content
    witness.assert_safe(content)


def test_the_files_of_the_server_contain_no_secret(witness: Witness) -> None:
    content = contents(witness.server.folder / "data")  # tables, indexes, write-ahead log
    assert PUBLIC.encode() in content
    assert SEEN.encode() in content
    witness.assert_safe(content)


def test_the_log_of_all_statements_contains_no_secret(witness: Witness) -> None:
    content = (witness.server.folder / "log").read_bytes()
    assert re.search(rb"INSERT INTO tiger_accounts", content)
    assert re.search(rb"parameters: \$1 = ", content, re.IGNORECASE)
    assert PUBLIC.encode() in content
    assert SEEN.encode() in content
    assert b"ck_tiger_accounts_credentials_unless_closed" in content
    witness.assert_safe(content)


def contents(path: Path) -> bytes:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return b"\n".join(file.read_bytes() for file in files if file.is_file())
