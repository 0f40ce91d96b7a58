"""Each event is sealed once, while writers commit late, roll back or are killed."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection as Pipe
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr

from tests.support import factories
from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tests.support.trail import insert_seal, stored_events
from tests.support.waiting import until
from tiger_db import AuditAction, AuditLog, Database, Settings, audit, crud
from tiger_db.audit.seal_format import (
    DIGEST_BYTES,
    SEAL_VERSION,
    Seal,
    SealPayload,
    digest_of,
    merkle_root,
    positions_in,
)
from tiger_db.audit.sealing import EVENTS_PER_SEAL
from tiger_db.audit.storage import (
    Connection,
    database_time,
    fetch_last_seal,
)
from tiger_db.connections import connect
from tiger_db.errors import ConfigurationError, DatabaseUnavailable
from tiger_db.signing import generate_signing_key, public_text

REPETITIONS = 200 if os.environ.get("TIGER_DB_SOAK") else 8
WRITERS = 48
QUERY = AuditAction.DATA_QUERY
MANY = """
INSERT INTO audit_logs (id, action, result, severity)
SELECT gen_random_uuid(), 'data:query', 'success', 'low' FROM generate_series(1, $1)
"""


@pytest.fixture
def signing(clone_settings: Settings) -> Settings:
    key = SecretStr(generate_signing_key())
    return clone_settings.model_copy(
        update={"audit_signing_key": key, "db_pool_size": 24, "db_max_overflow": 4}
    )


@pytest.fixture
async def sealed(signing: Settings) -> AsyncIterator[Database]:
    """A database of this test's own, with a key that signs."""
    async with Database(signing) as database:
        yield database


@pytest.fixture
async def other(signing: Settings) -> AsyncIterator[Connection]:
    """A connection without tiger_db."""
    connection = await connect(signing)
    yield connection
    await connection.close()


async def payloads(connection: Connection) -> list[SealPayload]:
    rows = await connection.fetch(
        "SELECT statement, signature, digests FROM audit_seals ORDER BY number"
    )
    seals = [Seal(*row) for row in rows]
    made = [seal.payload() for seal in seals]
    lengths = [len(seal.digests) for seal in seals]
    assert lengths == [payload.event_count * DIGEST_BYTES for payload in made]
    return made


async def assert_sealed_once(database: Database, connection: Connection) -> None:
    """Assert that the seals cover exactly the stored events, and that verification succeeds."""
    made = await payloads(connection)
    assert [payload.number for payload in made] == list(range(1, len(made) + 1))
    positions = [position for payload in made for position in positions_in(payload.positions)]
    stored = await connection.fetch("SELECT position FROM audit_logs ORDER BY position")
    assert positions == [position for (position,) in stored]
    assert len(positions) == len({*positions})
    found = await audit.verify(database)
    assert found.findings == []
    assert (found.rows, found.unsealed, found.seals) == (len(positions), 0, len(made))


@dataclass
class Written:
    """Ids of committed and rolled back events; `gate` lets late writers commit."""

    kept: set[UUID] = field(default_factory=set)
    undone: set[UUID] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)


class Undone(Exception):
    pass


async def commits(database: Database, written: Written) -> None:
    async with database.session() as session:
        event = await crud.audit_logs.log_event(session, action=QUERY)
    written.kept.add(event.id)


async def rolls_back(database: Database, written: Written) -> None:
    with suppress(Undone):
        async with database.session() as session:
            event = await crud.audit_logs.log_event(session, action=QUERY)
            written.undone.add(event.id)
            raise Undone


async def records(database: Database, written: Written) -> None:
    """Record out of band, in a transaction that is rolled back."""
    with suppress(Undone):
        async with database.session() as session:
            event = await crud.audit_logs.record_event(session, action=QUERY)
            written.kept.add(event.id)
            raise Undone


async def copies(database: Database, written: Written) -> None:
    events = [factories.new_event(details={"n": n}) for n in range(7)]
    async with database.session() as session:
        await crud.audit_logs.log_events(session, events)
    written.kept |= {event.id for event in events}


async def commits_in_part(database: Database, written: Written) -> None:
    async with database.session() as session:
        with suppress(Undone):
            async with session.begin_nested():
                event = await crud.audit_logs.log_event(session, action=QUERY)
                written.undone.add(event.id)
                raise Undone
        event = await crud.audit_logs.log_event(session, action=QUERY)
    written.kept.add(event.id)


