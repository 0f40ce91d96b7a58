"""Benchmarks of token refreshes, compared with the same statements and with job queues."""

import asyncio
import hashlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from benchmarks.work import Work
from tiger_db import Database, RefreshTrigger, RefreshWorker, TigerAccount, TokenStatus, crud
from tiger_db.actor import ACTOR_FIELDS
from tiger_db.connections import connect
from tiger_db.crud.token_status.claims import CLAIM, DUE
from tiger_db.crud.token_status.outcomes import COMPLETE
from tiger_db.encryption import Secret
from tiger_db.models.secrets import CONTEXT, bound_text, encrypt_secret
from tiger_db.models.token_status import NewToken

FEW, MANY = 10_000, 1_000_000
JOBS_DUE = 12_000  # due refreshes, more than all benchmarks complete
WORKERS = (1, 4, 16)
JOBS = 1_000
SAMPLES = 100
LEASE = timedelta(hours=1)
LIFE = timedelta(days=15)
# Copies of the account `bench`. Each copy gets a refresh that has ended, and the first copies get
# a refresh that is due.
FILL = """
INSERT INTO tiger_accounts (id, account_name, account_number, account_type, status, tiger_id,
    tiger_id_fingerprint, private_key, private_key_format, environment, access_token,
    token_expires_at, token_refresh_at, is_default_trading, is_default_data, market_permissions,
    quote_permissions, error_count, tags)
SELECT md5('a' || n)::uuid, account_name, 'U9' || n, account_type, status, tiger_id,
    tiger_id_fingerprint, private_key, private_key_format, environment, access_token,
    now() + interval '10 days', now() + interval '7 days', false, false, market_permissions,
    quote_permissions, 0, tags
FROM tiger_accounts, generate_series(1, $1::int) n WHERE account_number = 'U1'
"""
HISTORY = """
INSERT INTO token_statuses (id, tiger_account_id, status, trigger, scheduled_at, retry_count,
    max_retries, fencing_token)
SELECT md5($3 || n)::uuid, md5('a' || n)::uuid, $2::token_refresh_status, 'scheduled',
    now() - make_interval(secs => n), 0, 3, 0
FROM generate_series(1, $1::int) n
"""
BIND = "UPDATE tiger_accounts SET tiger_id = $2, private_key = $3, access_token = $4 WHERE id = $1"
# Positions of columns in the rows that CLAIM returns.
ID = 0
FENCING_TOKEN = list(TokenStatus.model_fields).index("fencing_token")
TIGER_ID, ACCESS_TOKEN = map(list(TigerAccount.model_fields).index, ("tiger_id", "access_token"))
Job = Callable[[], Awaitable[None]]


def token() -> str:
    return f"token-{uuid7()}"


async def fill(database: Database, accounts: int, due: int) -> None:
    async with database.session() as session:
        account = await crud.accounts.create(
            session,
            TigerAccount(
                account_name="bench",
                account_number="U1",
                tiger_id=Secret("20150001"),
                private_key=Secret("bench"),
                access_token=Secret(token()),
                token_expires_at=datetime.now(UTC) + LIFE,
            ),
        )
    connection = await connect(database.settings)
    try:
        await connection.execute("SET statement_timeout = 0")
        await connection.execute(FILL, accounts)
        # A token is stored only beside secrets that belong to the account.
        await connection.executemany(BIND, bound_secrets(database, account, due))
        await connection.execute(HISTORY, accounts, "success", "done")
        await connection.execute(HISTORY, due, "pending", "due")
        await connection.execute("VACUUM ANALYZE tiger_accounts")
        await connection.execute("VACUUM ANALYZE token_statuses")
    finally:
        await connection.close()


def bound_secrets(
    database: Database, account: TigerAccount, copies: int
) -> Iterator[tuple[object, ...]]:
    """Yield the parameters of BIND for the first copies of an account."""
    provider = database.info[CONTEXT].key_provider
    values = {name: getattr(account, name) for name in TigerAccount.secrets_bound_to}
    for n in range(1, copies + 1):
        row_id = UUID(hashlib.md5(f"a{n}".encode()).hexdigest())
        bound = bound_text(TigerAccount, values | {"account_number": f"U9{n}"})
        yield (
            row_id,
            *(
                encrypt_secret(provider, "20150001", f"tiger_accounts.{name}:{row_id}", bound)
                for name in ("tiger_id", "private_key", "access_token")
            ),
        )


