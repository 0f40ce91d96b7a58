"""Restore with pgBackRest to a point in time in the middle of a load."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.docs.pages import blocks
from tests.support import factories
from tests.support.clusters import Server, first_server, needs_postgresql
from tests.support.drills import Installation, load, run_command
from tests.support.waiting import until
from tiger_db import AuditAction, Database, KeyVerifier, Settings, audit, crud
from tiger_db.audit.checkpoints import newest_checkpoint
from tiger_db.connections import connect, maintenance_engine
from tiger_db.errors import InvalidState
from tiger_db.migrations import upgrade

pytestmark = [
    needs_postgresql,
    pytest.mark.skipif(shutil.which("pgbackrest") is None, reason="needs pgbackrest"),
]
CONFIGURATION = """
[global]
repo1-path={home}/repository
repo1-retention-full=2
log-path={home}
lock-path={home}
spool-path={home}
start-fast=y
compress-type=zst
[tiger]
pg1-path={server.data}
pg1-port={server.port}
pg1-socket-path={home}
pg1-user=tiger_db
pg1-database=postgres
"""
TARGET = '--target="2026-11-29 17:43:34+00"'
ARCHIVING = """
archive_mode = on
archive_command = 'pgbackrest --config={home}/pgbackrest.conf --stanza=tiger archive-push %p'
"""


@dataclass
class Archived:
    """A server whose WAL pgBackRest archives."""

    home: Path
    server: Server

    def pgbackrest(self, *arguments: str) -> None:
        """Run a command of docs/backup.md."""
        command = " ".join(["pgbackrest", "--stanza=tiger", *arguments])
        command = re.sub(r"--target=\S+ \S+", TARGET, command)
        assert [text for _, text in blocks("docs/backup.md") if f"{command}\n" in text]
        done = subprocess.run(
            ["pgbackrest", f"--config={self.home}/pgbackrest.conf", "--stanza=tiger", *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            user="postgres" if os.geteuid() == 0 else None,
            extra_groups=[] if os.geteuid() == 0 else None,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, server: Server) -> None:
        server.start(unix_socket_directories=str(self.home))

    def restore(self, time: datetime) -> None:
        """Restore to a time, in place of the lost server, and start the server."""
        self.server.data.rename(self.home / "lost")
        target = time.astimezone(UTC).isoformat(sep=" ")
        self.pgbackrest("--type=time", f"--target={target}", "--target-action=promote", "restore")
        self.start(self.server)


@pytest.fixture
def archived(home: Path) -> Iterator[Archived]:
    server = first_server(home)
    made = Archived(home, server)
    try:
        server.stop()
        with (server.data / "postgresql.conf").open("a") as file:
            file.write(ARCHIVING.format(home=home))
        (home / "pgbackrest.conf").write_text(CONFIGURATION.format(home=home, server=server))
        made.start(server)
        made.pgbackrest("stanza-create")
        yield made
    finally:
        server.stop()


async def sealed_positions(settings: Settings) -> dict[int, set[int]]:
    """Return the positions that each seal covers."""
    connection = await connect(settings)
    rows = await connection.fetch("SELECT statement, signature, digests FROM audit_seals")
    await connection.close()
    payloads = [audit.Seal(*row).payload() for row in rows]
    return {
        payload.number: {at for first, last in payload.positions for at in range(first, last + 1)}
        for payload in payloads
    }


async def event_positions(settings: Settings) -> set[int]:
    connection = await connect(settings)
    rows = await connection.fetch("SELECT position FROM audit_logs")
    await connection.close()
    return {position for (position,) in rows}


@dataclass
class Before:
    """The seals and events of the server that is lost."""

    seals: dict[int, set[int]]
    events: set[int]


@pytest.mark.parametrize(
    "accounts",
    [pytest.param(40, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.drill)],
)
async def test_a_restore_to_a_point_in_time(
    archived: Archived, installation: Installation, accounts: int
) -> None:
    settings = installation.settings(archived.server)
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    async with Database(settings) as database, database.session() as session:
        account = await factories.account(session, private_key="the broker's key")
        _, raw_key = await factories.api_key(session)
    await asyncio.to_thread(archived.pgbackrest, "--type=full", "backup")
    # pgBackRest restores a backup only if it ended in an earlier second than the target.
    earliest = datetime.now(UTC) + timedelta(seconds=1)

    async with load(settings) as running:
        await until(lambda: running.has_written(accounts) and running.sealed >= 2, 300)
        await until(lambda: datetime.now(UTC) > earliest)
        point = datetime.now(UTC)
        await until(partial(running.has_written, 2 * len(running.acknowledged)), 300)
        await until(partial(running.has_sealed, running.sealed + 2))
    assert running.refused == []
    before = Before(await sealed_positions(settings), await event_positions(settings))
    await archived.server.sql("SELECT pg_switch_wal()")
    await asyncio.to_thread(archived.pgbackrest, "check")  # waits for the archive
    archived.server.stop()
    await asyncio.to_thread(archived.restore, point)
    await until(partial(archived.server.sql, "SELECT NOT pg_is_in_recovery()"))

    checked = await asyncio.to_thread(run_command, settings, "check")
    assert checked.code == 0, checked.err
    async with Database(installation.settings(archived.server)) as database:
        async with database.session() as session:
            found = await crud.accounts.get(session, account.id)
            assert found is not None
            assert factories.plain(found.private_key) == "the broker's key"
            numbers = set(await session.scalars(text("SELECT account_number FROM tiger_accounts")))
        assert await KeyVerifier(database).verify(raw_key)
        for number, (begun, ended) in running.acknowledged.items():
            assert number in numbers or ended >= point
            assert number not in numbers or begun <= point
        lost = await assert_the_loss_is_named(database, before)
        await assert_sealing_goes_on(database, lost, accounts)


async def assert_the_loss_is_named(database: Database, before: Before) -> tuple[int, int]:
    """Assert that `verify` names exactly the seals that are gone. Return the first and last."""
    kept, events = (
        await sealed_positions(database.settings),
        await event_positions(database.settings),
    )
    assert events <= before.events
    first, last = max(kept, default=0) + 1, max(before.seals)
    assert before.seals == kept | {
        number: before.seals[number] for number in range(first, last + 1)
    }
    assert last - first >= 1
    covered = set[int]().union(*(before.seals[number] for number in range(first, last + 1)))
    # The events that are gone follow all others, so that one position tells them.
    assert covered - events == {position for position in covered if position > max(events)}
    report = await audit.verify(database)
    (finding,) = report.findings
    assert finding.message == (
        f"the seals from {first} to {last} are missing, according to the checkpoint: positions from"
        f" {max(set().union(*kept.values())) + 1} to {max(covered)} were sealed there; the newest"
        f" event is at position {max(events)}"
    )
    assert report.unsealed == len(events) - sum(map(len, kept.values()))
    return first, last


async def assert_sealing_goes_on(database: Database, lost: tuple[int, int], accounts: int) -> None:
    settings = database.settings
    assert settings.audit_checkpoints is not None
    old = newest_checkpoint(settings.audit_checkpoints)
    async with database.session() as session:  # writers do not wait for the recorded step
        await factories.account(session)
    with pytest.raises(InvalidState, match="the newest seals are missing"):
        await audit.seal(database)
    step = await asyncio.to_thread(run_command, settings, "seal-audit", "--after-restore")
    assert step.code == 0, step.err
    assert f"the seals from {lost[0]} to {lost[1]} are lost by a restore, which" in step.err
    async with load(settings) as running:
        await until(lambda: running.has_written(accounts) and running.sealed >= 2, 300)
    assert running.refused == []
    await audit.seal(database)
    report = await audit.verify(database, checkpoint=old)
    assert (report.findings, report.unsealed) == ([], 0)
    (warning,) = report.warnings
    assert f"the seals from {lost[0]} to {lost[1]} are lost by a restore" in warning.message
    assert "was lost by a restore" in report.basis[-1]
    async with database.session() as session:
        action = AuditAction.SYSTEM_AUDIT_RESTORE
        assert len((await crud.audit_logs.search(session, action=action)).items) == 1
    verified = await asyncio.to_thread(run_command, settings, "verify-audit")
    assert verified.code == 0, verified.err
