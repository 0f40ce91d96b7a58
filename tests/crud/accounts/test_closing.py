"""Accounts are closed, reopened and deleted. Their audit events stay."""

from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.support import factories
from tests.support.account_changes import CHANGES, SECRETS
from tests.support.contexts import change_context
from tests.support.factories import plain
from tiger_db import (
    AccountStatus,
    APIKeyStatus,
    AuditAction,
    AuditLog,
    Database,
    PrivateKeyFormat,
    TigerAccount,
    TokenRefreshStatus,
    crud,
)
from tiger_db.crud import accounts, api_keys, audit_logs, token_status
from tiger_db.crud.common import savepoint
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AlreadyExists,
    InvalidState,
    InvalidValue,
    MissingReference,
)
from tiger_db.redaction import MASK

S = AccountStatus
CREDENTIALS = ("private_key", "secret_key", "access_token", "refresh_token")
EXPIRY = "2030-01-01T00:00:00Z"
CLOSED = {
    "status": "closed",
    "private_key": None,
    "private_key_format": "unknown",
    "secret_key": None,
    "access_token": None,
    "refresh_token": None,
    "token_expires_at": None,
    "is_default_trading": False,
    "is_default_data": False,
}
REASON = "the account was closed"


async def busy_account(session: AsyncSession) -> TigerAccount:
    """Create an account with secrets, defaults, an open refresh and API keys of every status."""
    values = SECRETS | {"private_key_format": "PK8", "token_expires_at": EXPIRY}
    account = await factories.account(
        session, **values, is_default_data=True, is_default_trading=True
    )
    for status in APIKeyStatus:
        key, _ = await factories.api_key(session, tiger_account_id=account.id)
        if status == APIKeyStatus.REVOKED:
            await api_keys.revoke(session, key.id, reason="long ago")
        else:
            key.status = status
    await factories.refresh(session, account)
    return account


async def row_of(session: AsyncSession, account: TigerAccount) -> dict[str, Any]:
    """Return the stored row of an account."""
    row = await session.execute(
        text("SELECT *, status::text AS status FROM tiger_accounts WHERE id = :id"),
        {"id": account.id},
    )
    return dict(row.mappings().one())


async def trail(session: AsyncSession) -> list[str]:
    """Return every audit row with its transaction id and physical location."""
    rows = await session.scalars(
        text("SELECT concat_ws(' ', a.tableoid, a.ctid, a.xmin, a) FROM audit_logs a ORDER BY id")
    )
    return list(rows)


async def events_since(session: AsyncSession, before: list[str]) -> list[AuditLog]:
    return (await factories.events(session))[len(before) :]


# Closing


async def test_closing_deletes_the_credentials(clone: Database) -> None:
    async with clone.session() as session:
        account = await busy_account(session)
        other = await factories.account(session, **SECRETS)
    async with clone.session() as session:
        before, others = await row_of(session, account), await row_of(session, other)
        await accounts.close(session, account.id)
    async with clone.session() as session:
        after = await row_of(session, account)
        everything = await factories.everything(session)
        assert await row_of(session, other) == others
    changed = {name: value for name, value in after.items() if value != before[name]}
    assert changed.pop("updated_at") > before["updated_at"]
    assert changed == CLOSED | {"token_refresh_at": None}
    for name in CREDENTIALS:
        assert before[name].hex() not in everything
    assert after["tiger_id"].hex() in everything


async def test_closing_records_an_event_with_old_and_new_values(session: AsyncSession) -> None:
    account = await busy_account(session)
    await accounts.close(session, account.id)
    event = (await factories.events(session))[-1]
    assert (event.action, event.resource_id) == (AuditAction.ACCOUNT_CLOSE, str(account.id))
    assert event.new_values == CLOSED
    assert event.old_values == {
        "status": "active",
        **dict.fromkeys(CREDENTIALS, MASK),
        "private_key_format": "PK8",
        "token_expires_at": EXPIRY,
        "is_default_trading": True,
        "is_default_data": True,
    }
    keys = await api_keys.get_keys_for_account(session, account.id)
    ended = {key.key_prefix for key in keys if key.revocation_reason == REASON}
    refresh = await token_status.get_latest_status(session, account.id)
    assert refresh is not None
    details: Any = event.details
    assert {*details["revoked_api_keys"]} == ended
    assert details["cancelled_refreshes"] == [str(refresh.id)]


