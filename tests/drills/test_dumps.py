"""A dump is restored into a newer PostgreSQL, without its keys, or with an old sequence."""

import asyncio
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.support import factories
from tests.support.clusters import (
    Cluster,
    Server,
    first_server,
    has_caught_up,
    needs_postgresql,
    run,
    standby_of,
)
from tests.support.drills import Installation, run_command
from tests.support.private_servers import new_database
from tests.support.private_servers import server as embedded_server
from tiger_db import Database, KeyVerifier, Settings, audit, crud
from tiger_db.connections import maintenance_engine
from tiger_db.embedded.processes import find_wheel
from tiger_db.encryption import generate_key
from tiger_db.errors import EncryptionError, InvalidAPIKey
from tiger_db.migrations import upgrade

pytestmark = [needs_postgresql, pytest.mark.slow]


@dataclass
class Filled:
    """A server with accounts, an API key and a sealed trail."""

    server: Server
    settings: Settings
    account: UUID
    raw_key: str


@pytest.fixture
def primary(home: Path) -> Iterator[Server]:
    server = first_server(home)
    yield server
    server.stop()


@pytest.fixture
async def filled(primary: Server, installation: Installation) -> Filled:
    settings = installation.settings(primary)
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    async with Database(settings) as database:
        async with database.session() as session:
            account = await factories.account(session, private_key="the broker's key")
            _, raw_key = await factories.api_key(session)
            for _ in range(10):
                await factories.account(session)
        await audit.seal(database)
    return Filled(primary, settings, account.id, raw_key)


async def private_key_of(database: Database, account: UUID) -> str:
    async with database.session() as session:
        found = await crud.accounts.get(session, account)
        assert found is not None
        return factories.plain(found.private_key)


def restore_with_18(url: str, dump: str) -> None:
    """Restore a dump with the program of the embedded PostgreSQL."""
    program = find_wheel()[0] / "pginstall" / "bin" / "pg_restore"
    subprocess.run([program, "--no-owner", "--exit-on-error", "-d", url, dump], check=True)


async def test_a_dump_of_15_is_restored_into_18_and_loses_nothing(
    filled: Filled, installation: Installation
) -> None:
    # Only the pg_dump of the server omits the options of its columns.
    dump = str(filled.server.data.with_name("tiger.dump"))
    source = f"postgresql://tiger_db@{filled.server.location}/tiger_db"
    await asyncio.to_thread(run, "pg_dump", "-Fc", "-f", dump, "-d", source)
    with embedded_server() as server:
        created = await new_database(server)
        assert created.database_url is not None
        url = created.database_url.get_secret_value()
        await asyncio.to_thread(restore_with_18, url, dump)
        settings = installation.settings(database_url=url)
        checked = await asyncio.to_thread(run_command, settings, "check")
        assert checked.code == 0, checked.err
        async with Database(settings) as database:
            async with database.session() as session:
                assert str(await session.scalar(text("SHOW server_version"))).startswith("18")
                await factories.account(session)
            assert await private_key_of(database, filled.account) == "the broker's key"
            assert await KeyVerifier(database).verify(filled.raw_key)
            await audit.seal(database)  # a dump has the state of the sequence
            report = await audit.verify(database)
            assert (report.findings, report.warnings, report.unsealed) == ([], [], 0)


async def test_without_the_encryption_key_the_credentials_are_lost_and_can_be_replaced(
    filled: Filled,
) -> None:
    new = {"encryption_keys": SecretStr(f"{generate_key('new')}:v2")}
    settings = filled.settings.model_copy(update=new)
    doctor = await asyncio.to_thread(run_command, settings, "doctor", "--json")
    assert doctor.code == 1
    assert "to decrypt these rows, put k1 back into ENCRYPTION_KEYS" in doctor.out
    async with Database(settings) as database:
        with pytest.raises(EncryptionError, match="encryption key 'k1' is not configured"):
            await private_key_of(database, filled.account)
        async with database.session() as session:
            found = await crud.accounts.get(session, filled.account)
            assert found is not None
            found.private_key = "a new key"
        assert await private_key_of(database, filled.account) == "a new key"
        assert await KeyVerifier(database).verify(filled.raw_key)  # without this encryption key
        assert (await audit.verify(database)).sound


async def test_without_the_peppers_api_keys_are_refused_and_can_be_replaced(
    filled: Filled,
) -> None:
    new = {"api_key_peppers": SecretStr(generate_key("new"))}
    settings = filled.settings.model_copy(update=new)
    doctor = await asyncio.to_thread(run_command, settings, "doctor", "--json")
    assert doctor.code == 1
    assert "put k1 back into API_KEY_PEPPERS" in doctor.out
    async with Database(settings) as database:
        verifier = KeyVerifier(database)
        with pytest.raises(InvalidAPIKey):
            await verifier.authorize(filled.raw_key)
        async with database.session() as session:
            _, raw_key = await factories.api_key(session)
        assert await verifier.verify(raw_key)
        assert await private_key_of(database, filled.account) == "the broker's key"


async def test_a_standby_is_promoted_with_its_sequence_behind(
    filled: Filled, installation: Installation
) -> None:
    standby = standby_of(filled.server)
    try:
        await has_caught_up(Cluster(filled.server, standby))
        filled.server.stop()
        await asyncio.to_thread(standby.promote)
        await standby.sql("SELECT setval('audit_logs_position_seq', 1)")
        settings = installation.settings(standby)
        async with Database(settings) as database:
            async with database.session() as session:
                await factories.account(session)  # at a position that is sealed
            refused = await asyncio.to_thread(run_command, settings, "seal-audit")
            assert refused.code == 1
            assert "run `tiger-db seal-audit --repair-sequence`" in refused.err
            repaired = await asyncio.to_thread(
                run_command, settings, "seal-audit", "--repair-sequence"
            )
            assert (repaired.code, "moved the sequence" in repaired.err) == (0, True)
            async with database.session() as session:
                await factories.account(session)
            await audit.seal(database)
            report = await audit.verify(database)
            # The event before the repair has the position of another one. It stays a finding.
            assert [finding.kind for finding in report.findings] == [audit.FindingKind.DUPLICATE]
            assert report.unsealed == 0
    finally:
        standby.stop()
