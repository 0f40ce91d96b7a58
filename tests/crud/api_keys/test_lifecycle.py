"""Creation, change, rotation, revocation and deletion of API keys."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from passlib.hash import ldap_salted_sha256
from pydantic import ValidationError
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from tests.support import factories
from tests.support.contexts import changed_context
from tests.support.recording import recorded
from tiger_db import APIKey, APIKeyScope, APIKeyStatus, AuditAction, Database
from tiger_db.crud import accounts, api_keys, audit_logs
from tiger_db.crud.api_keys import KeyChanges, lifecycle
from tiger_db.crud.audit_logs import record_event
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    APIKeyRevoked,
    ConfigurationError,
    InvalidAPIKey,
    InvalidFields,
    InvalidState,
    InvalidValue,
    MissingReference,
    NotFound,
    RateLimited,
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


async def test_an_expiry_that_has_passed_by_the_clock_of_the_database_is_refused(
    session: AsyncSession,
) -> None:
    now = (await session.execute(select(func.clock_timestamp()))).scalar_one()
    for past in (now, now - HOUR, datetime(1, 1, 2, tzinfo=UTC)):
        with pytest.raises(InvalidValue, match="expires_at must be in the future"):
            await api_keys.create_api_key(
                session, name="late", scopes=[APIKeyScope.MCP_READ], expires_at=past
            )
    assert (await api_keys.list_api_keys(session)).items == []
    key, _ = await factories.api_key(session, expires_at=now + HOUR)
    assert key.expires_at == now + HOUR


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
    "change",
    [
        api_keys.rotate,
        api_keys.revoke,
        partial(api_keys.update, expires_at=None),
        api_keys.activate,
        api_keys.deactivate,
        api_keys.delete,
    ],
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# Changing

FAR = datetime(2100, 1, 1, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)


async def actions(session: AsyncSession) -> list[str]:
    return [event.action for event in await factories.events(session)]


async def test_each_changeable_field_is_changed_with_one_event(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session, expires_at=FAR, rate_limit_per_hour=5)
    changed = await api_keys.update(
        session,
        key.id,
        name="trader",
        description="of the desk",
        scopes=(APIKeyScope.TRADE_READ,),
        allowed_ips=(network for network in ["10.0.0.0/8"]),
        allowed_user_agents={"claude/*"},
        rate_limit_per_hour=None,
        rate_limit_per_day=9,
        expires_at=None,
        tags={"team": {"a": 1}},
    )
    assert changed is key
    await session.refresh(key)
    new = {
        "name": "trader",
        "description": "of the desk",
        "scopes": ["trade:read"],
        "allowed_ips": ["10.0.0.0/8"],
        "allowed_user_agents": ["claude/*"],
        "rate_limit_per_hour": None,
        "rate_limit_per_day": 9,
        "expires_at": None,
        "tags": {"team": {"a": 1}},
    }
    assert new.keys() == KeyChanges.__annotations__.keys()
    assert key.model_dump(mode="json", include={*new}) == new
    old: dict[str, Any] = {
        "name": "assistant",
        "description": None,
        "scopes": ["mcp:read"],
        "allowed_ips": [],
        "allowed_user_agents": [],
        "rate_limit_per_hour": 5,
        "rate_limit_per_day": None,
        "expires_at": "2100-01-01T00:00:00Z",
        "tags": {},
    }
    _, event = await factories.events(session)
    assert (event.action, event.api_key_id) == (AuditAction.API_KEY_UPDATE, key.id)
    assert (event.old_values, event.new_values) == (old, new)
    assert await api_keys.authorize_api_key(
        session,
        raw_key,
        scopes=[APIKeyScope.TRADE_READ],
        ip_address="10.1.1.1",
        user_agent="claude/1",
    )


async def test_a_change_to_the_same_values_writes_nothing(
    database: Database, session: AsyncSession
) -> None:
    key, _ = await factories.api_key(
        session, expires_at=FAR, allowed_ips=["10.0.0.0/8"], tags={"a": [1]}
    )
    with recorded(database) as sent:
        await api_keys.update(
            session,
            key.id,
            name=key.name,
            scopes=["mcp:read"],  # type: ignore[list-item]  # a text as of a JSON document
            expires_at=FAR.astimezone(timezone(5 * HOUR)),
            allowed_ips=["10.0.0.0/8"],
            tags={"a": [1]},
        )
        await api_keys.update(session, key.id)
        await api_keys.activate(session, key.id)
    assert not [statement for statement in sent if not statement.startswith("SELECT")]
    assert await actions(session) == [AuditAction.API_KEY_CREATE]


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("id", "cannot change this field$"),
        ("created_at", "cannot change this field$"),
        ("updated_at", "cannot change this field$"),
        ("created_by", "cannot change this field$"),
        ("usage_count", "cannot change this field$"),
        ("last_used_at", "cannot change this field$"),
        ("root_id", "cannot change this field$"),
        ("mac", "tiger_db computes it$"),
        ("mac_denied_at", "cannot change this field$"),
        ("pepper_id", "cannot change this field$"),
        ("successor_id", "use `rotate`$"),
        ("key_prefix", "use `rotate`"),
        ("key_hash", "use `rotate`"),
        ("status", "use `activate`, `deactivate` or `revoke`"),
        ("revoked_at", "use `revoke`"),
        ("revocation_reason", "use `revoke`"),
        ("tiger_account_id", "use `create_api_key`"),
        ("nmae", "no field with this name"),
    ],
)
async def test_another_field_is_refused_by_name_and_changes_nothing(
    session: AsyncSession, field: str, hint: str
) -> None:
    key, _ = await factories.api_key(session)
    before = await everything_now(session)
    with pytest.raises(InvalidFields) as refused:
        await api_keys.update(session, key.id, name="new", **{field: "new"})  # type: ignore[arg-type]
    (problem,) = refused.value.errors()
    assert problem["loc"] == (field,)
    assert re.search(hint, problem["msg"])
    assert (key.name, await everything_now(session)) == ("assistant", before)


async def test_each_field_can_be_changed_or_is_tested_as_refused() -> None:
    parameters = test_another_field_is_refused_by_name_and_changes_nothing.pytestmark[0].args[1]  # type: ignore[attr-defined]
    refused = {field for field, _ in parameters} - {"nmae"}
    assert refused | KeyChanges.__annotations__.keys() == APIKey.model_fields.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", None),
        ("scopes", []),
        ("scopes", "mcp:read"),
        ("scopes", [None]),
        ("expires_at", datetime(2101, 1, 1)),  # noqa: DTZ001  # the point
        ("rate_limit_per_hour", 0),
        ("allowed_ips", ["10.0.0.1/8"]),
        ("allowed_ips", "10.0.0.0/8"),
        ("tags", {"a": float("nan")}),
        ("tags", None),
    ],
)
async def test_one_invalid_value_changes_no_field(
    session: AsyncSession, field: str, value: object
) -> None:
    key, _ = await factories.api_key(session)
    before = await everything_now(session)
    with pytest.raises(InvalidFields, match=field):
        await api_keys.update(session, key.id, description="new", **{field: value})  # type: ignore[arg-type]
    assert (key.description, await everything_now(session)) == (None, before)


async def test_a_change_that_the_database_refuses_changes_nothing(clone: Database) -> None:
    async with clone.session() as session:
        await session.execute(text("ALTER TABLE api_keys ADD CHECK (name <> 'bad')"))
        key, raw_key = await factories.api_key(session)
        before = await everything_now(session)
        with pytest.raises(InvalidValue):
            await api_keys.update(session, key.id, name="bad", description="new")
        assert (key.name, key.description) == ("assistant", None)
        assert await everything_now(session) == before
        assert await api_keys.verify_api_key(session, raw_key) is key


async def test_an_expiry_is_made_later_and_earlier(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    now = datetime.now(UTC)
    for expires_at in (now + HOUR, now + 9 * HOUR, now + timedelta(minutes=1), None):
        await api_keys.update(session, key.id, expires_at=expires_at)
        await session.refresh(key)
        assert key.expires_at == expires_at
        assert await api_keys.verify_api_key(session, raw_key) is key
    assert await actions(session) == [AuditAction.API_KEY_CREATE] + [AuditAction.API_KEY_UPDATE] * 4


@pytest.mark.parametrize("values", [{"expires_at": PAST}, {"status": "expired"}])
@pytest.mark.parametrize("expires_at", [None, FAR])
async def test_a_later_expiry_makes_an_expired_key_valid_again(
    session: AsyncSession, values: dict[str, Any], expires_at: datetime | None
) -> None:
    soon = datetime.now(UTC) + HOUR
    key, raw_key = await factories.api_key(session, expires_at=soon)
    key.sqlmodel_update(values)
    await session.flush()
    assert await api_keys.verify_api_key(session, raw_key) is None
    await api_keys.update(session, key.id, name="still expired")
    assert await api_keys.verify_api_key(session, raw_key) is None
    await api_keys.update(session, key.id, expires_at=expires_at)
    assert await api_keys.verify_api_key(session, raw_key) is key
    event = (await factories.events(session))[-1]
    assert event.action == AuditAction.API_KEY_UPDATE
    assert event.new_values is not None
    assert event.new_values["expires_at"] == (expires_at and "2100-01-01T00:00:00Z")
    assert event.old_values is not None
    assert event.old_values["expires_at"] is not None
    assert ("status" in event.new_values) == ("status" in values)


async def test_a_past_expiry_is_refused_by_the_clock_of_the_database(
    session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = await factories.api_key(session, expires_at=FAR)
    now = await session.scalar(text("SELECT clock_timestamp()"))
    with pytest.raises(InvalidValue, match=r"expires_at must be in the future.*`deactivate`"):
        await api_keys.update(session, key.id, name="new", expires_at=now)
    await session.refresh(key)
    assert (key.name, key.expires_at) == ("assistant", FAR)
    monkeypatch.setattr(lifecycle, "datetime", None)  # the local clock is not read
    await api_keys.update(session, key.id, expires_at=now + HOUR)


async def test_the_past_expiry_of_an_expired_key_can_stay(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session, expires_at=FAR)
    key.expires_at = PAST
    await api_keys.update(session, key.id, name="new", expires_at=PAST)
    await session.refresh(key)
    assert (key.name, key.expires_at) == ("new", PAST)


async def test_the_grace_of_a_replaced_key_is_shortened_but_not_prolonged(
    session: AsyncSession,
) -> None:
    key, raw_key = await factories.api_key(session)
    successor, _ = await api_keys.rotate(session, key.id)
    ends = key.expires_at
    assert ends is not None
    for later in (ends + timedelta(microseconds=1), None):
        with pytest.raises(InvalidState, match=f"replaced by {successor.id}.*prolonged"):
            await api_keys.update(session, key.id, name="new", expires_at=later)
    assert (key.name, key.expires_at) == ("assistant", ends)
    await api_keys.update(session, key.id, name="old", expires_at=ends - HOUR)
    assert (key.name, key.expires_at) == ("old", ends - HOUR)
    key.expires_at = PAST
    with pytest.raises(InvalidState, match="prolonged"):
        await api_keys.update(session, key.id, expires_at=FAR)
    assert await api_keys.verify_api_key(session, raw_key) is None
    await api_keys.update(session, successor.id, expires_at=FAR)


Change = Callable[[AsyncSession, UUID], Awaitable[object]]
RENEWALS: list[Change] = [
    partial(api_keys.update, name="new"),
    partial(api_keys.update, expires_at=None),
    api_keys.activate,
]


@pytest.mark.parametrize("change", [*RENEWALS, api_keys.deactivate, api_keys.update])
async def test_a_revoked_key_is_not_changed(session: AsyncSession, change: Change) -> None:
    key, _ = await factories.api_key(session, expires_at=FAR)
    await api_keys.revoke(session, key.id)
    before = await everything_now(session)
    with pytest.raises(InvalidState, match="revoked"):
        await change(session, key.id)
    assert await everything_now(session) == before


@pytest.mark.parametrize("change", RENEWALS)
async def test_a_key_of_a_closed_account_is_not_renewed(
    session: AsyncSession, change: Change
) -> None:
    account = await factories.account(session)
    key, raw_key = await factories.api_key(session, tiger_account_id=account.id, expires_at=FAR)
    await accounts.close(session, account.id)
    # The closing of the account has revoked the key.
    key.sqlmodel_update({"status": "inactive", "revoked_at": None})
    with pytest.raises(InvalidState, match="closed"):
        await change(session, key.id)
    assert (key.expires_at, key.status) == (FAR, APIKeyStatus.INACTIVE)
    assert await api_keys.verify_api_key(session, raw_key) is None


# Activating and deactivating


async def test_a_key_is_switched_off_and_on(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    assert await api_keys.deactivate(session, key.id, reason="on holiday") is key
    with pytest.raises(APIKeyRevoked):
        await api_keys.authorize_api_key(session, raw_key)
    assert await api_keys.activate(session, key.id) is key
    assert await api_keys.verify_api_key(session, raw_key) is key
    _, off, denied, on = await factories.events(session)
    assert denied.action == AuditAction.API_KEY_DENY
    assert [(e.action, e.api_key_id, e.old_values, e.new_values, e.details) for e in (off, on)] == [
        (
            AuditAction.API_KEY_DEACTIVATE,
            key.id,
            {"status": "active"},
            {"status": "inactive"},
            {"reason": "on holiday"},
        ),
        (
            AuditAction.API_KEY_ACTIVATE,
            key.id,
            {"status": "inactive"},
            {"status": "active"},
            None,
        ),
    ]


async def test_a_second_deactivation_writes_nothing(
    database: Database, session: AsyncSession
) -> None:
    key, _ = await factories.api_key(session)
    await api_keys.deactivate(session, key.id)
    with recorded(database) as sent:
        await api_keys.deactivate(session, key.id, reason="again")
    assert not [statement for statement in sent if not statement.startswith("SELECT")]
    assert await actions(session) == [AuditAction.API_KEY_CREATE, AuditAction.API_KEY_DEACTIVATE]


@pytest.mark.parametrize("status", APIKeyStatus)
async def test_an_expired_key_is_not_activated(session: AsyncSession, status: APIKeyStatus) -> None:
    key, _ = await factories.api_key(session, expires_at=FAR)
    key.sqlmodel_update({"status": status, "expires_at": PAST})
    with pytest.raises(InvalidState, match=r"revoked|expired: .*`update`"):
        await api_keys.activate(session, key.id)
    assert key.status == status


async def test_an_inactive_key_with_a_later_expiry_stays_inactive(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session, expires_at=FAR)
    await api_keys.deactivate(session, key.id)
    key.expires_at = PAST
    await api_keys.update(session, key.id, expires_at=None)
    assert await api_keys.verify_api_key(session, raw_key) is None
    await api_keys.activate(session, key.id)
    assert await api_keys.verify_api_key(session, raw_key) is key


# Deleting


async def test_a_deleted_key_leaves_its_events(session: AsyncSession) -> None:
    account = await factories.account(session)
    key, raw_key = await factories.api_key(
        session, tiger_account_id=account.id, tags={"team": "a"}, rate_limit_per_hour=5
    )
    await api_keys.authorize_api_key(session, raw_key)
    old = key.model_dump(mode="json", exclude={"created_at", "updated_at"})
    key_id, key_hash = key.id, key.key_hash
    await api_keys.delete(session, key_id, reason="no longer needed")
    assert await api_keys.get(session, key_id) is None
    assert await api_keys.usage(session, key_id, since=PAST) == []
    with pytest.raises(InvalidAPIKey):
        await api_keys.authorize_api_key(session, raw_key)
    found = await audit_logs.search(session, api_key_id=key_id)
    deleted, created = found.items
    assert (deleted.action, deleted.resource_id, deleted.tiger_account_id) == (
        AuditAction.API_KEY_DELETE,
        str(key_id),
        account.id,
    )
    assert (deleted.old_values, deleted.new_values, deleted.details) == (
        old,
        None,
        {"reason": "no longer needed"},
    )
    assert old.items() >= {"name": "assistant", "tags": {"team": "a"}, "usage_count": 1}.items()
    assert created.action == AuditAction.API_KEY_CREATE
    assert key_hash not in await everything_now(session)


@pytest.mark.parametrize("values", [{"status": s} for s in APIKeyStatus] + [{"expires_at": PAST}])
async def test_a_key_of_any_status_is_deleted(
    session: AsyncSession, values: dict[str, Any]
) -> None:
    key, _ = await factories.api_key(session)
    key.sqlmodel_update(values)
    await api_keys.delete(session, key.id)
    assert (await api_keys.list_api_keys(session)).items == []
    assert (await actions(session))[-1] == AuditAction.API_KEY_DELETE


@pytest.mark.slow
async def test_a_rollback_undoes_a_deletion(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await api_keys.delete(session, key.id)
            _ = 1 / 0
    async with clone.session() as session:
        assert await api_keys.verify_api_key(session, raw_key)
        assert await actions(session) == [AuditAction.API_KEY_CREATE]


@pytest.mark.parametrize("deleted", [[0], [1], [0, 1]])
async def test_the_deletion_of_replaced_keys_keeps_the_count_for_the_limit(
    clone: Database, deleted: list[int]
) -> None:
    async with clone.session() as session:
        first, first_key = await factories.api_key(session, rate_limit_per_day=3)
        await api_keys.authorize_api_key(session, first_key)
        second, second_key = await api_keys.rotate(session, first.id)
        await api_keys.authorize_api_key(session, second_key)
        _, third_key = await api_keys.rotate(session, second.id)
    async with clone.session() as session:
        for number in deleted:
            await api_keys.delete(session, (first, second)[number].id)
    async with clone.session() as session:
        await api_keys.authorize_api_key(session, third_key)
        with pytest.raises(RateLimited):
            await api_keys.authorize_api_key(session, third_key)


async def test_a_key_whose_successor_was_deleted_is_not_rotated_again(
    session: AsyncSession,
) -> None:
    key, raw_key = await factories.api_key(session)
    successor, _ = await api_keys.rotate(session, key.id)
    await api_keys.delete(session, successor.id)
    assert await api_keys.verify_api_key(session, raw_key) is key
    with pytest.raises(InvalidState, match="was replaced by"):
        await api_keys.rotate(session, key.id)


CHANGES: list[Change] = [
    *RENEWALS,
    api_keys.deactivate,
    api_keys.delete,
    api_keys.revoke,
    api_keys.rotate,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("other", CHANGES)
@pytest.mark.slow
async def test_concurrent_changes_of_a_key_end_without_a_conflict(
    crowd: Database, change: Change, other: Change
) -> None:
    """Each change locks the account before the key, or the key only, as does `accounts.close`."""
    async with crowd.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session, tiger_account_id=account.id, expires_at=FAR)

    async def run(work: Change, row_id: UUID) -> None:
        async with crowd.session() as session:
            await work(session, row_id)

    results = await asyncio.gather(
        run(change, key.id),
        run(other, key.id),
        run(accounts.close, account.id),
        return_exceptions=True,
    )
    assert not [r for r in results if r and not isinstance(r, (InvalidState, NotFound))], results
    async with crowd.session() as session:
        left = await api_keys.list_api_keys(session, status=APIKeyStatus.ACTIVE)
        assert left.items == []