async def test_closing_revokes_each_key_with_an_event(session: AsyncSession) -> None:
    account = await busy_account(session)
    keys = (await api_keys.get_keys_for_account(session, account.id)).items
    revoked_before, *working = sorted(keys, key=lambda k: k.status != APIKeyStatus.REVOKED)
    was = {key.id: key.status.value for key in working}
    unbound, raw_unbound = await factories.api_key(session)
    await accounts.close(session, account.id)
    for key in working:
        assert (key.status, key.revocation_reason) == (APIKeyStatus.REVOKED, REASON)
        assert key.revoked_at is not None
        event = (await audit_logs.search(session, api_key_id=key.id)).items[0]
        assert event.action == AuditAction.API_KEY_REVOKE
        assert (event.resource_type, event.resource_id) == ("api_key", str(key.id))
        assert event.tiger_account_id == account.id
        assert event.old_values == {"status": was[key.id]}
        assert event.new_values == {"status": "revoked", "revocation_reason": REASON}
    assert {*was.values()} == {"active", "inactive", "expired"}
    assert revoked_before.revocation_reason == "long ago"
    assert len(await audit_logs.search(session, api_key_id=revoked_before.id)) == 2
    assert await api_keys.verify_api_key(session, raw_unbound) is unbound


@pytest.mark.parametrize("claimed", [False, True])
async def test_closing_cancels_an_open_refresh_with_an_event(
    session: AsyncSession, *, claimed: bool
) -> None:
    account = await factories.account_with_token(session)
    other = await factories.refresh(session)
    done = await factories.refresh(session, account)
    await token_status.cancel(session, done.id)
    refresh = await factories.refresh(session, account)
    ended_before = (done.status, done.completed_at, done.updated_at)
    if claimed:
        await token_status.claim_due(session, worker="w")
    before = await trail(session)
    await accounts.close(session, account.id)
    (event, close) = await events_since(session, before)
    assert (event.action, close.action) == (
        AuditAction.TOKEN_REFRESH_CANCEL,
        AuditAction.ACCOUNT_CLOSE,
    )
    assert (event.resource_type, event.resource_id) == ("token_status", str(refresh.id))
    assert event.tiger_account_id == account.id
    assert event.old_values == {"status": "in_progress" if claimed else "pending"}
    assert event.new_values == {"status": "cancelled"}
    assert event.details == {"reason": REASON}
    stored = await token_status.get(session, refresh.id)
    assert stored is not None
    assert stored.status == TokenRefreshStatus.CANCELLED
    assert stored.completed_at is not None
    assert stored.lease_expires_at is None
    assert await token_status.get(session, done.id) is done
    assert (done.status, done.completed_at, done.updated_at) == ended_before
    still_open = await token_status.get(session, other.id)
    assert still_open is not None
    assert still_open.is_open


async def test_closing_changes_no_earlier_audit_event(clone: Database) -> None:
    async with clone.session() as session:
        account = await busy_account(session)
        await accounts.record_error(session, account.id, message="no answer")
        before = await trail(session)
    async with clone.session() as session:
        await accounts.close(session, account.id)
    async with clone.session() as session:
        after = await trail(session)
    assert after[: len(before)] == before
    assert len(before) == 10  # the assignments of two statuses are also on record
    assert len(after) == len(before) + 5  # three keys, a refresh, the account


@pytest.mark.slow
async def test_closing_is_one_transaction(clone: Database) -> None:
    async with clone.session() as session:
        account = await busy_account(session)
        before = await factories.everything(session)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await accounts.close(session, account.id)
            assert await factories.everything(session) != before
            async with clone.session() as someone_else:
                assert await factories.everything(someone_else) == before
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.everything(session) == before
        read = await accounts.get(session, account.id)
        assert read is not None
        assert {name: plain(getattr(read, name)) for name in SECRETS} == SECRETS


