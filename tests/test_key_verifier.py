import asyncio
import time
from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import pytest
from passlib.hash import bcrypt
from sqlalchemy import event, text

from tests.support import factories
from tests.support.signing import sign_rows
from tests.support.verifiers import checkouts
from tiger_db import (
    AccountStatus,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    Database,
    KeyVerifier,
    Settings,
    crud,
)
from tiger_db.crud.api_keys.hashing import peppers_of
from tiger_db.errors import (
    AccessDenied,
    AccountNotAllowed,
    AddressNotAllowed,
    APIKeyRevoked,
    DatabaseUnavailable,
    InvalidAPIKey,
    InvalidValue,
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


@pytest.mark.slow
async def test_uses_are_counted_within_a_second_or_so(clone: Database) -> None:
    key, raw_key = await make_key(clone)
    verifier = KeyVerifier(clone)
    for check in (verifier.authorize, verifier.verify):
        accepted = await check(raw_key)
        assert accepted is not None
        assert accepted.id == key.id
    deadline = time.monotonic() + 5
    while (row := await stored(clone, key)).usage_count < 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert row.usage_count == 2
    assert row.last_used_at is not None


async def test_the_returned_key_is_usable_and_shows_no_hash(clone: Database) -> None:
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
async def test_every_field_of_the_request_is_checked(
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
    asked = {"scopes": [APIKeyScope.MCP_READ], "account_id": account.id}
    assert (await verifier.authorize(raw_key, **good | asked)).id == key.id
    assert await verifier.verify(raw_key, **good) is not None
    assert await verifier.verify(raw_key) is None
    await clone.close()  # writes the counts
    assert (await stored(clone, key)).usage_count == 2


async def test_no_answer_is_outdated(clone: Database) -> None:
    """Without memory, each answer follows the current row."""
    async with clone.session() as session:
        account = await factories.account(session)
    key, raw_key = await make_key(clone, tiger_account_id=account.id)
    verifier = KeyVerifier(clone)
    assert await verifier.verify(raw_key)
    for status, accepted in ((AccountStatus.SUSPENDED, False), (AccountStatus.ACTIVE, True)):
        async with clone.session() as session:
            await crud.accounts.update(session, account.id, status=status)
        assert (await verifier.verify(raw_key) is not None) == accepted
    async with clone.session() as session:
        await crud.api_keys.update(session, key.id, rate_limit_per_day=1)
    assert await verifier.verify(raw_key)  # a new limit counts from its first use on
    with pytest.raises(RateLimited) as limited:
        await verifier.authorize(raw_key)
    assert limited.value.retry_after > timedelta(0)
    async with clone.session() as session:
        await crud.api_keys.revoke(session, key.id)
    with pytest.raises(APIKeyRevoked):
        await verifier.authorize(raw_key)
    assert (await stored(clone, key)).status == APIKeyStatus.REVOKED


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_that_is_not_positive_is_refused(database: Database, capacity: int) -> None:
    with pytest.raises(InvalidValue, match="capacity"):
        KeyVerifier(database, memory=True, capacity=capacity)


async def test_a_call_uses_one_connection_and_starts_no_task(clone: Database) -> None:
    _, raw_key = await make_key(clone)
    tasks = asyncio.all_tasks()
    async with KeyVerifier(clone) as verifier:
        assert asyncio.all_tasks() == tasks
        assert await verifier.verify(raw_key)
        for _ in range(3):
            with checkouts(clone) as taken:
                assert await verifier.verify(raw_key)
            assert len(taken) == 1


@pytest.mark.parametrize("change", ["DISABLE TRIGGER USER", "ENABLE REPLICA TRIGGER notify_update"])
async def test_a_revocation_without_a_trigger_takes_effect_at_once(
    clone: Database, change: str
) -> None:
    key, raw_key = await make_key(clone)
    async with KeyVerifier(clone) as verifier:
        assert await verifier.verify(raw_key)
        async with clone.session() as session:
            await session.execute(text(f"ALTER TABLE api_keys {change}"))
            await session.execute(
                text("UPDATE api_keys SET status = 'revoked' WHERE id = :id"), {"id": key.id}
            )
        with pytest.raises(APIKeyRevoked):
            await verifier.authorize(raw_key)


async def test_the_least_recently_used_key_is_evicted_first(clone: Database) -> None:
    verifier = KeyVerifier(clone, capacity=3)
    keys = [await make_key(clone) for _ in range(4)]
    for number in (0, 1, 2, 0, 3):
        assert await verifier.verify(keys[number][1])
    assert {*verifier._digests} == {keys[n][0].id for n in (0, 2, 3)}


async def test_a_malformed_key_sends_no_statement(database: Database) -> None:
    verifier = KeyVerifier(database)
    with checkouts(database) as taken:
        with pytest.raises(InvalidAPIKey):
            await verifier.authorize("Bearer tdb_")
        assert await verifier.verify("") is None
    assert taken == []


async def test_the_database_stays_open(clone: Database) -> None:
    _, raw_key = await make_key(clone)
    async with KeyVerifier(clone):
        pass
    connections = clone.engine.pool.status()
    assert "Connections in pool: 1" in connections
    assert await KeyVerifier(clone).verify(raw_key)


async def test_errors_are_raised_when_the_verifier_is_entered(empty_database: Settings) -> None:
    async with Database(empty_database) as database:
        with pytest.raises(SchemaMismatch):
            await KeyVerifier(database).__aenter__()
    async with Database(Settings(db_host="/nowhere")) as database:
        with pytest.raises(DatabaseUnavailable):
            await KeyVerifier(database).__aenter__()


async def test_an_unavailable_database_is_no_denial(clone: Database) -> None:
    """A caller can tell a key that could not be checked from a denied key."""
    _, raw_key = await make_key(clone)
    pool = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 0.05}
    async with Database(clone.settings.model_copy(update=pool)) as database:
        verifier = KeyVerifier(database)
        assert await verifier.verify(raw_key)
        async with database.out_of_band.connection():
            with pytest.raises(DatabaseUnavailable):
                await verifier.verify(raw_key)
        assert await verifier.verify(raw_key)


async def test_a_pool_that_fills_up_while_a_hash_is_verified_is_an_unavailable_database(
    clone: Database,
) -> None:
    """A slow hash is verified in a thread, and replaced on a second connection."""
    _, raw_key = await make_key(clone)
    pool = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 0.05}
    async with Database(clone.settings.model_copy(update=pool)) as database:
        await database.check()
        secret = peppers_of(database.info).apply("test", raw_key.rpartition("_")[2])
        change = text("UPDATE api_keys SET key_hash = :hash")
        async with clone.session() as session:
            await session.execute(change, {"hash": bcrypt.using(rounds=4).hash(secret)})
            await sign_rows(session)
        given_back = asyncio.Event()
        engine = database.out_of_band.engine.sync_engine
        event.listen(engine, "checkin", lambda *_: given_back.set())
        verifying = asyncio.create_task(KeyVerifier(database).verify(raw_key))
        await given_back.wait()
        async with database.out_of_band.engine.connect():
            with pytest.raises(DatabaseUnavailable):
                await verifying
        assert await KeyVerifier(database).verify(raw_key)


