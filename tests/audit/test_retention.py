"""Creation of months ahead of time, and retirement of sealed months."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import select
from sqlmodel import col

from tests.support import factories
from tests.support.months import month, partition, put
from tests.support.trail import stored_events
from tests.support.waiting import WAITING_LOCKS, until
from tiger_db import Actor, AuditAction, AuditLog, Database, Settings, acting_as, audit, crud
from tiger_db.audit import FindingKind, retention
from tiger_db.audit.months import sealed_events
from tiger_db.audit.seal_format import Seal
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.errors import ConfigurationError, DatabaseUnavailable, InvalidState
from tiger_db.health import check_readiness
from tiger_db.migrations import MONTHS_AHEAD
from tiger_db.signing import generate_signing_key

QUERY = AuditAction.DATA_QUERY
KEPT = 12  # months


@pytest.fixture
def signing(clone_settings: Settings) -> Settings:
    key = SecretStr(generate_signing_key())
    return clone_settings.model_copy(update={"audit_signing_key": key})


@pytest.fixture
def keeping(signing: Settings) -> Settings:
    return signing.model_copy(update={"audit_retention_months": KEPT})


@pytest.fixture
async def database(signing: Settings) -> AsyncIterator[Database]:
    """A database of this test's own, with a key that signs, in which months never leave."""
    async with Database(signing) as database:
        yield database


@pytest.fixture
async def keeper(keeping: Settings) -> AsyncIterator[Database]:
    """The same, in which they leave after a year."""
    async with Database(keeping) as database:
        yield database


@pytest.fixture
async def other(signing: Settings) -> AsyncIterator[Connection]:
    """A connection of a superuser, without tiger_db."""
    connection = await connect(signing)
    yield connection
    await connection.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise, `maintain` would wait for nine seconds before it gives up.
    monkeypatch.setattr("tiger_db.audit.retention._LOCK_ATTEMPTS", 2)
    monkeypatch.setattr("tiger_db.audit.retention._RETRY_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr("tiger_db.audit.retention._LOCK_TIMEOUT", "200ms")


async def partitions(connection: Connection) -> dict[str, int]:
    """All of them, with the number of their events."""
    names = await connection.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits"
        " WHERE inhparent = 'audit_logs'::regclass ORDER BY 1"
    )
    return {name: await connection.fetchval(f"SELECT count(*) FROM {name}") for (name,) in names}


async def contents(connection: Connection) -> dict[int, str]:
    events = await stored_events(connection)
    assert len(events) == len(dict(events))
    return dict(events)


async def assert_clean(database: Database, **counts: int) -> None:
    found = await audit.verify(database)
    assert found.findings == []
    assert {name: getattr(found, name) for name in counts} == counts


def uuid7_at(moment: datetime) -> UUID:
    return UUID(int=(int(moment.timestamp() * 1000) << 80) | (uuid4().int & ((1 << 80) - 1)))


class Writers:
    """Concurrent writers that must not fail; with `strays`, one has a wrong clock."""

    def __init__(self, database: Database, *, strays: bool = False) -> None:
        self.database = database
        self._how = [self._logs, self._logs, self._records, self._copies]
        self._how += [self._strays] if strays else []
        self.written: set[UUID] = set()
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for how in self._how:
            self._tasks.append(asyncio.create_task(self._loop(how)))
        await self.more()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def more(self, count: int = 50) -> None:
        enough = len(self.written) + count

        async def written() -> bool:
            assert not any(task.done() for task in self._tasks)
            return len(self.written) >= enough

        await until(written)

    async def _loop(self, how: Callable[[], Awaitable[set[UUID]]]) -> None:
        while not self._over.is_set():
            self.written |= await how()

    async def _logs(self) -> set[UUID]:
        async with self.database.session() as session:
            return {(await crud.audit_logs.log_event(session, action=QUERY)).id for _ in range(2)}

    async def _records(self) -> set[UUID]:
        async with self.database.session() as session:
            return {(await crud.audit_logs.record_event(session, action=QUERY)).id}

    async def _copies(self) -> set[UUID]:
        events = [factories.new_event() for _ in range(5)]
        async with self.database.session() as session:
            await crud.audit_logs.log_events(session, events)
        return {event.id for event in events}

    async def _strays(self) -> set[UUID]:
        """Of a machine whose clock is a year and a month back."""
        then = datetime.now(UTC) - timedelta(days=396)
        event = AuditLog(id=uuid7_at(then), action=QUERY)
        async with self.database.session() as session:
            session.add(event)
        return {event.id}


