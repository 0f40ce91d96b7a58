from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError

from tests.support import factories
from tests.support.account_changes import CHANGES, SECRETS
from tests.support.contexts import changed_context
from tests.support.factories import plain
from tiger_db import (
    AccountStatus,
    AccountType,
    APIKeyStatus,
    Database,
    TigerAccount,
    TigerEnvironment,
    TokenRefreshStatus,
    crud,
)
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AlreadyExists,
    ConfigurationError,
    InvalidState,
    InvalidValue,
    NotFound,
    TigerDBError,
)

NONSENSE: Any = "nonsense"


async def test_an_account_is_stored_and_usable_after_its_session(clone: Database) -> None:
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


async def test_looking_up_what_is_not_there_returns_none(session: AsyncSession) -> None:
    assert await accounts.get(session, uuid4()) is None
    assert await accounts.get_by_account_number(session, "no 'such\" account 🐅") is None
    assert await accounts.get_default_trading_account(session) is None
    assert await accounts.get_default_data_account(session) is None
    assert await accounts.list_by_tiger_id(session, "none") == []
    assert await accounts.list_by_tiger_id(session, "\ud800") == []


@pytest.mark.parametrize("change", CHANGES)
async def test_changing_what_is_not_there_raises_not_found(
    session: AsyncSession, change: str
) -> None:
    unknown = uuid4()
    with pytest.raises(NotFound, match=str(unknown)):
        await CHANGES[change](session, unknown)
    assert await factories.events(session) == []


@pytest.mark.parametrize(
    "values",
    [
        {"account_number": "1234567"},
        {"is_default_trading": True},
        {"is_default_data": True},
    ],
)
async def test_a_duplicate_is_refused_and_the_transaction_goes_on(
    clone: Database, values: dict[str, Any]
) -> None:
    async with clone.session() as session:
        first = await factories.account(session, **values)
        with pytest.raises(AlreadyExists, match=f"uq_tiger_accounts_{next(iter(values))}"):
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
    second.account_number = "another"
    await accounts.create(session, second)
    stored = await accounts.get_by_account_number(session, "another")
    assert stored is second
    assert plain(stored.private_key) == "test_key"


async def test_without_keys_no_secret_is_stored(database: Database) -> None:
    async with database.sessions(info=changed_context(database.info, key_provider=None)) as session:
        with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS"):
            await factories.account(session)
        with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS"):
            await accounts.list_by_tiger_id(session, "20150001")


async def test_named_relationships_are_loaded_and_others_raise(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session, tiger_account_id=account.id)
        refresh = await factories.refresh(session, account)
    async with clone.session() as session:
        loaded = await accounts.get(session, account.id, load=["api_keys", "token_statuses"])
        assert loaded is not None
    assert [k.id for k in loaded.api_keys] == [key.id]
    assert [r.id for r in loaded.token_statuses] == [refresh.id]
    async with clone.session() as session:
        bare = await accounts.get_by_account_number(session, account.account_number)
        with pytest.raises(InvalidRequestError, match="lazy='raise'"):
            _ = bare and bare.api_keys


@pytest.mark.parametrize("load", [["nothing"], ["account_name"], "api_keys"])
async def test_an_unknown_relationship_is_refused(
    session: AsyncSession, load: list[str] | str
) -> None:
    with pytest.raises(InvalidValue, match="has no relationship"):
        await accounts.get(session, uuid4(), load=load)


async def test_all_accounts_of_a_tiger_id_are_found(session: AsyncSession) -> None:
    first = await factories.account(session, tiger_id="1")
    await factories.account(session, tiger_id="2")
    third = await factories.account(session, tiger_id="2")
    await accounts.update(session, third.id, tiger_id="1")
    assert await accounts.list_by_tiger_id(session, "1") == [first, third]


async def test_lists_match_every_criterion(session: AsyncSession) -> None:
    first = await factories.account(session)
    second = await factories.account(session, environment="SANDBOX")
    third = await factories.account(session, status="suspended", account_number="U1")

    async def listed(**criteria: Any) -> list[TigerAccount]:
        return (await accounts.list_accounts(session, **criteria)).items

    assert await listed() == [third, second, first]
    assert await listed(status=AccountStatus.ACTIVE) == [second, first]
    assert await listed(environment=TigerEnvironment.SANDBOX) == [second]
    assert await listed(account_type=AccountType.GLOBAL) == [third]
    assert await listed(status=AccountStatus.SUSPENDED, environment=TigerEnvironment.SANDBOX) == []


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
        ("token_expires_at", datetime(2026, 1, 1), ValidationError),  # noqa: DTZ001  # the point
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
async def test_an_update_refuses(
    session: AsyncSession, name: str, value: object, error: type[Exception]
) -> None:
    account = await factories.account(session)
    before = account.model_dump()
    with pytest.raises(error, match=name):
        await accounts.update(session, account.id, **{name: value})
    stored = await accounts.get(session, account.id)
    assert stored is not None
    assert stored.model_dump() == before
    assert len(await factories.events(session)) == 1


async def test_the_database_keeps_updated_at_for_raw_sql_too(clone: Database) -> None:
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


# Defaults


