"""Benchmarks of checking API keys: from the database, with limits, from memory, and keyshield."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import cycle

import asyncpg
from keyshield.hasher.argon2 import Argon2ApiKeyHasher
from keyshield.repositories.sql import SqlAlchemyApiKeyRepository
from keyshield.services.base import ApiKeyService
from keyshield.services.cached import CachedApiKeyService
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from benchmarks.work import Work
from tiger_db import APIKey, APIKeyScope, Database, KeyVerifier, TigerAccount, crud

TASKS = 16
FEW, MANY = 1_000, 1_000_000
READ = (
    "SELECT k.*, a.status AS account_status, clock_timestamp() AS now FROM api_keys k"
    " LEFT JOIN tiger_accounts a ON a.id = k.tiger_account_id WHERE key_prefix = $1"
)
TAKE = (
    "INSERT INTO api_key_limits AS l (api_key_id, hour, hour_count, day, day_count)"
    " VALUES ($1, date_trunc('hour', now()), 1, date_trunc('day', now()), 1)"
    " ON CONFLICT (api_key_id) DO UPDATE SET hour_count = l.hour_count + 1 RETURNING hour_count"
)
FILL = (
    "INSERT INTO api_keys (id, name, key_prefix, key_hash, status, scopes, usage_count,"
    " allowed_ips, allowed_user_agents, tags)"
    " SELECT gen_random_uuid(), 'filler', 'tdb_test_' || left(md5(n::text), 12) || n,"
    " '{SSHA256}', 'active', '{mcp:read}', 0, '{}', '{}', '{}' FROM generate_series(1, $1::int) n"
)
Check = Callable[[], Awaitable[object]]


async def new_key(database: Database, **values: int) -> tuple[APIKey, str]:
    async with database.session() as session:
        return await crud.api_keys.create_api_key(
            session,
            name="bench",
            scopes=[APIKeyScope.MCP_READ],
            rate_limit_per_hour=values.get("per_hour"),
        )


def at_once(check: Check) -> Check:
    """Return a function that runs TASKS checks concurrently."""

    async def run() -> None:
        await asyncio.gather(*(check() for _ in range(TASKS)))

    return run


async def works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    key, raw_key = await new_key(database)
    limited, limited_raw = await new_key(database, per_hour=2**40)
    verifier = KeyVerifier(database)

    async def from_database() -> None:
        assert await verifier.verify(raw_key)

    async def in_a_session() -> None:
        async with database.session() as session:
            assert await crud.api_keys.verify_api_key(session, raw_key)

    async def within_limits() -> None:
        assert await verifier.verify(limited_raw)

    async def read() -> None:
        async with pool.acquire() as connection:
            assert await connection.fetchrow(READ, key.key_prefix)

    async def take() -> None:
        async with pool.acquire() as connection:
            assert await connection.fetchval(TAKE, limited.id)

    async def orm() -> None:
        async with AsyncSession(database.engine) as session:
            statement = (
                select(APIKey, col(TigerAccount.status))
                .outerjoin(TigerAccount, col(APIKey.tiger_account_id) == col(TigerAccount.id))
                .where(col(APIKey.key_prefix) == key.key_prefix)
            )
            row = (await session.execute(statement)).one()[0]
            row.usage_count += 1
            row.last_used_at = await session.scalar(select(func.now()))
            await session.commit()

    return [
        Work("check a key, from the database", from_database, read, times=200),
        Work("check a key, session and commit included", in_a_session, read, times=100),
        Work(
            "check a key with limits, compared with INSERT … ON CONFLICT", within_limits, take, 200
        ),
        Work(
            f"{TASKS} concurrent checks, compared with SQLAlchemy: select, update, commit",
            at_once(from_database),
            at_once(orm),
            times=5,
        ),
    ]


@asynccontextmanager
async def memory_works(
    database: Database, pool: "asyncpg.Pool[asyncpg.Record]"
) -> AsyncIterator[list[Work]]:
    key, raw_key = await new_key(database)
    async with KeyVerifier(database, memory=True) as verifier:

        async def ours() -> None:
            assert await verifier.authorize(raw_key, scopes=[APIKeyScope.MCP_READ])

        async def read() -> None:
            async with pool.acquire() as connection:
                assert await connection.fetchrow(READ, key.key_prefix)

        yield [Work("check a key, from memory", ours, read, times=1000)]


@asynccontextmanager
async def keyshield_works(database: Database, peer: Database) -> AsyncIterator[list[Work]]:
    """Compare with keyshield: with its defaults, without its delays, and with its cache."""
    _, raw_key = await new_key(database)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hasher = Argon2ApiKeyHasher(pepper="pepper")
    async with AsyncSession(peer.engine) as session:
        repository = SqlAlchemyApiKeyRepository(session)
        await repository.ensure_table(peer.engine)
        _, peer_key = await ApiKeyService(repository, hasher).create(name="bench")
        await session.commit()

    def theirs(kind: type[ApiKeyService], **options: object) -> Check:
        async def check() -> None:
            async with AsyncSession(peer.engine) as session:
                service = kind(SqlAlchemyApiKeyRepository(session), hasher, **options)  # type: ignore[arg-type]  # numbers
                assert await service.verify_key(peer_key)
                await session.commit()

        return check

    asking = KeyVerifier(database)

    async def from_database() -> None:
        assert await asking.verify(raw_key)

    async with KeyVerifier(database, memory=True) as verifier:

        async def from_memory() -> None:
            assert await verifier.verify(raw_key)

        import aiocache  # noqa: PLC0415  # keyshield requires aiocache

        best = {"min_delay": 0.0, "max_delay": 0.0, "cache": aiocache.SimpleMemoryCache()}
        yield [
            Work(
                "check a key, compared with keyshield's defaults",
                from_database,
                theirs(ApiKeyService),
                times=1,
            ),
            Work(
                "check a key, compared with keyshield without delays",
                from_database,
                theirs(ApiKeyService, min_delay=0.0, max_delay=0.0),
                times=5,
            ),
            Work(
                "check a key, from memory, compared with keyshield without delays and with a cache",
                from_memory,
                theirs(CachedApiKeyService, **best),
                times=50,
            ),
        ]


async def fill(database: Database, keys: int) -> list[str]:
    """Fill the database up to a number of keys, and return 100 of the raw keys."""
    await database.check()
    async with database.out_of_band.connection() as connection:
        await connection.execute(FILL, keys - 100)
        await connection.execute("ANALYZE api_keys")
    return [(await new_key(database))[1] for _ in range(100)]


async def depth_work(few: Database, many: Database) -> Work:
    """Compare checks among a million keys with checks among a thousand keys."""

    async def checks(database: Database, keys: int) -> Check:
        texts = cycle(await fill(database, keys))
        verifier = KeyVerifier(database)

        async def check() -> None:
            assert await verifier.verify(next(texts))

        return check

    return Work(
        f"check a key among {MANY:,}, compared with among {FEW:,}",
        await checks(many, MANY),
        await checks(few, FEW),
        times=300,
    )