# Months ahead, and strays


@pytest.mark.slow
async def test_missing_months_are_created(database: Database, other: Connection) -> None:
    before = await partitions(other)
    for ahead in (1, 5, MONTHS_AHEAD):
        await other.execute(f"DROP TABLE {partition(-ahead)}")
    assert await audit.maintain(database) == audit.Maintenance(made=3)
    assert await partitions(other) == before
    assert await audit.maintain(database) == audit.Maintenance()
    assert (await check_readiness(database.settings)).problems == []


@pytest.mark.slow
async def test_events_move_into_new_months_while_others_write(
    database: Database, other: Connection
) -> None:
    await other.execute(f"DROP TABLE {partition(-1)}")
    await put(other, 12 * 20, 2)  # for which nobody makes a month
    for ago in (14, 13, 12):
        await put(other, ago)
    await put(other, -1, now=True)
    assert (await partitions(other))["audit_logs_default"] == 14
    assert (await audit.seal(database)).rows == 14
    await put(other, 11, now=True)  # not sealed
    await assert_clean(database, rows=14, unsealed=3)
    before = await contents(other)
    async with Writers(database, strays=True) as writers:
        assert await audit.maintain(database) == audit.Maintenance(made=5)
        await writers.more()
        assert (await audit.verify(database)).findings == []
    found = await partitions(other)
    assert [found[partition(ago)] for ago in (14, 12, 11, -1)] == [3, 3, 3, 3]
    assert found[partition(13)] > 3
    assert found["audit_logs_default"] == 2
    after = await contents(other)
    assert {position: after[position] for position in before} == before
    async with database.session() as session:
        ids = {*await session.scalars(select(col(AuditLog.id)))}
    assert writers.written <= ids
    assert len(ids) == len(before) + len(writers.written)
    await audit.seal(database)
    await assert_clean(database, rows=len(ids), unsealed=0)


async def waits(connection: Connection) -> bool:
    """Return whether a transaction waits for a lock on `audit_logs`."""
    return bool(
        await connection.fetchval(
            f"SELECT count(*) FROM {WAITING_LOCKS} AND relation = 'audit_logs'::regclass"
        )
    )


@pytest.mark.parametrize("how", ["verify", "export"])
async def test_verification_finds_events_that_move_meanwhile(
    database: Database, other: Connection, tmp_path: Path, how: str
) -> None:
    await put(other, 13)
    await audit.seal(database)
    path = tmp_path / "trail.jsonl"

    async def check() -> audit.Verification:
        if how == "verify":
            return await audit.verify(database)
        path.write_text("".join([line async for line in audit.export(database)]))
        key = await audit.required_key(database)
        return await audit.verify_export(path, keys=[key.public_key()])

    mover = await connect(database.settings)
    transaction = mover.transaction()
    await transaction.start()
    assert await mover.fetchval(f"SELECT make_audit_months({MONTHS_AHEAD})") == 1
    checking = asyncio.create_task(check())
    await until(lambda: waits(other))
    await transaction.commit()
    found = await checking
    assert (found.findings, found.rows) == ([], 3)
    await mover.close()


@pytest.mark.slow
@pytest.mark.parametrize("later", [0, 1.2])  # before and after who waits looks for deadlocks
async def test_a_writer_of_an_old_event_is_no_deadlock_victim(
    database: Database, other: Connection, later: float
) -> None:
    """It has written in this month when the move begins, and out of it while that waits."""
    await other.execute(f"DROP TABLE {partition(-1)}")
    await put(other, 13)
    writer = await connect(database.settings)
    transaction = writer.transaction()
    await transaction.start()
    await put(writer, 0, now=True)
    maintaining = asyncio.create_task(audit.maintain(database))
    await until(lambda: waits(other))
    await asyncio.sleep(later)
    await put(writer, 13, now=True, minute=1)
    await transaction.commit()
    assert (await maintaining).made == 2
    assert (await partitions(other))["audit_logs_default"] == 0
    await writer.close()


# Months that leave


