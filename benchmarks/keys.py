"""Verifying an API key."""

import asyncpg
from passlib.context import CryptContext

from benchmarks.work import Work
from tiger_db import APIKeyScope, Database, crud

_hashes = CryptContext(schemes=["ldap_salted_sha256"])


async def works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    async with database.session() as session:
        _, raw_key = await crud.api_keys.create_api_key(
            session, name="bench", scopes=[APIKeyScope.MCP_READ]
        )
    prefix, _, secret = raw_key.rpartition("_")

    async def ours() -> None:
        async with database.session() as session:
            assert await crud.api_keys.verify_api_key(session, raw_key)

    async def plain() -> None:
        async with pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                "SELECT k.*, a.status AS account_status, clock_timestamp() AS now FROM api_keys k"
                " LEFT JOIN tiger_accounts a ON a.id = k.tiger_account_id WHERE key_prefix = $1",
                prefix,
            )
            assert row is not None
            assert _hashes.verify(secret, row["key_hash"])
            await connection.execute(
                "INSERT INTO api_key_usage AS u VALUES ($1, date_trunc('hour', $2, 'UTC'), 1)"
                " ON CONFLICT (api_key_id, hour) DO UPDATE SET count = u.count + 1",
                row["id"],
                row["now"],
            )
            await connection.execute(
                "UPDATE api_keys SET usage_count = usage_count + 1, last_used_at = $2"
                " WHERE id = $1",
                row["id"],
                row["now"],
            )

    return [Work("verify one key", ours, plain, times=100)]