@pytest.mark.parametrize("status", [S.INACTIVE, S.SUSPENDED, S.PENDING_VERIFICATION])
async def test_an_account_of_any_status_can_be_closed(
    session: AsyncSession, status: AccountStatus
) -> None:
    account = await factories.account(session, status=status)
    await accounts.close(session, account.id)
    assert (await row_of(session, account))["status"] == "closed"


async def test_closing_ends_a_suspension_by_errors(session: AsyncSession) -> None:
    account = await factories.account(session)
    change_context(session, suspend_after=1)
    await accounts.record_error(session, account.id, message="no answer")
    await accounts.close(session, account.id)
    event = (await factories.events(session))[-1]
    assert event.old_values is not None
    assert event.old_values["auto_suspended"] is True
    await accounts.reset_errors(session, account.id)
    row = await row_of(session, account)
    assert (row["status"], row["auto_suspended"]) == ("closed", False)


@pytest.mark.slow
async def test_closing_again_changes_nothing(clone: Database) -> None:
    async with clone.session() as session:
        account = await busy_account(session)
        await accounts.close(session, account.id)
        before = await factories.everything(session)
    async with clone.session() as session:
        await accounts.close(session, account.id)
    async with clone.session() as session:
        assert await factories.everything(session) == before


async def test_closing_ends_keys_refreshes_tokens_and_defaults_but_keeps_the_row(
    session: AsyncSession,
) -> None:
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


# Constraints of the database


@pytest.mark.parametrize("kept", [*CREDENTIALS, "is_default_trading", "is_default_data"])
async def test_no_sql_can_close_an_account_that_keeps_credentials_or_defaults(
    session: AsyncSession, kept: str
) -> None:
    account = await busy_account(session)
    gone = [f"{name} = NULL" for name in CREDENTIALS if name != kept]
    gone += [f"{name} = false" for name in CLOSED if name.startswith("is_") and name != kept]
    with pytest.raises(IntegrityError, match="ck_tiger_accounts_credentials_unless_closed"):
        await session.execute(
            text(f"UPDATE tiger_accounts SET status = 'closed', {', '.join(gone)} WHERE id = :id"),
            {"id": account.id},
        )


@pytest.mark.parametrize("status", [status for status in S if status != S.CLOSED])
async def test_no_sql_can_open_an_account_without_credentials(
    session: AsyncSession, status: AccountStatus
) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    with pytest.raises(IntegrityError, match="ck_tiger_accounts_credentials_unless_closed"):
        await session.execute(text(f"UPDATE tiger_accounts SET status = '{status}'"))


@pytest.mark.parametrize("name", [*CREDENTIALS, "is_default_trading", "is_default_data"])
async def test_no_sql_can_give_a_closed_account_credentials_or_defaults(
    session: AsyncSession, name: str
) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    value = "true" if name.startswith("is_") else "tiger_id"
    with pytest.raises(IntegrityError, match="ck_tiger_accounts_credentials_unless_closed"):
        await session.execute(text(f"UPDATE tiger_accounts SET {name} = {value}"))


async def test_no_sql_can_delete_the_private_key_of_an_open_account(session: AsyncSession) -> None:
    await factories.account(session)
    with pytest.raises(IntegrityError, match="ck_tiger_accounts_credentials_unless_closed"):
        await session.execute(text("UPDATE tiger_accounts SET private_key = NULL"))


# Refused changes of a closed account


@pytest.mark.parametrize(
    "values", [{"status": "closed", "private_key": None}, {"status": "closed"}]
)
async def test_a_closed_account_cannot_be_created(
    session: AsyncSession, values: dict[str, Any]
) -> None:
    with pytest.raises(InvalidValue, match="a new account cannot have the status closed"):
        await factories.account(session, **values)
    assert (await accounts.list_accounts(session)).items == []