async def seal_five_months(database: Database, connection: Connection) -> None:
    """Three of which are old enough to leave."""
    for ago in (12, 13, 14, 15, 0):
        await put(connection, ago)
    assert (await audit.maintain(database)).made == 4
    assert (await audit.seal(database)).rows == 15


async def retirements(connection: Connection) -> list[str]:
    rows = await connection.fetch("SELECT statement, signature, digests FROM audit_seals")
    months = [Seal(*row).payload().retired for row in rows]
    return sorted(month for month in months if month is not None)


@pytest.mark.slow
async def test_old_months_are_retired(
    database: Database, keeper: Database, other: Connection
) -> None:
    await seal_five_months(database, other)
    before = await partitions(other)
    assert await audit.maintain(database) == audit.Maintenance()
    old = [month(ago) for ago in (15, 14, 13)]
    async with Writers(database) as writers:
        with acting_as(Actor(user_id="cron")):
            done = await audit.maintain(keeper)
        await writers.more()
    assert (done.retired, done.kept) == (old, {})
    assert before.keys() - (await partitions(other)).keys() == {partition(n) for n in (15, 14, 13)}
    assert await retirements(other) == sorted(old)
    await audit.seal(database)
    rows = await other.fetchval("SELECT count(*) FROM audit_logs")
    await assert_clean(database, rows=rows, retired=9, unsealed=0)
    async with database.session() as session:
        page = await crud.audit_logs.search(session, action=AuditAction.SYSTEM_AUDIT_RETIRE)
    told = [(event.resource_id, event.details) for event in page.items[::-1]]
    assert [name for name, _ in told] == old
    assert {event.user_id for event in page} == {"cron"}
    assert [details and details["events"] for _, details in told] == [3, 3, 3]
    assert await audit.maintain(keeper) == audit.Maintenance()


@pytest.mark.slow
async def test_health_has_no_problem_after_a_retirement(
    database: Database, keeper: Database, other: Connection
) -> None:
    await seal_five_months(database, other)
    assert (await check_readiness(database.settings)).problems == []
    await audit.maintain(keeper)
    report = await check_readiness(database.settings)
    assert (report.problems, report.audit_months_ahead) == ([], MONTHS_AHEAD)


@pytest.mark.slow
async def test_an_empty_month_is_retired_without_a_seal(
    database: Database, keeper: Database, other: Connection
) -> None:
    await other.execute(
        "SELECT make_audit_partition(date_trunc('month', now() AT TIME ZONE 'UTC')"
        " - interval '15 months')"
    )
    assert (await audit.maintain(keeper)).retired == [month(15)]
    assert partition(15) not in await partitions(other)
    await assert_clean(database, seals=0, rows=0)


@pytest.mark.slow
async def test_a_retired_event_that_reappears_is_found(
    database: Database, keeper: Database, other: Connection
) -> None:
    await seal_five_months(database, other)
    await other.execute(f"CREATE TABLE kept AS SELECT * FROM {partition(14)}")
    await audit.maintain(keeper)
    await other.execute("INSERT INTO audit_logs SELECT * FROM kept ORDER BY position LIMIT 1")
    found = await audit.verify(database)
    position = await other.fetchval("SELECT min(position) FROM kept")
    assert [(one.kind, one.position) for one in found.findings] == [
        (FindingKind.INSERTED, position)
    ]
    await audit.seal(database)
    await audit.maintain(database)
    assert (await audit.verify(database)).findings == found.findings


async def unsealed(connection: Connection) -> str:
    await put(connection, 14, 1, minute=1)
    return "the month holds events that are not sealed: run `tiger-db seal-audit`"


async def changed(connection: Connection) -> str:
    position = await connection.fetchval(f"SELECT max(position) FROM {partition(14)}")
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("UPDATE audit_logs SET user_id = 'x' WHERE position = $1", position)
    reason = "differs from the sealed event: run `tiger-db verify-audit`"
    return f"the event at position {position} {reason}"


async def put_there(connection: Connection) -> str:
    """In a position that was rolled back, say, before the last seal."""
    await connection.execute("SET session_replication_role = replica")
    await put(connection, 14, 1, minute=1)
    await connection.execute("UPDATE audit_logs SET position = -1 WHERE position = 16")
    return "the month holds events that no seal covers: run `tiger-db verify-audit`"