async def commits_late(database: Database, written: Written) -> None:
    """Write before and after the others, and commit when the gate opens."""
    async with database.session() as session:
        event = await crud.audit_logs.log_event(session, action=QUERY)
        await written.gate.wait()
        last = await crud.audit_logs.log_event(session, action=QUERY)
    written.kept |= {event.id, last.id}


HOW = [commits, rolls_back, records, copies, commits_in_part]


async def write(databases: list[Database], written: Written, writers: int, late: int) -> None:
    """Write concurrently; late writers commit after all others."""

    async def others(number: int) -> None:
        for turn in range(len(HOW)):
            how = HOW[(number + turn) % len(HOW)]
            await how(databases[number % len(databases)], written)

    async with asyncio.TaskGroup() as everyone:
        for number in range(late):
            everyone.create_task(commits_late(databases[number % len(databases)], written))
        async with asyncio.TaskGroup() as group:
            for number in range(writers - late):
                group.create_task(others(number))
        written.gate.set()
        for number in range(late):
            everyone.create_task(others(number))


async def assert_kept(connection: Connection, written: Written) -> None:
    stored = {UUID(int=id_.int) for (id_,) in await connection.fetch("SELECT id FROM audit_logs")}
    assert stored == written.kept
    assert written.undone
    assert not stored & written.undone


def seal_in_a_loop(settings: Settings, over: Pipe | None) -> None:
    """Seal in another process until `over` has a message."""

    async def run() -> None:
        async with Database(settings) as database:
            while over is None or not over.poll():
                with suppress(DatabaseUnavailable):  # the other sealer holds the sealing lock
                    await audit.seal(database, patience=timedelta(seconds=0.1))

    asyncio.run(run())


async def seals_made(connection: Connection) -> int:
    return int(await connection.fetchval("SELECT count(*) FROM audit_seals"))


@pytest.mark.slow
async def test_48_writers_and_two_sealers_seal_each_event_once(
    signing: Settings, sealed: Database, other: Connection
) -> None:
    written = Written()
    over, seen = FORKS.Pipe()
    sealers = [FORKS.Process(target=seal_in_a_loop, args=(Passed(signing), seen)) for _ in range(2)]
    for sealer in sealers:
        sealer.start()
    async with Database(signing) as second:
        await write([sealed, second], written, WRITERS, late=12)

        async def caught_up() -> bool:
            return (await audit.verify(sealed)).unsealed == 0

        await until(caught_up)
        for number in range(3):  # while they seal, and nobody commits late
            await asyncio.gather(*(commits([sealed, second][n % 2], written) for n in range(20)))
            await until(caught_up)
            assert await seals_made(other) > number
    over.send("over")  # which the sealers see, and leave where it is
    for sealer in sealers:
        await asyncio.to_thread(sealer.join, 30)
        assert sealer.exitcode == 0
    assert len(written.kept) > WRITERS * 5
    await assert_kept(other, written)
    await assert_sealed_once(sealed, other)
    last = await other.fetchval("SELECT last_value FROM audit_logs_position_seq")
    assert last == len(written.kept) + len(written.undone)  # and so there are gaps


@pytest.mark.slow
async def test_concurrent_sealing_causes_no_findings(
    signing: Settings, sealed: Database, other: Connection
) -> None:
    written = Written()
    async with Database(signing) as second:

        async def seal_meanwhile(database: Database, over: asyncio.Event) -> None:
            while not over.is_set():
                with suppress(DatabaseUnavailable):  # the other sealer holds the sealing lock
                    await audit.seal(database, patience=timedelta(seconds=0.01))
                assert (await audit.verify(database)).findings == []

        for _ in range(REPETITIONS):
            over = asyncio.Event()
            written.gate = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                for database in (sealed, second):
                    group.create_task(seal_meanwhile(database, over))
                await write([sealed, second], written, writers=4, late=1)
                over.set()
            await audit.seal(sealed)
            await assert_sealed_once(sealed, other)
    await assert_kept(other, written)


# Transactions that stay open


