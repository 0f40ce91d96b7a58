"""What a change leaves in the audit trail, and what it never does."""

from datetime import UTC, datetime

import pytest
from sqlalchemy import text

from tests import factories
from tests.crud.test_accounts import CHANGES, SECRETS
from tiger_db import (
    AuditAction,
    Database,
    crud,
)
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.redaction import MASK


async def test_every_change_writes_its_event(session: AsyncSession) -> None:
    account = await factories.account(session)
    other = await factories.account(session, is_default_data=True)
    await accounts.update(session, account.id, description="new")
    await accounts.update(session, account.id, status="suspended")
    await accounts.set_default_data_account(session, account.id)
    expiry = datetime(2027, 1, 1, tzinfo=UTC)
    await accounts.update_tokens(session, account.id, access_token="t", token_expires_at=expiry)
    await accounts.record_error(session, account.id, message="no answer")
    at = account.model_dump(mode="json")["last_error_at"]
    await accounts.reset_errors(session, account.id)
    await accounts.close(session, account.id)
    written = [e for e in await factories.events(session) if e.tiger_account_id == account.id]
    assert [(e.action, e.old_values, e.new_values) for e in written[1:]] == [
        (AuditAction.ACCOUNT_UPDATE, {"description": None}, {"description": "new"}),
        (AuditAction.ACCOUNT_STATUS_CHANGE, {"status": "active"}, {"status": "suspended"}),
        (
            AuditAction.ACCOUNT_SET_DEFAULT,
            {"is_default_data": str(other.id)},
            {"is_default_data": str(account.id)},
        ),
        (
            AuditAction.TOKEN_UPDATE,
            {"access_token": None, "token_expires_at": None},
            {"access_token": MASK, "token_expires_at": "2027-01-01T00:00:00Z"},
        ),
        (AuditAction.ACCOUNT_ERROR, {"error_count": 0}, {"error_count": 1}),
        (
            AuditAction.ACCOUNT_RESET_ERRORS,
            {"error_count": 1, "last_error": "no answer", "last_error_at": at},
            {"error_count": 0, "last_error": None, "last_error_at": None},
        ),
        (
            AuditAction.ACCOUNT_CLOSE,
            {
                "status": "suspended",
                "private_key": MASK,
                "access_token": MASK,
                "token_expires_at": "2027-01-01T00:00:00Z",
                "is_default_data": True,
            },
            {
                "status": "closed",
                "private_key": None,
                "access_token": None,
                "token_expires_at": None,
                "is_default_data": False,
            },
        ),
    ]
    assert written[0].action == AuditAction.ACCOUNT_CREATE
    assert written[0].new_values is not None
    assert written[0].new_values["account_number"] == account.account_number
    assert {(e.resource_type, e.resource_id) for e in written} == {
        ("tiger_account", str(account.id))
    }


@pytest.mark.parametrize("change", CHANGES)
async def test_an_event_is_gone_if_its_transaction_rolls_back(clone: Database, change: str) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        await accounts.record_error(session, account.id, message="one to forget")
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await CHANGES[change](session, account.id)
            assert len(await factories.events(session)) == 3
            _ = 1 / 0
    async with clone.session() as session:
        assert len(await factories.events(session)) == 2


async def test_no_secret_is_in_any_row(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session, **SECRETS)
        await accounts.update(session, account.id, **{n: f"new-{v}" for n, v in SECRETS.items()})
        await accounts.update_tokens(
            session, account.id, access_token="newer-access-token", refresh_token="newer-refresh"
        )
    async with clone.session() as session:
        stored = await factories.everything(session)
    for secret in (*SECRETS.values(), "newer-access-token", "newer-refresh"):
        assert secret not in stored
        assert secret.encode().hex() not in stored
    assert account.account_number in stored


async def test_deleting_an_account_costs_no_audit_row(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account_with_token(session)
        _, raw_key = await factories.api_key(session, tiger_account_id=account.id)
        await crud.api_keys.verify_api_key(session, raw_key)
        await factories.refresh(session, account)
        before = [event.model_dump() for event in await factories.events(session)]
        await session.execute(text("DELETE FROM tiger_accounts"))
    async with clone.session() as session:
        for table in ("tiger_accounts", "api_keys", "api_key_usage", "token_statuses"):
            assert await session.scalar(text(f"SELECT count(*) FROM {table}")) == 0
        assert [event.model_dump() for event in await factories.events(session)] == before
    assert len(before) == 3
