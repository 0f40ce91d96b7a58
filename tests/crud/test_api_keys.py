import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from passlib.hash import ldap_salted_sha256
from pydantic import ValidationError

from tests import factories
from tiger_db import APIKeyScope, APIKeyStatus, AuditAction, Database
from tiger_db.crud import api_keys
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidState,
    InvalidValue,
    MissingReference,
    NotFound,
)

HOUR = timedelta(hours=1)


# Creating


async def test_a_key_is_256_random_bits(session: AsyncSession) -> None:
    raw_keys = [(await factories.api_key(session))[1] for _ in range(64)]
    forms = [re.fullmatch(r"(tdb_[0-9a-f]{16})_([0-9a-f]{64})", key) for key in raw_keys]
    secrets = [form[2] for form in forms if form]
    assert len(secrets) == 64
    ones, zeros = 0, 0
    for secret in secrets:
        ones |= int(secret, 16)
        zeros |= ~int(secret, 16)
    assert ones == zeros & (2**256 - 1) == 2**256 - 1  # each bit is set in some, unset in others
    quarters = {secret[at : at + 16] for secret in secrets for at in (0, 16, 32, 48)}
    assert len(quarters) == 4 * 64  # no part repeats


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
    assert ldap_salted_sha256.verify(raw_key.rpartition("_")[2], found.key_hash)


async def test_a_key_holds_what_was_asked_for(session: AsyncSession) -> None:
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
async def test_a_refused_value_is_named(session: AsyncSession, field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        await factories.api_key(session, **{field: value})
    assert (await api_keys.list_api_keys(session)).items == []


async def test_a_key_for_no_account_is_refused_and_the_transaction_goes_on(clone: Database) -> None:
    async with clone.session() as session:
        with pytest.raises(MissingReference, match="fk_api_keys_tiger_account_id"):
            await factories.api_key(session, tiger_account_id=uuid4())
        key, _ = await factories.api_key(session)
    async with clone.session() as session:
        assert [k.id for k in await api_keys.list_api_keys(session)] == [key.id]
        assert [e.api_key_id for e in await factories.events(session)] == [key.id]


async def test_lists(session: AsyncSession) -> None:
    account = await factories.account(session)
    bound, _ = await factories.api_key(session, tiger_account_id=account.id)
    free, _ = await factories.api_key(session)
    await api_keys.revoke(session, free.id)
    assert (await api_keys.list_api_keys(session)).items == [free, bound]
    assert (await api_keys.list_api_keys(session, status=APIKeyStatus.ACTIVE)).items == [bound]
    assert (await api_keys.get_keys_for_account(session, account.id)).items == [bound]
    assert (await api_keys.get_keys_for_account(session, uuid4())).items == []
    assert await api_keys.get(session, uuid4()) is None
    assert await api_keys.get_by_prefix(session, "tdb_none") is None


# Rotating and revoking


async def test_a_rotated_key_works_until_the_grace_ends(session: AsyncSession) -> None:
    key, old = await factories.api_key(
        session, rate_limit_per_hour=9, allowed_ips=["10.0.0.0/8"], tags={"a": {"b": 1}}
    )
    successor, new = await api_keys.rotate(session, key.id)
    same = {"id", "created_at", "updated_at", "key_prefix", "expires_at"}
    assert successor.model_dump(exclude=same) == key.model_dump(exclude=same)
    assert successor.expires_at is None
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
async def test_only_a_good_key_is_rotated(session: AsyncSession, values: dict[str, Any]) -> None:
    key, _ = await factories.api_key(session)
    key.sqlmodel_update(values)
    with pytest.raises(InvalidState):
        await api_keys.rotate(session, key.id)


async def test_revoked_is_final(session: AsyncSession) -> None:
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
    assert (await factories.events(session))[-1] is event


@pytest.mark.parametrize("reason", ["x" * 501, "a\0b"])
async def test_a_refused_reason_revokes_nothing(session: AsyncSession, reason: str) -> None:
    key, raw_key = await factories.api_key(session)
    with pytest.raises(ValidationError, match="revocation_reason"):
        await api_keys.revoke(session, key.id, reason=reason)
    assert await api_keys.verify_api_key(session, raw_key) is key


@pytest.mark.parametrize("change", [api_keys.rotate, api_keys.revoke])
async def test_changing_what_is_not_there_raises_not_found(
    session: AsyncSession, change: Callable[[AsyncSession, UUID], Awaitable[object]]
) -> None:
    with pytest.raises(NotFound):
        await change(session, uuid4())


async def test_what_is_rolled_back_was_neither_counted_nor_revoked(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await api_keys.verify_api_key(session, raw_key)
            await api_keys.revoke(session, key.id)
            _ = 1 / 0
    async with clone.session() as session:
        found = await api_keys.verify_api_key(session, raw_key)
        assert found is not None
        assert found.usage_count == 1
        assert len(await factories.events(session)) == 1