def ours(database: Database) -> Job:
    async def claim_and_complete() -> None:
        async with database.session() as session:
            (claim,) = await crud.token_status.claim_due(session, worker="w", limit=1, lease=LEASE)
        async with database.session() as session:
            await crud.token_status.complete(
                session, claim, access_token=token(), expires_at=datetime.now(UTC) + LIFE
            )

    return claim_and_complete


def plain(pool: "asyncpg.Pool[asyncpg.Record]") -> Job:
    """Return the same two statements with constant values, each in a transaction of asyncpg."""
    ciphertext, hashed = bytes(100), "0" * 64

    async def claim_and_complete() -> None:
        async with pool.acquire() as connection, connection.transaction():
            refresh, account = await connection.fetchrow(CLAIM % (DUE % 1), "w", LEASE, [])
        until = datetime.now(UTC) + LIFE
        async with pool.acquire() as connection, connection.transaction():
            claim = (refresh[ID], account[ID], refresh[FENCING_TOKEN], account[ACCESS_TOKEN])
            new = (hashed, hashed, until, until - LIFE / 5, None, None, None, ciphertext, None)
            event = (uuid7(), account[TIGER_ID], *(None for _ in ACTOR_FIELDS))
            assert await connection.fetchrow(COMPLETE, *claim, *new, *event)

    return claim_and_complete


def at_once(job: Job, workers: int) -> Job:
    async def run() -> None:
        await asyncio.gather(*(job() for _ in range(workers)))

    return run


async def works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    """Fill an empty database, and return the benchmarks on it."""
    await fill(database, 2 * JOBS_DUE, JOBS_DUE)
    return [
        Work(
            f"claim and complete a refresh, {workers} concurrently",
            at_once(ours(database), workers),
            at_once(plain(pool), workers),
            times=max(2, 32 // workers),
        )
        for workers in WORKERS
    ]


async def depth_work(few: Database, many: Database) -> Work:
    """Compare claims among a million accounts with claims among ten thousand accounts."""

    def claims(database: Database) -> Job:
        async def claim() -> None:
            async with database.session() as session:
                assert await crud.token_status.claim_due(session, worker="w", limit=1, lease=LEASE)

        return claim

    await fill(few, FEW, 1_000)
    await fill(many, MANY, 1_000)
    return Work(
        f"claim a refresh among {MANY:,} accounts, compared with among {FEW:,}",
        claims(many),
        claims(few),
        times=40,
    )


async def facts(
    database: Database, pool: "asyncpg.Pool[asyncpg.Record]", peer: Database
) -> AsyncIterator[str]:
    """Yield other measurements. `database` is that of `works`, and `peer` is an empty database."""
    async with database.session() as session:
        account = await crud.accounts.get_by_account_number(session, "U1")
    assert account is not None
    await pool.execute("UPDATE token_statuses SET status = 'cancelled' WHERE status = 'pending'")
    waits = sorted([wait async for wait in _waits(database, account)])
    p50, p99 = statistics.median(waits), waits[round(0.99 * SAMPLES) - 1]
    yield (
        f"Time from the commit of a due refresh until an idle worker asks the broker:"
        f" p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, in {SAMPLES} samples."
    )
    rows = {
        "tiger_db, claim and complete": [await _rate(database, ours(database), n) for n in WORKERS],
        "plain asyncpg, the same statements": [
            await _rate(database, plain(pool), n) for n in WORKERS
        ],
        "RefreshWorker, from due to stored": [await _worker(database, n) for n in WORKERS],
    }
    for name, measured in (("procrastinate", _procrastinate), ("pgqueuer", _pgqueuer)):
        try:
            rows[f"{name}, empty jobs"] = [await measured(peer, n) for n in WORKERS]
        except ImportError:
            yield f"{name} is not installed, so it is left out."
    workers = ", ".join(map(str, WORKERS[:-1]))
    yield (
        f"Refreshes a second, with {workers} and {WORKERS[-1]} concurrent workers in one process: "
        + (
            "; ".join(
                f"{name} {' / '.join(f'{rate:,.0f}' for rate in rates)}"
                for name, rates in rows.items()
            )
            + "."
        )
    )


async def _waits(database: Database, account: TigerAccount) -> AsyncIterator[float]:
    """Yield the seconds from a commit to the call of the refresher, for an idle worker."""
    started: asyncio.Queue[float] = asyncio.Queue()

    async def refresher(_: TigerAccount) -> NewToken:
        started.put_nowait(time.perf_counter())
        return NewToken(token(), datetime.now(UTC) + LIFE)

    worker = RefreshWorker(database, refresher, per_minute=10**6)
    running = asyncio.create_task(worker.run())
    try:
        for done in range(SAMPLES):
            while worker.counts["refreshed"] < done:  # noqa: ASYNC110  # the worker has no event for this
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # the worker is idle and listens again
            async with database.session() as session:
                await crud.token_status.create_refresh_operation(
                    session, tiger_account_id=account.id, trigger=RefreshTrigger.MANUAL
                )
                start = time.perf_counter()
            yield await started.get() - start
    finally:
        worker.stop()
        await running


async def _due(database: Database, jobs: int) -> None:
    """Make a number of refreshes due, and cancel all others."""
    connection = await connect(database.settings)
    try:
        await connection.execute(
            "UPDATE token_statuses SET status = 'cancelled'"
            " WHERE status IN ('pending', 'in_progress')"
        )
        await connection.execute(HISTORY, jobs, "pending", str(uuid7()))
        await connection.execute("VACUUM ANALYZE token_statuses")
    finally:
        await connection.close()


async def _rate(database: Database, job: Job, workers: int) -> float:
    await _due(database, JOBS)
    await at_once(job, workers)()  # opens the connections

    async def work() -> None:
        for _ in range((JOBS - workers) // workers):
            await job()

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(workers)))
    return (JOBS - workers) // workers * workers / (time.perf_counter() - start)