@pytest.mark.parametrize(
    ("set_default", "get_default"),
    [
        (accounts.set_default_trading_account, accounts.get_default_trading_account),
        (accounts.set_default_data_account, accounts.get_default_data_account),
    ],
)
async def test_a_default_takes_the_place_of_the_one_that_was(
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


async def test_the_two_defaults_are_apart(session: AsyncSession) -> None:
    first, second = await factories.account(session), await factories.account(session)
    await accounts.set_default_trading_account(session, first.id)
    await accounts.set_default_data_account(session, second.id)
    assert await accounts.get_default_trading_account(session) is first
    assert await accounts.get_default_data_account(session) is second


# Tokens and errors


async def test_accounts_needing_a_refresh_come_soonest_first(session: AsyncSession) -> None:
    now = datetime.now(UTC)

    async def expiring(minutes: int, **overrides: Any) -> TigerAccount:
        at = now + timedelta(minutes=minutes)
        return await factories.account_with_token(session, token_expires_at=at, **overrides)

    soon, expired, later = await expiring(50), await expiring(-50), await expiring(120)
    await expiring(5, status="suspended")
    await expiring(5, access_token=None)
    await factories.account(session, access_token="no expiry known")
    await session.execute(text("SET LOCAL enable_indexscan = off"))  # no order by chance
    needing = accounts.get_accounts_needing_token_refresh
    assert await needing(session) == [expired, soon]
    assert await needing(session, within=timedelta(hours=3)) == [expired, soon, later]
    assert await needing(session, within=timedelta(hours=3), limit=1) == [expired]


async def test_new_tokens_leave_an_old_refresh_token_unless_one_comes(
    session: AsyncSession,
) -> None:
    account = await factories.account(session, refresh_token="r1")
    expiry = datetime(2027, 1, 1, tzinfo=timezone(timedelta(hours=8)))
    await accounts.update_tokens(session, account.id, access_token="a2", token_expires_at=expiry)
    assert account.refresh_token is not None
    assert account.refresh_token.get_secret_value() == "r1"
    assert account.token_expires_at == expiry
    await accounts.update_tokens(session, account.id, access_token="a3", refresh_token="r3")
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == "a3"
    assert account.refresh_token.get_secret_value() == "r3"
    assert account.token_expires_at is None


@pytest.mark.parametrize(
    "values",
    [
        {"access_token": ""},
        {"access_token": "**********"},
        {"access_token": "a", "refresh_token": ""},
        {"access_token": "a", "token_expires_at": datetime(2026, 1, 1)},  # noqa: DTZ001
    ],
)
async def test_refused_tokens_change_nothing(session: AsyncSession, values: Any) -> None:
    account = await factories.account_with_token(session)
    with pytest.raises(ValidationError):
        await accounts.update_tokens(session, account.id, **values)
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == "token-1"


async def test_errors_are_counted_until_reset(session: AsyncSession) -> None:
    account = await factories.account(session)
    for message in ("first", "naïve \0 \ud800 🐅"):
        await accounts.record_error(session, account.id, message=message)
    assert account.error_count == 2
    assert account.last_error is not None
    assert account.last_error.startswith("naïve")
    assert account.last_error.endswith("🐅")
    assert account.last_error_at is not None
    await accounts.reset_errors(session, account.id)
    assert account.error_count == 0
    assert account.last_error is None
    assert account.last_error_at is None
    before = len(await factories.events(session))
    await accounts.reset_errors(session, account.id)
    assert len(await factories.events(session)) == before


# Closing and deleting


async def test_closing_takes_everything_along_but_the_row(session: AsyncSession) -> None:
    account = await factories.account_with_token(
        session, refresh_token="r", is_default_data=True, is_default_trading=True
    )
    key, raw_key = await factories.api_key(session, tiger_account_id=account.id)
    unbound, raw_unbound = await factories.api_key(session)
    refresh = await factories.refresh(session, account)
    assert await accounts.close(session, account.id) is account
    assert account.status == AccountStatus.CLOSED
    assert (account.access_token, account.refresh_token, account.token_expires_at) == (None,) * 3
    assert not account.is_default_data
    assert not account.is_default_trading
    assert (key.status, key.revocation_reason) == (APIKeyStatus.REVOKED, "the account was closed")
    assert refresh.status == TokenRefreshStatus.CANCELLED
    event = (await factories.events(session))[-1]
    assert event.details == {
        "revoked_api_keys": [key.key_prefix],
        "cancelled_refreshes": [str(refresh.id)],
    }
    await accounts.close(session, account.id)
    assert (await factories.events(session))[-1] is event
    assert await crud.api_keys.verify_api_key(session, raw_key) is None
    assert await crud.api_keys.verify_api_key(session, raw_unbound) is unbound


@pytest.mark.parametrize(
    "change", ["set_default_trading_account", "set_default_data_account", "update_tokens"]
)
async def test_a_closed_account_refuses(session: AsyncSession, change: str) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    with pytest.raises(InvalidState, match="closed"):
        await CHANGES[change](session, account.id)


# Values that no row can have


@pytest.mark.parametrize(
    "lookup",
    [
        lambda s: accounts.get(s, NONSENSE),
        lambda s: accounts.get_by_account_number(s, "a\0b"),
        lambda s: accounts.get_by_account_number(s, "\ud800"),
        lambda s: accounts.list_accounts(s, status=NONSENSE),
        lambda s: accounts.get_accounts_needing_token_refresh(s, within=timedelta.max),
        lambda s: accounts.update(s, NONSENSE, description="new"),
    ],
)
async def test_bad_input_is_a_typed_error_without_the_value(
    session: AsyncSession, lookup: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    with pytest.raises(TigerDBError) as caught:
        await lookup(session)
    assert type(caught.value) is InvalidValue
    assert NONSENSE not in str(caught.value)
