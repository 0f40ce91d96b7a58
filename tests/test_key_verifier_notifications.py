"""Notifications of changes of API keys, and their effect on a KeyVerifier."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.verifiers import OTHER
from tiger_db import Database, KeyVerifier, crud
from tiger_db.connections import connect
from tiger_db.crud.api_keys.policy import KeyPermissions
from tiger_db.crud.api_keys.rate_limits import consume
from tiger_db.errors import InvalidAPIKey
from tiger_db.key_verifier import CHANNEL

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
# Columns of an account, none of which decides on a key.
OF_ACCOUNTS = ("account_name = 'another'", "error_count = 3", "description = 'another'")


class Received:
    """The notifications that a listening connection receives."""

    def __init__(self, teller: Connection) -> None:
        self.teller = teller
        self.payloads: list[str] = []

    def hear(self, *notification: Any) -> None:
        self.payloads.append(str(notification[-1]))

    async def since_last(self) -> list[str]:
        """Return the notifications of all earlier commits: they arrive in the order of commits."""
        await self.teller.execute("SELECT pg_notify($1, 'end')", CHANNEL)
        deadline = asyncio.get_running_loop().time() + 5
        while "end" not in self.payloads:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.001)
        received, self.payloads = self.payloads[:-1], []
        return received


@pytest.fixture
async def other(clone: Database) -> AsyncIterator[Connection]:
    connection = await connect(clone.settings)
    yield connection
    await connection.close()


@pytest.fixture
async def received(clone: Database, other: Connection) -> AsyncIterator[Received]:
    listener = await connect(clone.settings)
    received = Received(other)
    await listener.add_listener(CHANNEL, received.hear)
    yield received
    await listener.remove_listener(CHANNEL, received.hear)
    await listener.close()


@pytest.mark.parametrize("role", ["origin", "replica"])
async def test_every_change_of_a_key_is_notified(
    clone: Database, received: Received, other: Connection, role: str
) -> None:
    async with clone.session() as session:
        await factories.account(session)
        key, _ = await factories.api_key(session)
        unchanged, _ = await factories.api_key(session)
    assert await received.since_last() == []  # new keys are not cached anywhere
    await other.execute(f"SET session_replication_role = {role}")
    for column, value in OTHER.items():
        await other.execute(f"UPDATE api_keys SET {column} = {value} WHERE id = $1", key.id)
        assert (column, await received.since_last()) == (column, [f"key {key.id}"])
    await other.execute("UPDATE api_keys SET usage_count = 8, last_used_at = now()")
    await other.execute("UPDATE api_keys SET updated_at = now(), name = name")
    assert await received.since_last() == []
    await other.execute("DELETE FROM api_keys WHERE id = $1", unchanged.id)
    assert await received.since_last() == [f"key {unchanged.id}"]
    await other.execute("TRUNCATE api_keys CASCADE")
    assert await received.since_last() == ["all"]


@pytest.mark.parametrize("role", ["origin", "replica"])
async def test_changes_that_end_an_account_are_notified(
    clone: Database, received: Received, other: Connection, role: str
) -> None:
    async with clone.session() as session:
        first, second = [await factories.account(session) for _ in range(2)]
        key, _ = await factories.api_key(session, tiger_account_id=second.id)
    await other.execute(f"SET session_replication_role = {role}")
    for change in OF_ACCOUNTS:
        await other.execute(f"UPDATE tiger_accounts SET {change}")
    assert await received.since_last() == []
    await other.execute("UPDATE tiger_accounts SET status = 'suspended' WHERE id = $1", first.id)
    assert await received.since_last() == [f"account {first.id}"]
    await other.execute("DELETE FROM api_keys WHERE id = $1", key.id)
    await other.execute("DELETE FROM tiger_accounts WHERE id = $1", second.id)
    assert await received.since_last() == [f"key {key.id}", f"account {second.id}"]
    await other.execute("TRUNCATE tiger_accounts CASCADE")
    assert "all" in await received.since_last()


async def test_changes_of_renamed_tables_are_notified(
    clone: Database, received: Received, other: Connection
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session)
    await other.execute("ALTER TABLE api_keys RENAME TO api_keys_102008")
    await other.execute("ALTER TABLE tiger_accounts RENAME TO api_keys")
    await other.execute("UPDATE api_keys_102008 SET status = 'revoked'")
    assert await received.since_last() == [f"key {key.id}"]
    await other.execute("UPDATE api_keys SET status = 'suspended'")
    assert await received.since_last() == [f"account {account.id}"]
    await other.execute("DELETE FROM api_keys_102008")
    await other.execute("DELETE FROM api_keys")
    assert await received.since_last() == [f"key {key.id}", f"account {account.id}"]


async def test_a_change_that_is_rolled_back_is_not_notified(
    clone: Database, received: Received, other: Connection
) -> None:
    async with clone.session() as session:
        await factories.api_key(session)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("UPDATE api_keys SET status = 'revoked'")
    await other.execute("DELETE FROM api_keys")
    await transaction.rollback()
    assert await received.since_last() == []


async def test_each_function_notifies_its_changes(clone: Database, received: Received) -> None:
    soon = datetime.now(UTC) + timedelta(days=1)
    async with clone.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session, expires_at=soon, tiger_account_id=account.id)
    assert await received.since_last() == []
    async with clone.session() as session:
        await crud.api_keys.update(session, key.id, expires_at=soon + timedelta(days=1))
    assert await received.since_last() == [f"key {key.id}"]
    for change in (crud.api_keys.deactivate, crud.api_keys.activate):
        for expected in ([f"key {key.id}"], []):  # the second call changes nothing
            async with clone.session() as session:
                await change(session, key.id)
            assert await received.since_last() == expected
    async with clone.session() as session:
        successor, _ = await crud.api_keys.rotate(session, key.id)
    assert await received.since_last() == [f"key {key.id}"]
    async with clone.session() as session:
        await crud.api_keys.revoke(session, key.id)
    assert await received.since_last() == [f"key {key.id}"]
    async with clone.session() as session:
        await crud.api_keys.revoke(session, key.id)  # the key is revoked
    assert await received.since_last() == []
    async with clone.session() as session:
        await crud.accounts.close(session, account.id)
    assert {*await received.since_last()} == {f"account {account.id}", f"key {successor.id}"}
    async with clone.session() as session:
        await crud.api_keys.delete(session, key.id)
    assert await received.since_last() == [f"key {key.id}"]


async def test_a_use_is_not_notified(clone: Database, received: Received) -> None:
    async with clone.session() as session:
        _, unlimited = await factories.api_key(session)
        _, limited = await factories.api_key(session, rate_limit_per_day=9)
    for raw_key in (unlimited, limited):
        async with clone.session() as session:
            assert await crud.api_keys.verify_api_key(session, raw_key)
    await clone.close()
    async with clone.session() as session:
        assert await session.scalar(text("SELECT min(usage_count) FROM api_keys")) == 1
    assert await received.since_last() == []


@pytest.mark.parametrize("uses", [0, 1])
async def test_a_limited_key_that_is_deleted_during_a_call_is_refused(
    clone: Database, uses: int
) -> None:
    """The key is deleted between the reading of its row and the count of its use."""
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session, rate_limit_per_hour=9)
    verifier = KeyVerifier(clone)
    for _ in range(uses):
        assert await verifier.verify(raw_key)
    async with clone.session() as session:
        permissions = KeyPermissions.of(key, None)
        await session.execute(text("DELETE FROM api_keys WHERE id = :id"), {"id": key.id})
    async with clone.out_of_band.connection() as connection:
        assert not await consume(connection, permissions)
    with pytest.raises(InvalidAPIKey):
        await verifier.authorize(raw_key)


@pytest.mark.parametrize("payload", ["table {}", "keys {}", "{}"])
async def test_an_unknown_notification_clears_the_cache(clone: Database, payload: str) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    async with KeyVerifier(clone, memory=True) as verifier:
        await verifier.authorize(raw_key)
        assert verifier._cache
        verifier._handle_notification(payload.format(key.id))
        assert not verifier._cache