async def _worker(database: Database, workers: int) -> float:
    async def refresher(_: TigerAccount) -> NewToken:
        return NewToken(token(), datetime.now(UTC) + LIFE)

    await _due(database, JOBS)
    worker = RefreshWorker(database, refresher, concurrency=workers, per_minute=10**6)
    start = time.perf_counter()
    await worker.run(once=True)
    assert worker.counts["refreshed"] == JOBS
    return JOBS / (time.perf_counter() - start)


async def _procrastinate(peer: Database, workers: int) -> float:
    """Measure procrastinate as its documentation shows it: one worker on psycopg's pool."""
    import procrastinate  # noqa: PLC0415  # optional

    connector = procrastinate.PsycopgConnector(conninfo=_url(peer), max_size=workers + 4)
    app = procrastinate.App(connector=connector)

    async def nothing() -> None:
        pass

    task = app.task(name="nothing")(nothing)
    async with app.open_async():
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        await task.batch_defer_async(*[{} for _ in range(JOBS)])
        start = time.perf_counter()
        await app.run_worker_async(concurrency=workers, wait=False, install_signal_handlers=False)
        return JOBS / (time.perf_counter() - start)


async def _pgqueuer(peer: Database, workers: int) -> float:
    """Measure pgqueuer as its documentation shows it: one asyncpg connection, batches of jobs."""
    from pgqueuer import PgQueuer  # noqa: PLC0415  # optional
    from pgqueuer.db import AsyncpgDriver  # noqa: PLC0415
    from pgqueuer.queries import Queries  # noqa: PLC0415
    from pgqueuer.types import QueueExecutionMode  # noqa: PLC0415

    connection = await asyncpg.connect(_url(peer))
    try:
        driver = AsyncpgDriver(connection)
        queries = Queries(driver)
        if not await connection.fetchval("SELECT to_regclass('pgqueuer')"):
            await queries.install()
        queue = PgQueuer(driver)
        done = 0

        async def nothing(_: object) -> None:
            nonlocal done
            done += 1

        queue.entrypoint("nothing")(nothing)
        await queries.enqueue(["nothing"] * JOBS, [None] * JOBS, [0] * JOBS)
        start = time.perf_counter()
        await queue.run(batch_size=workers, mode=QueueExecutionMode.drain)
        assert done == JOBS
        return JOBS / (time.perf_counter() - start)
    finally:
        await connection.close()


def _url(peer: Database) -> str:
    assert peer.settings.database_url is not None  # the settings of test servers have a URL
    return peer.settings.database_url.get_secret_value()