@pytest.mark.slow
async def test_an_open_transaction_is_waited_for(sealed: Database, other: Connection) -> None:
    late = await connect(sealed.settings)
    transaction = late.transaction()
    await transaction.start()
    await late.execute(MANY, 1)
    written = Written()
    for _ in range(3):
        await copies(sealed, written)
    sealing = await audit.seal(sealed, patience=timedelta(seconds=0.2))
    assert sealing == audit.Sealing(0, 0, (late.get_server_pid(),))
    assert await seals_made(other) == 0
    waiting = asyncio.create_task(audit.seal(sealed, patience=timedelta(seconds=60)))
    async with asyncio.timeout(30):
        for _ in range(20):  # it waits, and nobody for it
            for how in HOW:
                await how(sealed, written)
    assert not waiting.done()
    await transaction.commit()
    first = await waiting
    assert first.waits_for == ()
    assert 22 <= first.rows < 1 + len(written.kept)  # none that was written after it began
    rest = await audit.seal(sealed)
    assert first.rows + rest.rows == 1 + len(written.kept)
    await assert_sealed_once(sealed, other)
    await late.close()


@pytest.mark.slow
async def test_a_position_assigned_earlier_is_not_skipped(
    sealed: Database, other: Connection
) -> None:
    """Nor is one that is written by a transaction which wrote its first position later."""
    late = [await connect(sealed.settings) for _ in range(3)]
    transactions = [connection.transaction() for connection in late]
    for connection, transaction in zip(late, transactions, strict=True):
        await transaction.start()
        await connection.execute(MANY, 1)
    written = Written()
    await commits(sealed, written)
    sealing = asyncio.create_task(audit.seal(sealed))
    await commits(sealed, written)
    for connection, transaction in zip(reversed(late), reversed(transactions), strict=True):
        assert not sealing.done()
        await connection.execute(MANY, 1)
        await transaction.commit()
        await commits(sealed, written)
        await asyncio.sleep(0.05)
    await sealing
    (payload,) = await payloads(other)
    assert [*positions_in(payload.positions)][:4] == [1, 2, 3, 4]
    await audit.seal(sealed)
    await assert_sealed_once(sealed, other)
    assert await other.fetchval("SELECT count(*) FROM audit_logs") == 6 + len(written.kept)
    for connection in late:
        await connection.close()


@pytest.mark.slow
async def test_readers_and_rolled_back_writers_are_not_waited_for(
    sealed: Database, other: Connection
) -> None:
    written = Written()
    await commits(sealed, written)
    transaction = other.transaction()
    await transaction.start()
    assert await other.fetchval("SELECT count(*) FROM audit_logs") == 1
    await other.execute("SAVEPOINT before")
    await other.execute(MANY, 1)
    await other.execute("ROLLBACK TO SAVEPOINT before")
    assert await audit.seal(sealed, patience=timedelta(seconds=0.2)) == audit.Sealing(1, 1)
    await transaction.rollback()
    await assert_sealed_once(sealed, other)


async def test_a_writer_into_a_partition_is_waited_for(sealed: Database, other: Connection) -> None:
    transaction = other.transaction()
    await transaction.start()
    await other.execute(MANY.replace("audit_logs", "audit_logs_default"), 1)
    sealing = await audit.seal(sealed, patience=timedelta(seconds=0.1))
    assert sealing.waits_for == (other.get_server_pid(),)
    await transaction.commit()
    assert (await audit.seal(sealed)).rows == 1
    await assert_sealed_once(sealed, other)


# Sealers


@pytest.mark.slow
async def test_concurrent_sealers_seal_each_event_once(
    signing: Settings, sealed: Database, other: Connection
) -> None:
    await other.execute(MANY, 25_000)
    async with Database(signing) as second:
        sealings = await asyncio.gather(*(audit.seal(db) for db in [sealed, second] * 3))
    assert sum(sealing.rows for sealing in sealings) == 25_000
    assert sum(sealing.seals for sealing in sealings) == 3
    await assert_sealed_once(sealed, other)