async def test_the_number_of_a_closed_account_stays_taken(session: AsyncSession) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    with pytest.raises(AlreadyExists, match="account_number"):
        await factories.account(session, account_number=account.account_number)
    other = await factories.account(session)
    with pytest.raises(AlreadyExists, match="account_number"):
        await accounts.update(session, other.id, account_number=account.account_number)
    assert await accounts.get_by_account_number(session, account.account_number) is account


@pytest.mark.parametrize("status", [status for status in S if status != S.CLOSED])
@pytest.mark.parametrize("rest", [{}, {"private_key": "new"}])
async def test_no_update_can_open_a_closed_account(
    session: AsyncSession, status: AccountStatus, rest: dict[str, Any]
) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    before = await factories.everything(session)
    with pytest.raises(InvalidState, match="use `reopen`"):
        await accounts.update(session, account.id, status=status, **rest)
    assert await factories.everything(session) == before


@pytest.mark.parametrize(
    "values",
    [
        *({name: "new"} for name in CREDENTIALS),
        {"private_key_format": "PK8"},
        {"token_expires_at": EXPIRY},
        {"is_default_trading": True},
        {"is_default_data": True},
        {"private_key": "new", "description": "half done"},
    ],
)
async def test_no_update_can_give_a_closed_account_credentials_or_defaults(
    session: AsyncSession, values: dict[str, Any]
) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    before = await factories.everything(session)
    with pytest.raises(InvalidState, match="closed"):
        await accounts.update(session, account.id, **values)
    assert await factories.everything(session) == before
    assert account.private_key is None


async def test_the_description_of_a_closed_account_can_be_changed(session: AsyncSession) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    await accounts.update(session, account.id, status=AccountStatus.CLOSED, description="was Tom's")
    assert (account.status, account.description) == (S.CLOSED, "was Tom's")


@pytest.mark.parametrize(
    "change", ["set_default_trading_account", "set_default_data_account", "update_tokens"]
)
async def test_a_closed_account_refuses_tokens_and_defaults(
    session: AsyncSession, change: str
) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    with pytest.raises(InvalidState, match="closed"):
        await CHANGES[change](session, account.id)


# Reopening


async def test_reopening_stores_new_credentials(clone: Database) -> None:
    async with clone.session() as session:
        account = await busy_account(session)
        for _ in range(3):
            await accounts.record_error(session, account.id, message="no answer")
        await accounts.close(session, account.id)
    async with clone.session() as session:
        await accounts.reopen(
            session,
            account.id,
            private_key="new key",
            private_key_format=PrivateKeyFormat.PK1,
            secret_key="new secret",
        )
    async with clone.session() as session:
        read = await accounts.get_by_account_number(session, account.account_number)
        assert read is not None
        assert (read.id, read.status) == (account.id, S.ACTIVE)
        assert plain(read.private_key) == "new key"
        assert read.private_key_format == PrivateKeyFormat.PK1
        assert plain(read.secret_key) == "new secret"
        assert plain(read.tiger_id) == SECRETS["tiger_id"]
        assert (read.access_token, read.refresh_token, read.token_expires_at) == (None,) * 3
        assert (read.error_count, read.last_error, read.last_error_at) == (0, None, None)
        assert read.failing_until is None
        assert not read.is_default_data
        assert not read.is_default_trading
        keys = await api_keys.get_keys_for_account(session, account.id)
        assert {key.status for key in keys} == {APIKeyStatus.REVOKED}
        await accounts.update_tokens(session, account.id, access_token="new token")
        await accounts.set_default_trading_account(session, account.id)
        assert (await factories.refresh(session, read)).is_open
        key, raw_key = await factories.api_key(session, tiger_account_id=account.id)
        assert await api_keys.verify_api_key(session, raw_key) is key


async def test_reopening_records_an_event(session: AsyncSession) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    before = await trail(session)
    await accounts.reopen(session, account.id, private_key="new key")
    (event,) = await events_since(session, before)
    assert (event.action, event.resource_id) == (AuditAction.ACCOUNT_REOPEN, str(account.id))
    assert event.old_values == {"status": "closed", "private_key": None}
    assert event.new_values == {"status": "active", "private_key": MASK}


