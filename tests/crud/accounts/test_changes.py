"""Creation and update of accounts, and the default accounts."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from tests.support import factories
from tests.support.account_changes import CHANGES, SECRETS
from tests.support.contexts import changed_context
from tests.support.factories import plain
from tiger_db import AccountStatus, AuditAction, Database, MarketPermission, TigerAccount
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AlreadyExists,
    ConfigurationError,
    InvalidFields,
    InvalidValue,
    NotFound,
)

M = MarketPermission
NONSENSE: Any = "nonsense"


async def test_a_stored_account_is_usable_after_its_session(clone: Database) -> None:
    async with clone.session() as session:
        stored = await factories.account(session, **SECRETS, market_permissions=["US"])
    async with clone.session() as session:
        found = await accounts.get(session, stored.id)
        same = await accounts.get_by_account_number(session, stored.account_number)
    assert found is not None
    assert found is same
    assert found is not stored
    assert found.model_dump(mode="json") == stored.model_dump(mode="json")
    assert {name: getattr(found, name).get_secret_value() for name in SECRETS} == SECRETS


@pytest.mark.parametrize("change", CHANGES)
async def test_changing_an_unknown_account_raises_not_found(
    session: AsyncSession, change: str
) -> None:
    unknown = uuid4()
    with pytest.raises(NotFound, match=str(unknown)):
        await CHANGES[change](session, unknown)
    assert await factories.events(session) == []


EXISTS = {
    "account_number": "an account with this account number already exists",
    "is_default_trading": "a default account for trading already exists",
    "is_default_data": "a default account for market data already exists",
}


@pytest.mark.parametrize(
    "values",
    [
        {"account_number": "1234567"},
        {"is_default_trading": True},
        {"is_default_data": True},
    ],
)
async def test_a_duplicate_is_refused_and_the_transaction_continues(
    clone: Database, values: dict[str, Any]
) -> None:
    async with clone.session() as session:
        first = await factories.account(session, **values)
        (name,) = values
        with pytest.raises(AlreadyExists, match=rf"^{EXISTS[name]} \(uq_tiger_accounts_{name}\)$"):
            await factories.account(session, **values)
        other = await factories.account(session)
        with pytest.raises(AlreadyExists):
            await accounts.update(session, other.id, description="half done", **values)
        assert other.description is None
        last = await factories.account(session)
    async with clone.session() as session:
        stored = await accounts.list_accounts(session)
        assert [account.id for account in stored] == [last.id, other.id, first.id]
        assert stored.items[1].description is None
        created = [event.resource_id for event in await factories.events(session)]
        assert created == [str(account.id) for account in (first, other, last)]


async def test_a_refused_account_can_be_corrected_and_stored(session: AsyncSession) -> None:
    first = await factories.account(session)
    second = factories.new_account(account_number=first.account_number)
    with pytest.raises(AlreadyExists):
        await accounts.create(session, second)
    second.account_number = "77777"
    await accounts.create(session, second)
    stored = await accounts.get_by_account_number(session, "77777")
    assert stored is second
    assert plain(stored.private_key) == "test_key"


async def test_an_account_cannot_be_stored_without_an_encryption_key(database: Database) -> None:
    async with database.sessions(info=changed_context(database.info, key_provider=None)) as session:
        with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS"):
            await factories.account(session)
        with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS"):
            await accounts.list_by_tiger_id(session, "20150001")


async def test_an_update_changes_all_or_nothing(session: AsyncSession) -> None:
    account = await factories.account(session, description="before")
    with pytest.raises(ValidationError, match="account_name"):
        await accounts.update(session, account.id, description="after", account_name="x" * 101)
    assert account.description == "before"
    updated = await accounts.update(session, account.id, description="after", tags={"a": [1]})
    assert updated is account
    assert (updated.description, updated.tags) == ("after", {"a": [1]})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("unknown", 1, ValidationError),
        ("api_keys", [], ValidationError),
        ("tiger_id_fingerprint", b"", ValidationError),
        ("error_count", -1, ValidationError),
        ("error_count", 2**63, ValidationError),
        ("description", "a\0b", ValidationError),
        ("description", "\ud800", ValidationError),
        ("token_expires_at", datetime(2026, 1, 1), ValidationError),  # noqa: DTZ001
        (
            "token_expires_at",
            datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),
            ValidationError,
        ),
        ("id", uuid4(), InvalidValue),
        ("created_at", datetime.now(UTC), InvalidValue),
        ("updated_at", datetime.now(UTC), InvalidValue),
        ("status", "closed", InvalidValue),
    ],
)
async def test_an_update_refuses_invalid_values_and_fixed_fields(
    session: AsyncSession, name: str, value: Any, error: type[Exception]
) -> None:
    account = await factories.account(session)
    before = account.model_dump()
    with pytest.raises(error, match=name):
        await accounts.update(session, account.id, **{name: value})
    stored = await accounts.get(session, account.id)
    assert stored is not None
    assert stored.model_dump() == before
    assert len(await factories.events(session)) == 1


async def test_raw_sql_updates_updated_at_too(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    async with clone.session() as session:
        await session.execute(
            text("UPDATE tiger_accounts SET updated_at = '2000-01-01', description = 'raw'")
        )
    async with clone.session() as session:
        stored = await accounts.get(session, account.id)
    assert stored is not None
    assert stored.updated_at is not None
    assert account.updated_at is not None
    assert stored.updated_at > account.updated_at


async def test_the_reason_of_an_update_is_in_the_details_of_its_event(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    await accounts.update(session, account.id, description="new", reason="asked by Alice")
    await accounts.update(session, account.id, status=AccountStatus.INACTIVE, reason="on holiday")
    await accounts.update(session, account.id, status=AccountStatus.ACTIVE)
    events = (await factories.events(session))[1:]
    assert [(event.action, event.new_values, event.details) for event in events] == [
        (AuditAction.ACCOUNT_UPDATE, {"description": "new"}, {"reason": "asked by Alice"}),
        (AuditAction.ACCOUNT_STATUS_CHANGE, {"status": "inactive"}, {"reason": "on holiday"}),
        (AuditAction.ACCOUNT_STATUS_CHANGE, {"status": "active"}, None),
    ]
    assert "asked by Alice" not in str(account.model_dump())


@pytest.mark.parametrize("same", [{}, {"account_name": "Main"}, {"tags": {}, "status": "active"}])
async def test_a_reason_without_a_change_changes_nothing(
    clone: Database, same: dict[str, Any]
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        before = await factories.everything(session)
    async with clone.session() as session:
        await accounts.update(session, account.id, reason="no change", **same)
    async with clone.session() as session:
        assert await factories.everything(session) == before


async def test_an_update_with_the_same_secret_writes_no_event(session: AsyncSession) -> None:
    account = await factories.account(session, **SECRETS)
    await accounts.update(session, account.id, reason="no change", **SECRETS)
    assert len(await factories.events(session)) == 1


# Market permissions


async def test_market_permissions_are_added_and_removed_on_record(session: AsyncSession) -> None:
    account = await factories.account(session, market_permissions=["HK"])
    assert await accounts.add_market_permission(session, account.id, M.US) is account
    assert account.market_permissions == [M.HK, M.US]
    assert account.has_market_permission(M.US)
    assert await accounts.remove_market_permission(session, account.id, M.HK) is account
    assert account.market_permissions == [M.US]
    events = (await factories.events(session))[1:]
    assert [(event.action, event.old_values, event.new_values) for event in events] == [
        (
            AuditAction.ACCOUNT_UPDATE,
            {"market_permissions": ["HK"]},
            {"market_permissions": ["HK", "US"]},
        ),
        (
            AuditAction.ACCOUNT_UPDATE,
            {"market_permissions": ["HK", "US"]},
            {"market_permissions": ["US"]},
        ),
    ]


async def test_a_market_permission_is_added_and_removed_once(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session, market_permissions=["HK"])
        before = await factories.everything(session)
    async with clone.session() as session:
        await accounts.add_market_permission(session, account.id, M.HK)
        await accounts.remove_market_permission(session, account.id, M.US)
    async with clone.session() as session:
        assert await factories.everything(session) == before


@pytest.mark.parametrize("permission", ["XX", "us", None, 1, ["US"]])
async def test_an_unknown_market_is_refused(session: AsyncSession, permission: Any) -> None:
    account = await factories.account(session, market_permissions=["US"])
    for change in (accounts.add_market_permission, accounts.remove_market_permission):
        with pytest.raises(InvalidFields, match="permission"):
            await change(session, account.id, permission)
    assert account.market_permissions == [M.US]
    assert len(await factories.events(session)) == 1


# Defaults


@pytest.mark.parametrize(
    ("set_default", "get_default"),
    [
        (accounts.set_default_trading_account, accounts.get_default_trading_account),
        (accounts.set_default_data_account, accounts.get_default_data_account),
    ],
)
async def test_a_new_default_account_replaces_the_old_one(
    session: AsyncSession,
    set_default: Callable[[AsyncSession, UUID], Awaitable[TigerAccount]],
    get_default: Callable[[AsyncSession], Awaitable[TigerAccount | None]],
) -> None:
    first, second = await factories.account(session), await factories.account(session)
    for account, events in ((first, 1), (second, 2), (second, 0), (first, 2)):
        before = len(await factories.events(session))
        assert await set_default(session, account.id) is account
        assert await get_default(session) is account
        assert len(await factories.events(session)) == before + events


async def test_trading_and_data_have_separate_default_accounts(session: AsyncSession) -> None:
    first, second = await factories.account(session), await factories.account(session)
    await accounts.set_default_trading_account(session, first.id)
    await accounts.set_default_data_account(session, second.id)
    assert await accounts.get_default_trading_account(session) is first
    assert await accounts.get_default_data_account(session) is second