@pytest.mark.slow
async def test_a_killed_sealer_leaves_whole_seals(
    signing: Settings, sealed: Database, other: Connection
) -> None:
    await other.execute(MANY, 60_000)
    for seals in (1, 2, 4):
        sealer = FORKS.Process(target=seal_in_a_loop, args=(Passed(signing), None))
        sealer.start()

        async def made(seals: int = seals) -> bool:
            return await seals_made(other) >= seals

        await until(made)
        sealer.kill()
        await asyncio.to_thread(sealer.join)
    before = await audit.verify(sealed)
    assert before.findings == []
    assert before.rows == before.seals * EVENTS_PER_SEAL >= 40_000
    sealing = await audit.seal(sealed)
    assert before.rows + sealing.rows == 60_000
    assert sealing.rows == sealing.seals * EVENTS_PER_SEAL
    await assert_sealed_once(sealed, other)


@pytest.mark.slow
async def test_a_seal_has_at_most_10000_events(sealed: Database, other: Connection) -> None:
    told: list[tuple[int, int | None]] = []

    async def seal() -> audit.Sealing:
        return await audit.seal(sealed, progress=lambda *done: told.append(done))

    assert await seal() == audit.Sealing(0, 0)
    await other.execute(MANY, 25_000)
    assert await seal() == audit.Sealing(25_000, 3)
    assert told == [(10_000, None), (20_000, None), (25_000, None)]
    assert await seal() == audit.Sealing(0, 0)
    counts = [payload.event_count for payload in await payloads(other)]
    assert counts == [10_000, 10_000, 5_000]
    await assert_sealed_once(sealed, other)