@pytest.mark.parametrize("status", [status for status in S if status != S.CLOSED])
async def test_only_a_closed_account_can_be_reopened(
    session: AsyncSession, status: AccountStatus
) -> None:
    account = await factories.account(session, status=status)
    with pytest.raises(InvalidState, match="only a closed account"):
        await accounts.reopen(session, account.id, private_key="new key")
    assert plain(account.private_key) == "test_key"


NOTHING: Any = None
REFUSED: list[dict[str, Any]] = [
    {"private_key": ""},
    {"private_key": NOTHING},
    {"private_key": MASK},
    {"private_key": "new", "secret_key": ""},
    {"private_key": "new", "private_key_format": "PK2"},
]


@pytest.mark.parametrize("values", REFUSED)
async def test_reopening_with_invalid_values_changes_nothing(
    session: AsyncSession, values: dict[str, Any]
) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    before = await factories.everything(session)
    with pytest.raises(ValidationError):
        await accounts.reopen(session, account.id, **values)
    await session.flush()
    assert await factories.everything(session) == before


async def test_an_account_can_be_closed_and_reopened_repeatedly(session: AsyncSession) -> None:
    account = await factories.account(session)
    for n in range(3):
        await accounts.close(session, account.id)
        await accounts.reopen(session, account.id, private_key=f"key {n}")
        assert plain(account.private_key) == f"key {n}"
    actions = [event.action for event in await factories.events(session)]
    assert actions[1:] == [AuditAction.ACCOUNT_CLOSE, AuditAction.ACCOUNT_REOPEN] * 3


# Deleting


async def rows_of(session: AsyncSession, account: TigerAccount) -> list[int]:
    """Return the numbers of accounts, keys, usage rows and refreshes of one account."""
    keys = "SELECT id FROM api_keys WHERE tiger_account_id = :id"
    criteria = {
        "tiger_accounts": "id = :id",
        "api_keys": f"id IN ({keys})",
        "api_key_usage": f"api_key_id IN ({keys})",
        "token_statuses": "tiger_account_id = :id",
    }
    return [
        await session.scalar(text(f"SELECT count(*) FROM {table} WHERE {rule}"), {"id": account.id})
        or 0
        for table, rule in criteria.items()
    ]


@pytest.mark.slow
async def test_a_closed_account_is_deleted_with_its_keys_and_refreshes(clone: Database) -> None:
    async with clone.session() as session:
        account, other = await busy_account(session), await factories.account(session)
        await factories.api_key(session, tiger_account_id=other.id)
        await factories.refresh(session, other)
        await accounts.close(session, account.id)
    async with clone.session() as session:
        assert await rows_of(session, account) == [1, 4, 0, 1]
        row = await row_of(session, account)
        await accounts.delete(session, account.id, reason="moved to another broker")
    async with clone.session() as session:
        assert await accounts.get(session, account.id) is None
        assert await rows_of(session, account) == [0, 0, 0, 0]
        assert await rows_of(session, other) == [1, 1, 0, 1]
        everything = await factories.everything(session)
        assert row["tiger_id"].hex() not in everything
        again = await factories.account(session, account_number=account.account_number)
        assert again.id != account.id


async def test_deleting_records_each_key_and_then_the_account_with_old_values(
    session: AsyncSession,
) -> None:
    account = await busy_account(session)
    await accounts.close(session, account.id)
    keys = {
        str(key.id): key.model_dump(mode="json", exclude={"created_at", "updated_at"})
        for key in await api_keys.get_keys_for_account(session, account.id)
    }
    values = account.model_dump(
        mode="json", exclude={"created_at", "updated_at", "token_refresh_at"}
    )
    before = await trail(session)
    await accounts.delete(session, account.id, reason="moved to another broker")
    *of_keys, of_account = await events_since(session, before)
    for event in of_keys:
        assert event.action == AuditAction.API_KEY_DELETE
        assert (event.api_key_id, event.tiger_account_id) == (UUID(event.resource_id), account.id)
        assert event.details == {"reason": "the account was deleted"}
        assert event.new_values is None
    assert {event.resource_id: event.old_values for event in of_keys} == keys
    assert of_account.action == AuditAction.ACCOUNT_DELETE
    assert (of_account.tiger_account_id, of_account.resource_id) == (account.id, str(account.id))
    assert of_account.old_values == values
    assert values["tiger_id"] == MASK
    assert of_account.new_values is None
    assert of_account.details == {
        "reason": "moved to another broker",
        "deleted_api_keys": [keys[str(event.resource_id)]["key_prefix"] for event in of_keys],
        "deleted_refreshes": 1,
    }


