"""Benchmarks of listing accounts, whose secrets are decrypted on demand, and of re-encryption."""

import base64
import os
from typing import Any

import asyncpg
from sqlalchemy.orm import defer
from sqlmodel import col, select

from benchmarks.work import Work
from tiger_db import Database, TigerAccount, crud, encryption_key_rotation
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.models.secrets import CONTEXT, encrypted_columns

ACCOUNTS, PAGE = 10_000, 1000
# The secrets are as long as those of Tiger: a 2,048-bit key, and tokens of its API.
SECRETS: dict[str, Any] = {
    "tiger_id": "20150001",
    "private_key": base64.b64encode(os.urandom(1218)).decode(),
    "secret_key": base64.b64encode(os.urandom(24)).decode(),
    "access_token": base64.b64encode(os.urandom(43)).decode(),
    "refresh_token": base64.b64encode(os.urandom(43)).decode(),
}
LISTED = f"list {PAGE:,} accounts, compared with the same without secret columns"
ROTATED = f"re-encrypt {ACCOUNTS:,} accounts, compared with UPDATE … RETURNING in such batches"


async def fill(database: Database, accounts: int) -> None:
    async with database.session() as session:
        session.add_all(
            [
                TigerAccount(account_name="Bench", account_number=str(51230000 + n), **SECRETS)
                for n in range(accounts)
            ]
        )


async def works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    await fill(database, ACCOUNTS)
    mapper = TigerAccount.__mapper__  # type: ignore[attr-defined]  # SQLAlchemy's
    secrets = [name for name, _ in encrypted_columns(mapper)]
    without = select(TigerAccount).options(
        *(defer(getattr(TigerAccount, name), raiseload=True) for name in secrets)
    )

    async def listed() -> None:
        async with database.session() as session:
            assert len(await crud.accounts.list_accounts(session, limit=PAGE)) == PAGE

    async def listed_without() -> None:
        async with database.session() as session:
            rows = await session.scalars(
                without.order_by(col(TigerAccount.id).desc()).limit(PAGE + 1),
                execution_options={"populate_existing": True},
            )
            assert len(rows.all()) > PAGE

    assert database.settings.encryption_keys is not None
    stored_under = database.settings.encryption_keys.get_secret_value()
    ring = KeyRing.parse(f"{generate_key('new')},{stored_under}")
    database.info[CONTEXT] = database.info[CONTEXT]._replace(key_provider=ring)

    async def rotated() -> None:
        assert (await encryption_key_rotation.rotate(database)).rotated == ACCOUNTS

    stored = await pool.fetch("SELECT * FROM tiger_accounts ORDER BY id")
    columns = [*secrets, "tiger_id_fingerprint"]
    batches = [
        [
            [row[name] for row in stored[n : n + encryption_key_rotation.BATCH_ROWS]]
            for name in ("id", *columns)
        ]
        for n in range(0, ACCOUNTS, encryption_key_rotation.BATCH_ROWS)
    ]
    update = (
        f"UPDATE tiger_accounts AS a SET {', '.join(f'{name} = b.{name}' for name in columns)}"
        f" FROM unnest($1::uuid[], {', '.join(f'${n + 2}::bytea[]' for n in range(len(columns)))})"
        f" AS b(id, {', '.join(columns)}) WHERE a.id = b.id"
        f" RETURNING a.id, {', '.join(f'a.{name}' for name in columns)}"
    )

    async def updated() -> None:  # stores the old ciphertexts again
        for batch in batches:
            async with pool.acquire() as connection, connection.transaction():
                assert len(await connection.fetch(update, *batch)) == len(batch[0])

    return [
        Work(LISTED, listed, listed_without, times=1),
        Work(ROTATED, rotated, updated, times=1),
    ]
