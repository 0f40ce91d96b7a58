"""New access tokens of accounts."""

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError

from tests.support import factories
from tests.support.contexts import changed_context
from tests.support.factories import plain
from tests.support.tiger_tokens import MONTH, NOW, SOON, tiger_token
from tiger_db import (
    AccountStatus,
    AuditAction,
    Database,
    TigerAccount,
    TokenStatus,
)
from tiger_db.crud import accounts, token_status
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.errors import (
    StaleToken,
)

LATER = NOW + timedelta(days=1)

Replace = Callable[[AsyncSession, UUID, str], Awaitable[object]]


async def complete(session: AsyncSession, account_id: UUID, token: str) -> TokenStatus:
    account = await accounts.get(session, account_id)
    await factories.refresh(session, account)
    (claim,) = await token_status.claim_due(session, worker="w")
    return await token_status.complete(session, claim, access_token=token)


REPLACE: dict[str, Replace] = {
    "update": lambda s, i, token: accounts.update(s, i, access_token=token),
    "update_tokens": lambda s, i, token: accounts.update_tokens(s, i, access_token=token),
    "complete": complete,
}


replace = pytest.mark.parametrize("replace", REPLACE)


async def stored(session: AsyncSession, account_id: UUID) -> TigerAccount:
    session.expunge_all()
    account = await accounts.get(session, account_id)
    assert account is not None
    return account


async def test_creating_an_account_reads_the_expiry_from_the_token(session: AsyncSession) -> None:
    token = tiger_token()
    created = await factories.account(session, access_token=token)
    account = await stored(session, created.id)
    assert (plain(account.access_token), account.token_expires_at) == (token, NOW + MONTH)
    (event,) = await factories.events(session)
    assert event.new_values is not None
    assert event.new_values["token_expires_at"] == "2026-12-25T12:00:00Z"
    given = await factories.account(session, access_token=token, token_expires_at=LATER)
    assert given.token_expires_at == LATER


@replace
async def test_replacing_a_token_reads_the_expiry_from_it(
    session: AsyncSession, replace: str
) -> None:
    created = await factories.account(session)
    for token, expiry in (
        (tiger_token(), NOW + MONTH),
        (tiger_token(SOON), SOON + MONTH),
        ("opaque", None),
        (tiger_token(), NOW + MONTH),
    ):
        done = await REPLACE[replace](session, created.id, token)
        account = await stored(session, created.id)
        assert (plain(account.access_token), account.token_expires_at) == (token, expiry)
        if isinstance(done, TokenStatus):
            assert done.new_token_expires_at == expiry


@pytest.mark.parametrize(
    "change",
    [
        lambda s, i: accounts.update(s, i, access_token=tiger_token(), token_expires_at=LATER),
        lambda s, i: accounts.update_tokens(
            s, i, access_token=tiger_token(), token_expires_at=LATER
        ),
    ],
)
async def test_a_given_expiry_is_stored_instead_of_that_of_the_token(
    session: AsyncSession, change: Callable[[AsyncSession, UUID], Awaitable[TigerAccount]]
) -> None:
    created = await factories.account(session)
    await change(session, created.id)
    assert (await stored(session, created.id)).token_expires_at == LATER


OLDER: dict[str, Callable[[AsyncSession, UUID], Awaitable[object]]] = {
    "update": lambda s, i: accounts.update(
        s, i, access_token=tiger_token(), description="half", token_expires_at=LATER
    ),
    "update_tokens": lambda s, i: accounts.update_tokens(
        s, i, access_token=tiger_token(), refresh_token="new", token_expires_at=LATER
    ),
}


@pytest.mark.parametrize("change", OLDER)
async def test_an_older_token_changes_nothing_and_writes_no_event(
    clone: Database, change: str
) -> None:
    async with clone.session() as session:
        account = await factories.account(session, access_token=tiger_token(SOON))
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(StaleToken):
            await OLDER[change](session, account.id)
    async with clone.session() as session:  # StaleToken rolled nothing back
        assert await factories.everything(session) == before


@replace
async def test_the_same_token_can_be_stored_again(session: AsyncSession, replace: str) -> None:
    token = tiger_token()
    account = await factories.account(session, access_token=token)
    await REPLACE[replace](session, account.id, token)
    assert plain((await stored(session, account.id)).access_token) == token


@replace
async def test_a_token_that_cannot_be_decrypted_is_replaced(clone: Database, replace: str) -> None:
    async with clone.session() as session:
        account = await factories.account(session, access_token=tiger_token(SOON, MONTH / 2))
    info = changed_context(clone.info, key_provider=KeyRing.parse(generate_key("other")))
    token = tiger_token()
    async with clone.sessions(info=info) as session:
        await REPLACE[replace](session, account.id, token)
        read = await stored(session, account.id)
    assert (plain(read.access_token), read.token_expires_at) == (token, NOW + MONTH)


async def test_the_refresh_token_is_replaced_only_if_one_is_given(
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
async def test_invalid_tokens_change_nothing(session: AsyncSession, values: Any) -> None:
    account = await factories.account_with_token(session)
    with pytest.raises(ValidationError):
        await accounts.update_tokens(session, account.id, **values)
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == "token-1"


@pytest.mark.parametrize(
    ("since", "lifted"),
    [
        ([], True),
        ([AccountStatus.INACTIVE], False),
        ([AccountStatus.ACTIVE], False),
        ([AccountStatus.ACTIVE, AccountStatus.SUSPENDED], False),  # manually
    ],
)
async def test_a_late_token_lifts_the_suspension_by_its_refresh(
    session: AsyncSession, since: list[AccountStatus], *, lifted: bool
) -> None:
    claim = await factories.claim(session)
    await token_status.fail(session, claim, message="refused", credentials_refused=True)
    for status in since:
        await accounts.update(session, claim.tiger_account_id, status=status)
    events = len(await factories.events(session))
    account = await accounts.update_tokens(
        session, claim.tiger_account_id, access_token="new", refresh_id=claim.id
    )
    assert account.status == ("active" if lifted else since[-1])
    told = (await factories.events(session))[events:]
    assert [event.action for event in told] == [
        AuditAction.TOKEN_UPDATE,
        *[AuditAction.ACCOUNT_STATUS_CHANGE] * lifted,
    ]


@pytest.mark.parametrize("given", [True, False])
async def test_a_token_without_that_refresh_lifts_no_suspension(
    session: AsyncSession, *, given: bool
) -> None:
    claim = await factories.claim(session)
    await token_status.fail(session, claim, message="refused", credentials_refused=True)
    account = await accounts.update_tokens(
        session,
        claim.tiger_account_id,
        access_token="new",
        refresh_id=uuid4() if given else None,
    )
    assert account.status == AccountStatus.SUSPENDED