async def test_deleting_changes_no_earlier_audit_event(clone: Database) -> None:
    async with clone.session() as session:
        account = await busy_account(session)
        await accounts.close(session, account.id)
        before = await trail(session)
    async with clone.session() as session:
        await accounts.delete(session, account.id)
    async with clone.session() as session:
        after = await trail(session)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 5  # four keys, the account


@pytest.mark.parametrize("child", [*APIKeyStatus, "pending", "in_progress"])
async def test_an_account_with_a_key_or_an_open_refresh_is_deleted_only_if_it_is_closed(
    clone: Database, child: str
) -> None:
    async with clone.session() as session:
        account = await factories.account_with_token(session)
        if child in {*APIKeyStatus}:
            key, _ = await factories.api_key(session, tiger_account_id=account.id)
            key.status = APIKeyStatus(child)
        else:
            await factories.refresh(session, account)
            if child == "in_progress":
                await token_status.claim_due(session, worker="w")
        await session.flush()
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(InvalidState, match="must be closed before the deletion"):
            await accounts.delete(session, account.id)
    async with clone.session() as session:
        assert await factories.everything(session) == before
        await accounts.close(session, account.id)
        await accounts.delete(session, account.id)
        assert await rows_of(session, account) == [0, 0, 0, 0]


async def test_an_open_account_with_ended_refreshes_only_is_deleted(session: AsyncSession) -> None:
    account = await factories.account_with_token(session, is_default_trading=True)
    refresh = await factories.refresh(session, account)
    await token_status.cancel(session, refresh.id)
    await accounts.delete(session, account.id)
    assert await rows_of(session, account) == [0, 0, 0, 0]
    assert refresh not in session
    event = (await factories.events(session))[-1]
    assert event.details == {"deleted_api_keys": [], "deleted_refreshes": 1}
    assert event.old_values is not None
    assert (event.old_values["is_default_trading"], event.old_values["access_token"]) == (
        True, MASK
    )  # fmt: skip


async def test_an_account_to_which_other_rows_refer_is_not_deleted(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        await factories.api_key(session, tiger_account_id=account.id)
        await accounts.close(session, account.id)
        before = await factories.everything(session)
    async with clone.session() as session:
        await session.execute(text("CREATE TABLE watched (id uuid REFERENCES tiger_accounts)"))
        await session.execute(text("INSERT INTO watched SELECT id FROM tiger_accounts"))
        with pytest.raises(MissingReference, match="other rows refer to the deleted row"):
            await accounts.delete(session, account.id)
        stored = await accounts.get(session, account.id)
        assert stored is not None
        await session.execute(text("DROP TABLE watched"))
    async with clone.session() as session:
        assert await factories.everything(session) == before


@pytest.mark.parametrize("child", ["api_key", "refresh"])
async def test_no_sql_can_delete_an_account_that_has_a_key_or_a_refresh(
    clone: Database, child: str
) -> None:
    async with clone.session() as session:
        account = await factories.account_with_token(session)
        if child == "api_key":
            await factories.api_key(session, tiger_account_id=account.id)
        else:
            refresh = await factories.refresh(session, account)
            await token_status.cancel(session, refresh.id)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(MissingReference, match="_tiger_account_id_tiger_accounts"):
            async with savepoint(session):
                await session.execute(text("DELETE FROM tiger_accounts"))
        await session.delete(await accounts.get(session, account.id))
        with pytest.raises(IntegrityError, match="_tiger_account_id_tiger_accounts"):
            await session.flush()
        await session.rollback()
    async with clone.session() as session:
        assert await factories.everything(session) == before
