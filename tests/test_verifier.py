from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tests import factories
from tests.conftest import recorded
from tiger_db import APIKey, APIKeyScope, APIKeyStatus, Database, KeyVerifier, Settings, crud
from tiger_db.errors import (
    AccessDenied,
    AccountNotAllowed,
    AddressNotAllowed,
    APIKeyRevoked,
    DatabaseUnavailable,
    InvalidAPIKey,
    RateLimited,
    SchemaMismatch,
    ScopeMissing,
    UserAgentNotAllowed,
)


async def make_key(database: Database, **values: Any) -> tuple[APIKey, str]:
    async with database.session() as session:
        return await factories.api_key(session, **values)


async def stored(database: Database, key: APIKey) -> APIKey:
    async with database.session() as session:
        row = await crud.api_keys.get(session, key.id)
    assert row is not None
    return row


async def test_a_use_is_counted_when_the_answer_is_given(clone: Database) -> None:
    key, raw_key = await make_key(clone)
    verifier = KeyVerifier(clone)
    for count, check in enumerate((verifier.authorize, verifier.verify), start=1):
        accepted = await check(raw_key)
        assert accepted is not None
        row = await stored(clone, key)
        assert (accepted.id, accepted.usage_count, row.usage_count) == (key.id, count, count)
        assert accepted.last_used_at == row.last_used_at is not None


async def test_the_key_is_usable_afterwards_and_shows_no_hash(clone: Database) -> None:
    _, raw_key = await make_key(clone, tags={"a": [1]})
    accepted = await KeyVerifier(clone).authorize(raw_key)
    await clone.close()
    assert accepted.has_scope(APIKeyScope.MCP_READ)
    assert accepted.tags == {"a": [1]}
    shown = f"{accepted!r} {accepted} {accepted.model_dump()} {accepted.model_dump_json()}"
    assert accepted.key_hash not in shown
    assert raw_key.rpartition("_")[2] not in shown


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"scopes": [APIKeyScope.TRADE_READ]}, ScopeMissing),
        ({"account_id": UUID(int=1)}, AccountNotAllowed),
        ({"ip_address": "11.0.0.1"}, AddressNotAllowed),
        ({"user_agent": "curl"}, UserAgentNotAllowed),
    ],
)
async def test_everything_asked_is_checked(
    clone: Database, request_: dict[str, Any], reason: type[AccessDenied]
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    key, raw_key = await make_key(
        clone,
        tiger_account_id=account.id,
        allowed_ips=["10.0.0.0/8"],
        allowed_user_agents=["claude/*"],
    )
    good: dict[str, Any] = {"ip_address": ip_address("10.0.0.1"), "user_agent": "claude/1"}
    verifier = KeyVerifier(clone)
    with pytest.raises(reason):
        await verifier.authorize(raw_key, **good | request_)
    assert (await stored(clone, key)).usage_count == 0
    asked = {"scopes": [APIKeyScope.MCP_READ], "account_id": account.id}
    assert (await verifier.authorize(raw_key, **good | asked)).usage_count == 1
    assert await verifier.verify(raw_key, **good) is not None
    assert await verifier.verify(raw_key) is None


async def test_no_answer_is_stale(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    key, raw_key = await make_key(clone, tiger_account_id=account.id)
    async with KeyVerifier(clone) as verifier:
        assert await verifier.verify(raw_key)
        for status, accepted in (("suspended", False), ("active", True)):
            async with clone.session() as session:
                await crud.accounts.update(session, account.id, status=status)
            assert (await verifier.verify(raw_key) is not None) == accepted
        async with clone.session() as session:
            await session.execute(text("UPDATE api_keys SET rate_limit_per_day = 2"))
        with pytest.raises(RateLimited) as limited:
            await verifier.authorize(raw_key)
        assert limited.value.retry_after > timedelta(0)
        async with clone.session() as session:
            await crud.api_keys.revoke(session, key.id)
        with pytest.raises(APIKeyRevoked):
            await verifier.authorize(raw_key)
    assert (await stored(clone, key)).status == APIKeyStatus.REVOKED


async def test_nonsense_costs_no_statement(database: Database) -> None:
    verifier = KeyVerifier(database)
    with recorded(database) as sent:
        with pytest.raises(InvalidAPIKey):
            await verifier.authorize("Bearer tdb_")
        assert await verifier.verify("") is None
    assert sent == []


async def test_the_database_stays_open(clone: Database) -> None:
    _, raw_key = await make_key(clone)
    async with KeyVerifier(clone):
        pass
    connections = clone.engine.pool.status()
    assert "Connections in pool: 1" in connections
    assert await KeyVerifier(clone).verify(raw_key)


async def test_what_is_wrong_is_told_at_the_start(empty_database: Settings) -> None:
    async with Database(empty_database) as database:
        with pytest.raises(SchemaMismatch):
            await KeyVerifier(database).__aenter__()
    async with Database(Settings(db_host="/nowhere")) as database:
        with pytest.raises(DatabaseUnavailable):
            await KeyVerifier(database).__aenter__()


async def test_no_answer_is_not_a_no(clone: Database) -> None:
    """A key that could not be checked was not refused: the caller must be able to tell."""
    _, raw_key = await make_key(clone)
    pool = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 0.05}
    async with Database(clone.settings.model_copy(update=pool)) as database:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(DatabaseUnavailable):
                await KeyVerifier(database).verify(raw_key)
        assert await KeyVerifier(database).verify(raw_key)