async def late(connection: Connection) -> str:
    await put(connection, 14, 1, now=True, minute=1)
    return (
        f"the month holds events that a machine whose clock was wrong wrote in {month(0)}: set the"
        f" clock of that machine; the month is retired when the events of {month(0)} are"
    )


@pytest.mark.slow
@pytest.mark.parametrize("why", [unsealed, changed, put_there, late])
async def test_a_month_that_cannot_be_retired_does_not_keep_later_months(
    database: Database,
    keeper: Database,
    other: Connection,
    why: Callable[[Connection], Awaitable[str]],
) -> None:
    await seal_five_months(database, other)
    reason = await why(other)
    found = await audit.verify(database)
    before = await contents(other)
    for _ in range(2):
        done = await audit.maintain(keeper)
        assert done.kept == {month(14): reason}
        assert (await audit.verify(database)).findings == found.findings
    await audit.seal(database)
    assert await retirements(other) == [month(15), month(13)]
    left = await partitions(other)
    assert left[partition(14)] >= 3
    assert left[partition(12)] == 3
    after = await contents(other)
    retired = {position for position in before if 4 <= position <= 6 or 10 <= position <= 12}
    assert before.keys() - after.keys() == retired


async def missing(connection: Connection, which: str) -> str:
    position = await connection.fetchval(f"SELECT {which}(position) FROM {partition(14)}")
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("DELETE FROM audit_logs WHERE position = $1", position)
    return f"the event at position {position} is missing: run `tiger-db verify-audit`"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["min", "max"])
async def test_no_month_is_retired_from_which_an_event_is_missing(
    database: Database, keeper: Database, other: Connection, which: str
) -> None:
    await seal_five_months(database, other)
    reason = await missing(other, which)
    done = await audit.maintain(keeper)  # one seal covers all three months
    assert (done.retired, done.kept) == ([], {month(ago): reason for ago in (15, 14, 13)})
    (found,) = (await audit.verify(database)).findings
    assert found.kind == FindingKind.DELETED


@pytest.mark.slow
async def test_no_month_is_retired_without_a_key(
    clone_settings: Settings, database: Database, other: Connection
) -> None:
    await seal_five_months(database, other)
    settings = clone_settings.model_copy(update={"audit_retention_months": KEPT})
    async with Database(settings) as keyless:
        with pytest.raises(ConfigurationError, match="AUDIT_SIGNING_KEY is not set"):
            await audit.maintain(keyless)
    await assert_clean(database, rows=15, retired=0)


@pytest.mark.slow
async def test_no_month_is_retired_with_another_key(
    database: Database, keeping: Settings, other: Connection
) -> None:
    await seal_five_months(database, other)
    forged = keeping.model_copy(update={"audit_signing_key": SecretStr(generate_signing_key())})
    async with Database(forged) as forger:
        with pytest.raises(InvalidState, match="seal 1: none of the given public keys has signed"):
            await audit.maintain(forger)
    await assert_clean(database, rows=15, retired=0)


# At once


@pytest.mark.slow
@pytest.mark.parametrize("is_empty", [False, True])
async def test_an_event_committed_while_its_month_is_retired_is_not_lost(
    database: Database,
    keeper: Database,
    other: Connection,
    monkeypatch: pytest.MonkeyPatch,
    is_empty: bool,
) -> None:
    """The writer's clock is wrong; it commits while `maintain` waits for the table lock."""
    monkeypatch.setattr("tiger_db.audit.retention._LOCK_TIMEOUT", "60s")
    await put(other, 15)
    assert (await audit.maintain(database)).made == 1
    assert (await audit.seal(database)).rows == 3
    ago = 15
    if is_empty:
        ago = 16
        await other.execute(
            "SELECT make_audit_partition(date_trunc('month', now() AT TIME ZONE 'UTC')"
            " - interval '16 months')"
        )
    writer = await connect(database.settings)
    transaction = writer.transaction()
    await transaction.start()
    await put(writer, ago, 1, minute=1)
    maintaining = asyncio.create_task(audit.maintain(keeper))
    await until(lambda: waits(other))
    await transaction.commit()
    await writer.close()
    done = await maintaining
    reason = "the month holds events that are not sealed: run `tiger-db seal-audit`"
    assert (done.retired, done.kept) == ([month(15)] if is_empty else [], {month(ago): reason})
    assert (await partitions(other))[partition(ago)] == (1 if is_empty else 4)
    assert (await audit.seal(database)).rows == (2 if is_empty else 1)
    assert month(ago) in (await audit.maintain(keeper)).retired
    await audit.seal(database)
    await assert_clean(database, retired=4, unsealed=0)


