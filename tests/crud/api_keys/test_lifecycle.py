"""Creation, rotation, extension and revocation of API keys."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from passlib.hash import ldap_salted_sha256
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.support import factories
from tests.support.contexts import changed_context
from tiger_db import APIKey, APIKeyScope, APIKeyStatus, AuditAction, Database
from tiger_db.crud import accounts, api_keys
from tiger_db.crud.audit_logs import record_event
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    ConfigurationError,
    InvalidState,
    InvalidValue,
    MissingReference,
    NotFound,
)
from tiger_db.keys_in_force import API_KEY_PEPPERS, configured
from tiger_db.models.secrets import CONTEXT

HOUR = timedelta(hours=1)


# Creating


async def test_a_key_is_stored_only_as_a_hash_found_by_its_prefix(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
        await api_keys.verify_api_key(session, raw_key)
        _, rotated = await api_keys.rotate(session, key.id)
    async with clone.session() as session:
        stored = await factories.everything(session)
        found = await api_keys.get_by_prefix(session, raw_key.rpartition("_")[0])
    assert found is not None
    assert (found.id, found.key_prefix in stored) == (key.id, True)
    for secret in (raw_key.rpartition("_")[2], rotated.rpartition("_")[2]):
        for trace in (secret, secret.encode().hex(), secret.upper()):
            assert trace not in stored
    peppers, secret = configured(clone.settings, API_KEY_PEPPERS), raw_key.rpartition("_")[2]
    assert peppers is not None
    assert ldap_salted_sha256.verify(peppers.apply("test", secret), found.key_hash)
    assert not ldap_salted_sha256.verify(secret, found.key_hash)


async def test_a_new_key_has_the_given_fields(session: AsyncSession) -> None:
    account = await factories.account(session)
    asked: dict[str, Any] = {
        "name": 'the "assistant" 🐅',
        "scopes": [APIKeyScope.TRADE_READ, APIKeyScope.MCP_ADMIN],
        "tiger_account_id": account.id,
        "expires_at": datetime(2100, 1, 1, tzinfo=UTC),
        "rate_limit_per_hour": 10,
        "rate_limit_per_day": 2**40,
        "allowed_ips": ["10.0.0.0/8", "2001:db8::/32"],
        "allowed_user_agents": ["claude/*"],
        "created_by": "operator",
        "description": "for tests",
        "tags": {"team": ["a"]},
    }
    key, _ = await api_keys.create_api_key(session, **asked)
    stored = await api_keys.get(session, key.id)
    assert stored is not None
    assert {**stored.model_dump(include=set(asked)), "allowed_ips": None} == {
        **asked,
        "allowed_ips": None,
    }
    assert [str(network) for network in stored.allowed_ips] == asked["allowed_ips"]
    event = (await factories.events(session))[-1]
    assert (event.action, event.api_key_id) == (AuditAction.API_KEY_CREATE, key.id)
    assert event.new_values is not None
    assert event.new_values["name"] == key.name
    assert "key_hash" not in event.new_values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 101),
        ("scopes", []),
        ("scopes", ["mcp:fly"]),
        ("expires_at", datetime(2026, 1, 1)),  # noqa: DTZ001  # the point
        ("rate_limit_per_hour", 0),
        ("rate_limit_per_day", 2**63),
        ("allowed_ips", ["10.0.0.1/8"]),
        ("allowed_ips", ["nowhere"]),
        ("tags", {"a": float("nan")}),
    ],
)
async def test_the_error_names_an_invalid_field(
    session: AsyncSession, field: str, value: object
) -> None:
    with pytest.raises(ValidationError, match=field):
        await factories.api_key(session, **{field: value})
    assert (await api_keys.list_api_keys(session)).items == []


async def test_a_key_of_an_unknown_account_is_refused_and_the_transaction_continues(
    clone: Database,
) -> None:
    async with clone.session() as session:
        with pytest.raises(MissingReference, match="fk_api_keys_tiger_account_id"):
            await factories.api_key(session, tiger_account_id=uuid4())
        key, _ = await factories.api_key(session)
    async with clone.session() as session:
        assert [k.id for k in await api_keys.list_api_keys(session)] == [key.id]
        assert [e.api_key_id for e in await factories.events(session)] == [key.id]


# Rotating and revoking


async def test_a_rotated_key_works_until_the_grace_ends(session: AsyncSession) -> None:
    key, old = await factories.api_key(
        session, rate_limit_per_hour=9, allowed_ips=["10.0.0.0/8"], tags={"a": {"b": 1}}
    )
    successor, new = await api_keys.rotate(session, key.id)
    same = {"id", "created_at", "updated_at", "key_prefix", "expires_at", "root_id", "successor_id"}
    assert successor.model_dump(exclude=same) == key.model_dump(exclude=same)
    assert successor.expires_at is None
    assert (key.root_id, key.successor_id) == (None, successor.id)
    assert (successor.root_id, successor.successor_id) == (key.id, None)
    assert key.expires_at is not None
    assert timedelta(hours=23) < key.expires_at - datetime.now(UTC) <= timedelta(hours=24)
    for raw_key, row in ((old, key), (new, successor)):
        assert await api_keys.verify_api_key(session, raw_key, ip_address="10.0.0.1") is row
    event = (await factories.events(session))[-1]
    assert (event.action, event.resource_id) == (AuditAction.API_KEY_ROTATE, str(key.id))
    assert event.new_values == {
        "successor": str(successor.id),
        "expires_at": key.expires_at.isoformat(),
    }


async def test_a_key_rotated_without_grace_is_refused_at_once(session: AsyncSession) -> None:
    key, old = await factories.api_key(session)
    _, new = await api_keys.rotate(session, key.id, grace=timedelta(0))
    assert await api_keys.verify_api_key(session, old) is None
    assert await api_keys.verify_api_key(session, new)


async def test_a_grace_never_prolongs_a_key(session: AsyncSession) -> None:
    soon = datetime.now(UTC) + HOUR
    key, _ = await factories.api_key(session, expires_at=soon)
    successor, _ = await api_keys.rotate(session, key.id, grace=5 * HOUR)
    assert key.expires_at == successor.expires_at == soon


@pytest.mark.parametrize("grace", [timedelta(microseconds=-1), timedelta.max])
async def test_a_grace_out_of_range_is_refused(session: AsyncSession, grace: timedelta) -> None:
    key, _ = await factories.api_key(session)
    with pytest.raises(InvalidValue, match="grace"):
        await api_keys.rotate(session, key.id, grace=grace)
    assert (await api_keys.list_api_keys(session)).items == [key]


@pytest.mark.parametrize(
    "values",
    [
        {"status": "revoked"},
        {"status": "inactive"},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
    ],
)
async def test_only_an_active_key_is_rotated(session: AsyncSession, values: dict[str, Any]) -> None:
    key, _ = await factories.api_key(session)
    key.sqlmodel_update(values)
    with pytest.raises(InvalidState):
        await api_keys.rotate(session, key.id)


async def test_a_revocation_is_final(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    await api_keys.revoke(session, key.id, reason="leaked")
    revoked = key.model_dump()
    assert (key.status, key.revocation_reason) == (APIKeyStatus.REVOKED, "leaked")
    assert key.revoked_at is not None
    event = (await factories.events(session))[-1]
    assert (event.action, event.old_values, event.new_values) == (
        AuditAction.API_KEY_REVOKE,
        {"status": "active"},
        {"status": "revoked", "revocation_reason": "leaked"},
    )
    await api_keys.revoke(session, key.id, reason="again")
    with pytest.raises(InvalidState):
        await api_keys.rotate(session, key.id)
    assert await api_keys.verify_api_key(session, raw_key) is None
    assert key.model_dump() == revoked
    last, denied = (await factories.events(session))[-2:]
    assert (last, denied.action) == (event, AuditAction.API_KEY_DENY)


@pytest.mark.parametrize("reason", ["x" * 501, "a\0b"])
async def test_an_invalid_reason_revokes_nothing(session: AsyncSession, reason: str) -> None:
    key, raw_key = await factories.api_key(session)
    with pytest.raises(ValidationError, match="revocation_reason"):
        await api_keys.revoke(session, key.id, reason=reason)
    assert await api_keys.verify_api_key(session, raw_key) is key


@pytest.mark.parametrize(
    "change", [api_keys.rotate, api_keys.revoke, partial(api_keys.extend, expires_at=None)]
)
async def test_changes_of_an_unknown_key_raise_not_found(
    session: AsyncSession, change: Callable[[AsyncSession, UUID], Awaitable[object]]
) -> None:
    with pytest.raises(NotFound):
        await change(session, uuid4())


async def test_a_rollback_undoes_a_revocation_but_not_a_use(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            assert await api_keys.verify_api_key(session, raw_key)
            await api_keys.revoke(session, key.id)
            assert await api_keys.verify_api_key(session, raw_key) is None
            _ = 1 / 0
    await clone.close()  # writes the counts
    async with clone.session() as session:
        found = await api_keys.get(session, key.id)
        assert found is not None
        assert (found.status, found.usage_count) == (APIKeyStatus.ACTIVE, 1)
        assert found.last_used_at is not None
        created, denied = await factories.events(session)
        assert (created.action, denied.action) == (
            AuditAction.API_KEY_CREATE,
            AuditAction.API_KEY_DENY,
        )
        assert await api_keys.verify_api_key(session, raw_key)


async def everything_now(session: AsyncSession) -> str:
    """Flush the session, and return all rows."""
    await session.flush()
    return await factories.everything(session)


@pytest.mark.schema_changes
@pytest.mark.parametrize(
    "broken",
    [
        "ALTER TABLE api_keys ADD CHECK (expires_at IS NULL)",  # refuses the expiry of the old key
        "ALTER TABLE audit_logs ADD CHECK (action <> 'api_key:rotate')",  # refuses the event
        "ALTER TABLE api_keys ADD CHECK (name <> 'once') NOT VALID",  # refuses the successor
    ],
)
async def test_a_rotation_that_fails_leaves_the_old_key_as_it_was(
    clone: Database, broken: str
) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session, name="once")
    async with clone.session() as session:
        await session.execute(text(broken))
        found = await api_keys.get(session, key.id)
        assert found is not None
        before, stored = found.model_dump(), await everything_now(session)
        with pytest.raises((InvalidValue, IntegrityError)):
            await api_keys.rotate(session, key.id)
        assert found.model_dump() == before
        assert found.expires_at is None
        assert await everything_now(session) == stored
        assert await api_keys.verify_api_key(session, raw_key) is found
    async with clone.session() as session:
        assert [k.id for k in await api_keys.list_api_keys(session)] == [key.id]


async def test_a_rotation_without_peppers_leaves_the_old_key_as_it_was(
    session: AsyncSession,
) -> None:
    key, raw_key = await factories.api_key(session)
    before, stored = key.model_dump(), await everything_now(session)
    given = dict(session.info)
    session.info.update(changed_context(given, peppers=None))
    with pytest.raises(ConfigurationError, match="API_KEY_PEPPERS"):
        await api_keys.rotate(session, key.id)
    session.info.update(given)
    assert (key.model_dump(), await everything_now(session)) == (before, stored)
    assert await api_keys.verify_api_key(session, raw_key) is key


async def test_a_key_has_one_successor(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    successor, _ = await api_keys.rotate(session, key.id)
    before = await everything_now(session)
    for grace in (timedelta(0), 48 * HOUR):  # a second rotation, while the key still works
        with pytest.raises(InvalidState, match=str(successor.id)):
            await api_keys.rotate(session, key.id, grace=grace)
    assert await everything_now(session) == before
    assert await api_keys.verify_api_key(session, raw_key) is key
    third, _ = await api_keys.rotate(session, successor.id)
    assert third.root_id == successor.root_id == key.id
    await api_keys.revoke(session, third.id)
    with pytest.raises(InvalidState, match="was replaced by"):  # a revoked successor counts, too
        await api_keys.rotate(session, successor.id)


async def test_one_of_two_concurrent_rotations_succeeds(clone: Database) -> None:
    async with clone.session() as session:
        key, _ = await factories.api_key(session)
    both_have_read = asyncio.Barrier(2)

    async def rotate() -> object:
        async with clone.session() as session:
            assert await api_keys.get(session, key.id)
            await both_have_read.wait()
            return await api_keys.rotate(session, key.id)

    results = await asyncio.gather(rotate(), rotate(), return_exceptions=True)
    assert len([each for each in results if isinstance(each, InvalidState)]) == 1, results
    async with clone.session() as session:
        assert len(await api_keys.list_api_keys(session)) == 2


Use = Callable[[AsyncSession, APIKey, str], Awaitable[object]]


@pytest.mark.parametrize(
    "use",
    [
        lambda s, *_: factories.api_key(s),
        lambda s, key, _: api_keys.rotate(s, key.id),
        lambda s, _, raw: api_keys.authorize_api_key(s, raw),
        lambda s, _, raw: api_keys.verify_api_key(s, raw),
        lambda s, _, raw: api_keys.find_by_raw_key(s, raw),
        lambda s, *_: record_event(s, action=AuditAction.DATA_QUERY),
    ],
)
async def test_a_session_without_a_database_is_refused(session: AsyncSession, use: Use) -> None:
    key, raw_key = await factories.api_key(session)
    before = await everything_now(session)
    given = session.info.pop(CONTEXT)
    with pytest.raises(ConfigurationError, match=f"no '{CONTEXT}'.*info=database.info"):
        await use(session, key, raw_key)
    session.info[CONTEXT] = given
    assert await everything_now(session) == before


async def test_a_session_without_a_database_creates_no_key(clone: Database) -> None:
    """With the info of a Database, a session creates the same keys as those of the Database."""
    async with AsyncSession(clone.engine) as session:
        with pytest.raises(ConfigurationError, match=r"info=database\.info"):
            await factories.api_key(session)
    live = changed_context(clone.info, key_environment="live")
    async with AsyncSession(clone.engine, info=live, expire_on_commit=False) as session:
        key, raw_key = await factories.api_key(session)
        await session.commit()
        assert key.key_prefix.startswith("tdb_live_")
        assert await api_keys.authorize_api_key(session, raw_key)


# Extending


async def test_an_extended_key_works_longer(session: AsyncSession) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=30)
    key, raw_key = await factories.api_key(session, expires_at=soon)
    later = (soon + HOUR).astimezone(timezone(5 * HOUR))
    assert await api_keys.extend(session, key.id, expires_at=later) is key
    await session.refresh(key)
    assert key.expires_at == later
    event = (await factories.events(session))[-1]
    assert (event.action, event.api_key_id) == (AuditAction.API_KEY_UPDATE, key.id)
    assert event.old_values == {"expires_at": soon.isoformat()}
    assert event.new_values == {"expires_at": (soon + HOUR).isoformat()}
    await api_keys.extend(session, key.id, expires_at=None)
    await session.refresh(key)
    assert key.expires_at is None
    assert (await factories.events(session))[-1].new_values == {"expires_at": None}
    assert await api_keys.verify_api_key(session, raw_key) is key


@pytest.mark.parametrize(
    ("expires_at", "reason"),
    [
        (datetime(2099, 12, 31, tzinfo=UTC), "later"),
        (datetime(2100, 1, 1, tzinfo=UTC), "later"),
        (datetime(2101, 1, 1), "time zone"),  # noqa: DTZ001  # the point
    ],
)
async def test_a_key_is_extended_only_to_later(
    session: AsyncSession, expires_at: datetime, reason: str
) -> None:
    until = datetime(2100, 1, 1, tzinfo=UTC)
    key, _ = await factories.api_key(session, expires_at=until)
    with pytest.raises(InvalidValue, match=reason):
        await api_keys.extend(session, key.id, expires_at=expires_at)
    await session.refresh(key)
    assert key.expires_at == until
    assert [e.action for e in await factories.events(session)] == [AuditAction.API_KEY_CREATE]
    microsecond = until + timedelta(microseconds=1)
    assert (await api_keys.extend(session, key.id, expires_at=microsecond)).expires_at > until  # type: ignore[operator]  # it has one


@pytest.mark.parametrize("expires_at", [None, datetime(2100, 1, 1, tzinfo=UTC)])
async def test_a_key_that_never_expires_is_not_extended(
    session: AsyncSession, expires_at: datetime | None
) -> None:
    key, _ = await factories.api_key(session)
    with pytest.raises(InvalidValue, match="later"):
        await api_keys.extend(session, key.id, expires_at=expires_at)
    await session.refresh(key)
    assert key.expires_at is None


@pytest.mark.parametrize("expires_at", [None, datetime(2101, 1, 1, tzinfo=UTC)])
@pytest.mark.parametrize(
    "values",
    [
        {"status": "revoked"},
        {"status": "inactive"},
        {"status": "expired"},
        {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)},
    ],
)
async def test_only_an_active_key_is_extended(
    session: AsyncSession, values: dict[str, Any], expires_at: datetime | None
) -> None:
    key, raw_key = await factories.api_key(session, expires_at=datetime(2100, 1, 1, tzinfo=UTC))
    key.sqlmodel_update(values)
    before = key.expires_at
    with pytest.raises(InvalidState):
        await api_keys.extend(session, key.id, expires_at=expires_at)
    assert key.expires_at == before
    assert await api_keys.verify_api_key(session, raw_key) is None


async def test_a_key_of_a_closed_account_is_not_extended(session: AsyncSession) -> None:
    account = await factories.account(session)
    until = datetime(2100, 1, 1, tzinfo=UTC)
    key, _ = await factories.api_key(session, tiger_account_id=account.id, expires_at=until)
    await accounts.close(session, account.id)
    key.sqlmodel_update(
        {"status": "active", "revoked_at": None}
    )  # the closing of the account has revoked the key
    with pytest.raises(InvalidState, match="closed"):
        await api_keys.extend(session, key.id, expires_at=None)
    assert key.expires_at == until
