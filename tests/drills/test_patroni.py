"""Failover under Patroni, while writers, verifiers, refresh workers and a sealer run."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.clusters import LOOPBACK, needs_postgresql, run
from tests.support.drills import Installation, Load, load
from tests.support.patroni import MISSING, Node, PatroniCluster, patroni_cluster
from tests.support.waiting import until
from tiger_db import Database, KeyVerifier, RefreshWorker, Settings, audit, crud
from tiger_db.connections import maintenance_engine
from tiger_db.errors import AccessDenied, DatabaseUnavailable
from tiger_db.migrations import upgrade
from tiger_db.testing import FakeBroker

pytestmark = [
    needs_postgresql,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: see `make drills`"),
]
WRITERS = 8


@dataclass
class Callers:
    """Callers whose keys are revoked, and accounts whose tokens are due."""

    database: Database
    revoked: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)  # Revoked keys that a verifier accepted.
    refused: int = 0
    due: int = 0

    async def revoke_keys(self) -> None:
        while True:
            with suppress(DatabaseUnavailable):
                async with self.database.session() as session:
                    key, raw_key = await factories.api_key(session)
                async with self.database.session() as session:
                    await crud.api_keys.revoke(session, key.id, reason="leaked")
                self.revoked.append(raw_key)
            await asyncio.sleep(0.1)

    async def use_revoked_keys(self, verifier: KeyVerifier) -> None:
        while True:
            for raw_key in self.revoked[-20:]:
                try:
                    await verifier.authorize(raw_key)
                except AccessDenied:
                    self.refused += 1
                except DatabaseUnavailable:
                    await asyncio.sleep(0.01)
                else:
                    self.accepted.append(raw_key)
            await asyncio.sleep(0.01)

    async def make_tokens_due(self) -> None:
        while True:
            with suppress(DatabaseUnavailable):
                async with self.database.session() as session:
                    await factories.refresh(session)
                self.due += 1
            await asyncio.sleep(0.1)


@asynccontextmanager
async def callers(settings: Settings, broker: FakeBroker) -> AsyncIterator[Callers]:
    async with (
        Database(settings) as database,
        KeyVerifier(database) as reading,
        KeyVerifier(database, memory=True) as remembering,
    ):
        made = Callers(database)
        workers = [
            RefreshWorker(database, broker, name=f"worker-{number}", per_minute=10**6)
            for number in range(2)
        ]
        tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (
                made.revoke_keys(),
                made.make_tokens_due(),
                made.use_revoked_keys(reading),
                made.use_revoked_keys(remembering),
                *(worker.run() for worker in workers),
            )
        ]
        try:
            yield made
        finally:
            ended = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in ended:
                task.result()


async def kill(cluster: PatroniCluster, primary: Node) -> None:
    await asyncio.to_thread(primary.kill)
    (primary.server.data / "postmaster.pid").unlink(missing_ok=True)


async def pause(cluster: PatroniCluster, primary: Node) -> None:
    await asyncio.to_thread(primary.signal, signal.SIGSTOP)


async def switch_over(cluster: PatroniCluster, primary: Node) -> None:
    asked = {"leader": primary.name, "candidate": cluster.other(primary).name}
    status, answer = await asyncio.to_thread(primary.ask, "switchover", asked)
    assert status == 200, answer


async def promoted(node: Node) -> bool:
    with suppress(DatabaseUnavailable):
        return bool(await node.server.sql("SELECT NOT pg_is_in_recovery()"))
    return False


async def go_through(cluster: PatroniCluster, running: Load, way: str) -> str:
    """Replace the primary, and wait until both servers are there again. Return the figures."""
    primary = await asyncio.to_thread(cluster.primary)
    standby = cluster.other(primary)
    await until(partial(asyncio.to_thread, standby.is_synchronous), 90)
    begun = time.monotonic()
    await {"kill": kill, "pause": pause, "switchover": switch_over}[way](cluster, primary)
    await until(partial(promoted, standby), 90)
    at_promotion, written = time.monotonic(), len(running.acknowledged)
    await until(partial(running.has_written, written + 1), 90)
    back = time.monotonic() - at_promotion
    await until(partial(running.has_written, written + 100), 90)
    if way == "kill":
        await asyncio.to_thread(primary.start)
    elif way == "pause":
        await asyncio.to_thread(primary.signal, signal.SIGCONT)
    await until(partial(asyncio.to_thread, primary.is_synchronous), 120)
    await until(partial(running.has_written, len(running.acknowledged) + 100), 90)
    return f"{way}: promoted after {at_promotion - begun:.1f} s, writes back {back:.2f} s later"


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(["switchover"], marks=pytest.mark.slow),
        pytest.param(["kill", "pause", "switchover"], marks=pytest.mark.drill),
    ],
    ids=len,
)
async def test_a_failover_loses_nothing(
    home: Path, installation: Installation, ways: list[str]
) -> None:
    broker = FakeBroker()
    with patroni_cluster(home) as cluster:
        servers = [node.server for node in cluster.nodes]
        first = cluster.nodes[0].server
        run("createdb", "-h", LOOPBACK, "-p", str(first.port), "-U", "tiger_db", "tiger_db")
        settings = installation.settings(*servers, db_query_timeout=5)
        async with maintenance_engine(settings) as engine:
            await upgrade(engine)
        async with load(settings, writers=WRITERS) as running, callers(settings, broker) as made:
            await until(partial(running.has_written, 100))
            for way in ways:
                print(await go_through(cluster, running, way))  # noqa: T201  # the figures
            refused = made.refused
            await until(lambda: made.refused > refused)
        print(f"{len(running.acknowledged)} writes, {len(made.revoked)} revoked keys"  # noqa: T201
              f" refused {made.refused} times, {len(broker.requests)} refreshes")  # fmt: skip
        async with Database(settings) as database:
            async with database.session() as session:
                kept = set(await session.scalars(text("SELECT account_number FROM tiger_accounts")))
            await audit.seal(database)
            report = await audit.verify(database)
    assert running.acknowledged.keys() <= kept
    assert made.accepted == []
    asked = [(account.id, factories.plain(account.access_token)) for account in broker.requests]
    assert len(asked) >= 1
    assert len({*asked}) == len(asked)  # no refresh ran twice
    assert running.refused == []
    assert (report.findings, report.unsealed) == ([], 0)