@pytest.mark.slow
async def test_concurrent_maintenance_does_everything_once(
    signing: Settings, database: Database, other: Connection
) -> None:
    rounds = 3
    for ago in range(KEPT + 1, KEPT + 1 + 2 * rounds):
        await put(other, ago)
    await audit.seal(database)
    retired = 0
    for turn in range(rounds):
        months = KEPT + 2 * (rounds - 1 - turn)  # two more of them are old enough
        await other.execute(f"DROP TABLE {partition(-1 - turn)}")
        await put(other, -1 - turn, now=True)
        kept = signing.model_copy(update={"audit_retention_months": months})
        async with Database(kept) as one, Database(kept) as two, Writers(database) as writers:
            done = await asyncio.gather(*(audit.maintain(db) for db in (one, two, one, two)))
            await writers.more(5)
        assert sum(each.made for each in done) == (1 + 2 * rounds if turn == 0 else 1)
        assert all(each.kept == {} for each in done)
        left = {month(months + 1), month(months + 2)}
        assert {name for each in done for name in each.retired} == left
        retired += len(left)
        gone = await retirements(other)
        assert len(gone) == len({*gone}) == retired
        await audit.seal(database)
        await assert_clean(database, retired=3 * retired, unsealed=0)


@pytest.mark.slow
async def test_sealing_goes_on_while_the_events_of_a_month_are_read(
    database: Database, keeper: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await seal_five_months(database, other)
    sealed: list[int] = []

    async def read_slowly(*arguments: Any) -> AsyncIterator[Any]:
        await put(other, 0, 1, minute=len(sealed) + 1)
        sealed.append((await audit.seal(database, patience=timedelta(seconds=0.5))).rows)
        async with aclosing(sealed_events(*arguments)) as events:
            async for event in events:
                yield event

    monkeypatch.setattr(retention, "sealed_events", read_slowly)
    assert (await audit.maintain(keeper)).retired == [month(ago) for ago in (15, 14, 13)]
    assert sealed == [1, 2, 2]  # with the event of the retirement before
    await audit.seal(database)
    await assert_clean(database, retired=9, unsealed=0)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
async def test_the_events_of_a_month_are_read_once_while_others_use_the_table(
    database: Database, keeper: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await seal_five_months(database, other)
    reads: list[object] = []

    def count_reads(*arguments: Any) -> Any:
        reads.append(arguments)
        return sealed_events(*arguments)

    monkeypatch.setattr(retention, "sealed_events", count_reads)
    async with other.transaction():
        await other.execute("LOCK TABLE audit_logs IN ACCESS SHARE MODE")
        with pytest.raises(DatabaseUnavailable, match="audit_logs is in use by"):
            await audit.maintain(keeper)
    assert len(reads) == 1
    assert (await audit.maintain(keeper)).retired == [month(ago) for ago in (15, 14, 13)]


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
async def test_maintenance_gives_way_to_a_long_transaction(
    database: Database, keeper: Database, other: Connection
) -> None:
    await seal_five_months(database, other)
    await put(other, 11, now=True)
    before = await partitions(other)
    reader = await connect(database.settings)
    for what in ("moves", "leaves"):
        transaction = reader.transaction(isolation="repeatable_read", readonly=True)
        await transaction.start()
        count = await reader.fetchval("SELECT count(*) FROM audit_logs")
        async with Writers(database) as writers:
            written = len(writers.written)
            with pytest.raises(
                DatabaseUnavailable, match=rf"in use by .*process {reader.get_server_pid()} "
            ):
                await audit.maintain(keeper)  # ends although the reader's transaction does not
            assert len(writers.written) > written
            await writers.more()
        assert (await partitions(other)).keys() == before.keys()
        assert await reader.fetchval("SELECT count(*) FROM audit_logs") == count
        await transaction.commit()
        await audit.seal(database)
        if what == "moves":
            assert (await audit.maintain(database)).made == 1
            before = await partitions(other)
    await reader.close()
    assert (await audit.maintain(keeper)).retired == [month(ago) for ago in (15, 14, 13)]
    await audit.seal(database)
    await assert_clean(database, retired=9, unsealed=0)
