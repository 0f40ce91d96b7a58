"""A column gets another type while a `Database` is open."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories, known_types
from tests.support.sql import sql
from tiger_db import Database, KeyVerifier, crud
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.errors import Conflict, TigerDBError
from tiger_db.sqlstates import is_transient, raw_errors

ALTER = (
    "ALTER TABLE tiger_accounts ALTER account_name TYPE varchar(90)",
    "ALTER TABLE api_keys ALTER name TYPE varchar(90), ALTER key_hash TYPE varchar(500)",
)


@pytest.fixture
async def clone(clone: Database) -> Database:
    """A Database without connections, whose next sessions all use the same connection."""
    await clone.close()
    return clone


async def list_accounts(session: AsyncSession, _account_id: UUID) -> object:
    return len((await crud.accounts.list_accounts(session)).items)


async def update(session: AsyncSession, account_id: UUID) -> object:
    account = await crud.accounts.update(session, account_id, description="changed")
    return account.id == account_id


async def select_rows(session: AsyncSession, _account_id: UUID) -> object:
    rows = await session.execute(text("SELECT * FROM tiger_accounts"))
    return len(rows.all())


async def in_a_running_transaction(session: AsyncSession, account_id: UUID) -> object:
    await session.execute(text("SELECT 1"))
    return await list_accounts(session, account_id)


Act = Callable[[AsyncSession, UUID], Awaitable[object]]


@pytest.mark.slow
@pytest.mark.parametrize("act", [list_accounts, update, select_rows, in_a_running_transaction])
async def test_a_transaction_after_the_change_is_a_conflict_that_can_be_repeated(
    clone: Database, act: Act
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)

    async def once() -> object:
        async with clone.session() as session:
            return await act(session, account.id)

    assert await once() == await once() == 1
    await sql(clone.settings, *ALTER)
    with pytest.raises(Conflict, match="the schema of the database was changed") as caught:
        await once()
    assert type(caught.value) is Conflict
    assert is_transient(caught.value)
    assert await once() == 1, "the statements are prepared again"


async def test_database_transaction_repeats_it(clone: Database) -> None:
    sessions: list[AsyncSession] = []

    async def work(session: AsyncSession) -> int:
        sessions.append(session)
        await factories.account(session)
        return len((await crud.accounts.list_accounts(session)).items)

    assert await clone.transaction(work) == 1
    await sql(clone.settings, *ALTER)
    assert await clone.transaction(work) == 2
    assert len(sessions) == 3


async def test_a_row_with_a_new_column_is_a_conflict(clone: Database) -> None:
    """It is the OutdatedSchemaCacheError of asyncpg."""

    async def rows() -> list[Any]:
        async with clone.session() as session:
            await factories.account(session)
            found = await session.execute(text("SELECT a FROM tiger_accounts AS a"))
            return list(found.all())

    await rows()
    await sql(clone.settings, "ALTER TABLE tiger_accounts ADD more text")
    known_types.forget()
    with pytest.raises(Conflict, match="the schema of the database was changed"):
        await rows()
    assert len(await rows()) == 2, "the failed transaction saved nothing"


@pytest.mark.slow
async def test_statements_that_bypass_sqlalchemy(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    connection = await connect(clone.settings)
    query = "SELECT * FROM api_keys"
    async with KeyVerifier(clone) as verifier:
        await verifier.authorize(raw_key)
        await connection.fetch(query)
        await sql(clone.settings, *ALTER)
        assert (await verifier.authorize(raw_key)).id == key.id
        async with clone.session() as session:
            assert (await crud.api_keys.authorize_api_key(session, raw_key)).id == key.id
        with raw_errors():
            assert len(await connection.fetch(query)) == 1, "asyncpg repeats it"
        await sql(clone.settings, "ALTER TABLE api_keys ALTER name TYPE varchar(80)")
        with pytest.raises(TigerDBError) as caught, raw_errors():
            async with connection.transaction():
                await connection.fetch(query)
        assert type(caught.value) is Conflict
    await connection.close()