async def test_seals_cover_ranges_of_positions_with_gaps(
    sealed: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seal has the events of the next range of positions, also after a range without events."""
    monkeypatch.setattr("tiger_db.audit.sealing.EVENTS_PER_SEAL", 5)
    for count, gaps in ((3, 1), (7, 30), (4, 10**9), (2, 4)):
        await other.execute(MANY, count)
        await other.execute(
            "SELECT setval('audit_logs_position_seq', last_value + $1)"
            " FROM audit_logs_position_seq",
            gaps,
        )
    assert (await audit.seal(sealed)).rows == 16
    made = await payloads(other)
    assert [payload.event_count for payload in made] == [4, 5, 1, 5, 1]
    assert [payload.closed_at is None for payload in made] == [True, True, True, True, False]
    last = await other.fetchval("SELECT last_value FROM audit_logs_position_seq")
    assert made[-1].upto == last
    await assert_sealed_once(sealed, other)


async def test_a_rolled_back_event_is_not_sealed(sealed: Database, other: Connection) -> None:
    written = Written()
    await rolls_back(sealed, written)
    assert await audit.seal(sealed) == audit.Sealing(0, 0)
    assert await seals_made(other) == 0


async def test_sealing_and_verifying_need_a_key(clone: Database) -> None:
    with pytest.raises(ConfigurationError, match="AUDIT_SIGNING_KEY is not set"):
        await audit.seal(clone)
    with pytest.raises(ConfigurationError, match=r"give a public key \(`--public-key`\)"):
        await audit.verify(clone)


# Clocks


def uuid7_at(moment: datetime) -> UUID:
    return UUID(int=(int(moment.timestamp() * 1000) << 80) | (uuid4().int & ((1 << 80) - 1)))


@pytest.mark.slow
async def test_a_wrong_clock_of_a_writer_causes_no_findings(
    sealed: Database, other: Connection
) -> None:
    now = datetime.now(UTC)
    for back in (0, 1, 24 * 365, -48):
        async with sealed.session() as session:
            session.add(AuditLog(id=uuid7_at(now - timedelta(hours=back)), action=QUERY))
        await audit.seal(sealed)
        await assert_sealed_once(sealed, other)
    assert await other.fetchval("SELECT count(*) FROM audit_logs_default") == 1


def shifted(time: str, hours: float) -> str:
    moved = datetime.fromisoformat(time) + timedelta(hours=hours)
    return moved.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@pytest.mark.slow
async def test_a_database_clock_that_went_back_causes_no_findings(
    sealed: Database, other: Connection
) -> None:
    """The last seal was made when it was an hour ahead."""
    written = Written()
    await commits(sealed, written)
    await audit.seal(sealed)
    key = await audit.required_key(sealed)
    last = await fetch_last_seal(other)
    assert last is not None
    end = last.payload()
    await commits(sealed, written)
    ((position, content),) = await stored_events(other, end.upto + 1)
    ahead = shifted(await database_time(other), 1)
    payload = SealPayload(
        version=SEAL_VERSION, origin=end.origin, number=end.number + 1,
        previous=last.payload_digest, after=end.upto, upto=position,
        positions=((position, position),),
        root=merkle_root([(position, digest_of(content))]).hex(), sealed_at=ahead, closed_at=ahead,
        key=public_text(key.public_key()),
    )  # fmt: skip
    await insert_seal(other, key, payload, digest_of(content))
    await assert_sealed_once(sealed, other)
    for _ in range(2):
        await commits(sealed, written)
        assert (await audit.verify(sealed)).findings == []
        await audit.seal(sealed)
        await assert_sealed_once(sealed, other)
    await other.execute(
        f"INSERT INTO audit_logs (id, created_at, action, result, severity)"
        f" VALUES ('{uuid4()}', now() - interval '1 minute', 'data:query', 'success', 'low')"
    )
    found = await audit.verify(sealed)
    assert (found.findings, [one.kind for one in found.warnings]) == ([], [audit.FindingKind.CLOCK])


# What is sealed, is what is stored

FRACTIONS = ["000000", "000001", "100000", "120300", "999999"]
NUMBERS = ["1.10", "12345678901234567890.123456789", "1e400", "-0.000000000000000000000001", "0"]


async def assert_each_change_is_found(database: Database, connection: Connection, sql: str) -> None:
    """Change each event with triggers disabled, and assert the finding."""
    await connection.execute("SET session_replication_role = replica")
    await connection.execute("CREATE TEMP TABLE before AS SELECT * FROM audit_logs")
    for (position,) in await connection.fetch("SELECT position FROM before"):
        assert await connection.execute(sql, position) == "UPDATE 1"
        (found,) = (await audit.verify(database)).findings
        assert (found.kind, found.position) == (audit.FindingKind.CHANGED, position)
        await connection.execute("DELETE FROM audit_logs")
        await connection.execute("INSERT INTO audit_logs SELECT * FROM before")
    await assert_sealed_once(database, connection)


@pytest.mark.slow
async def test_a_time_is_sealed_to_its_last_digit(sealed: Database, other: Connection) -> None:
    await other.execute("SET TIME ZONE 'Asia/Kathmandu'")
    for fraction in FRACTIONS:
        await other.execute(
            "INSERT INTO audit_logs (id, created_at, action, result, severity) VALUES"
            f" (gen_random_uuid(), '2026-02-03T04:05:06.{fraction}Z', 'data:query', 'success',"
            " 'low')"
        )
    await other.execute("RESET TIME ZONE")
    contents = [json.loads(content) for _, content in await stored_events(other)]
    for fraction, event in zip(FRACTIONS, contents, strict=True):
        told = event["created_at"]
        assert told.endswith("Z")
        assert f"{told[:-1]:0<26}" == f"2026-02-03T04:05:06{'.' if '.' in told else 0}{fraction}"
    await audit.seal(sealed)
    await assert_sealed_once(sealed, other)
    await assert_each_change_is_found(
        sealed,
        other,
        "UPDATE audit_logs SET created_at = created_at + interval '1 microsecond'"
        " WHERE position = $1",
    )


@pytest.mark.slow
@pytest.mark.parametrize("column", ["details", "old_values", "new_values", "tags"])
async def test_a_number_is_sealed_to_its_last_digit(
    sealed: Database, other: Connection, column: str
) -> None:
    for number in NUMBERS:
        await other.execute(
            f"INSERT INTO audit_logs (id, action, result, severity, {column}) VALUES"
            f""" (gen_random_uuid(), 'data:query', 'success', 'low', '{{"n": {number}}}')"""
        )
    contents = [content for _, content in await stored_events(other)]
    for number, content in zip(NUMBERS, contents, strict=True):
        digits = "1" + "0" * 400 if number == "1e400" else number
        assert f'"{column}":{{"n": {digits}}}' in content
    await audit.seal(sealed)
    await assert_sealed_once(sealed, other)
    await assert_each_change_is_found(
        sealed,
        other,
        f"""UPDATE audit_logs SET {column} = regexp_replace({column}::text, '.}}$',
            ((right(rtrim({column}::text, '}}'), 1)::int + 1) % 10)::text || '}}')::jsonb
        WHERE position = $1""",
    )