async def test_a_first_use_uses_one_connection(clone: Database) -> None:
    _, raw_key = await make_key(clone)
    verifier = KeyVerifier(clone)
    with checkouts(clone) as taken:
        assert await verifier.verify(raw_key)
    assert len(taken) == 1


async def test_a_verification_does_not_wait_for_the_pool_of_sessions(clone: Database) -> None:
    _, raw_key = await make_key(clone)
    pool = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 0.05}
    async with Database(clone.settings.model_copy(update=pool)) as database:
        await database.check()
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            assert await KeyVerifier(database).verify(raw_key)


@pytest.mark.parametrize("memory", [False, True])
async def test_without_a_counted_use_only_the_limits_are_not_checked(
    clone: Database, memory: bool
) -> None:
    key, raw_key = await make_key(clone, scopes=[APIKeyScope.MCP_READ], rate_limit_per_hour=1)
    async with KeyVerifier(clone, memory=memory) as verifier:
        await verifier.authorize(raw_key)
        with pytest.raises(RateLimited):
            await verifier.authorize(raw_key)
        for _ in range(2):  # the second call can use the cache
            accepted = await verifier.authorize(
                raw_key, scopes=[APIKeyScope.MCP_READ], count_use=False
            )
            assert accepted.id == key.id
        with pytest.raises(ScopeMissing):
            await verifier.authorize(raw_key, scopes=[APIKeyScope.TRADE_READ], count_use=False)
    await clone.usage_counter.close()  # it writes in the background
    assert (await stored(clone, key)).usage_count == 1
    async with clone.session() as session:
        denials = await crud.audit_logs.search(session, action="api_key:deny")
    assert [event.error_code for event in denials] == ["ScopeMissing", "RateLimited"]
