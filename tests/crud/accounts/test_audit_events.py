"""The audit events that changes of accounts record."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.account_changes import CHANGES, SECRETS
from tests.support.contexts import change_context
from tests.support.factories import plain
from tests.support.tiger_tokens import SOON, tiger_token
from tiger_db import (
    AccountStatus,
    AuditAction,
    Database,
    crud,
)
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.redaction import MASK


def test_the_changes_of_these_tests_are_all_that_the_module_has() -> None:
    reading = ("count", "explain", "find", "get", "list")
    functions = {name for name in accounts.__all__ if name.islower()}
    changes = {name for name in functions if not name.startswith(reading)}
    assert changes == {"create", *CHANGES}


@pytest.mark.slow
async def test_every_change_writes_its_event(session: AsyncSession) -> None:
    account = await factories.account(session)
    other = await factories.account(session, is_default_data=True)
    await accounts.update(session, account.id, description="new")
    await accounts.update(
        session, account.id, status=AccountStatus.INACTIVE, private_key="new", tiger_id="7"
    )
    await accounts.update(session, account.id, status=AccountStatus.ACTIVE)
    await accounts.set_default_data_account(session, account.id)
    await accounts.set_default_trading_account(session, account.id)
    expiry = datetime(2027, 1, 1, tzinfo=UTC)
    await accounts.update_tokens(session, account.id, access_token="t", token_expires_at=expiry)
    await accounts.update_tokens(session, account.id, access_token="t2", refresh_token="r")
    await accounts.record_error(session, account.id, message="no answer")
    change_context(session, failing_after=2, suspend_after=2)
    await accounts.record_error(session, account.id, message="no answer")
    times = account.model_dump(mode="json", include={"last_error_at", "failing_until"})
    await accounts.reset_errors(session, account.id)
    await accounts.close(session, account.id)
    await accounts.reopen(session, account.id, private_key="newer", secret_key="s")
    written = [e for e in await factories.events(session) if e.tiger_account_id == account.id]
    assert [(e.action, e.old_values, e.new_values) for e in written[1:]] == [
        (AuditAction.ACCOUNT_UPDATE, {"description": None}, {"description": "new"}),
        (
            AuditAction.ACCOUNT_STATUS_CHANGE,
            {"status": "active", "private_key": MASK, "tiger_id": MASK},
            {"status": "inactive", "private_key": MASK, "tiger_id": MASK},
        ),
        (AuditAction.ACCOUNT_STATUS_CHANGE, {"status": "inactive"}, {"status": "active"}),
        (
            AuditAction.ACCOUNT_SET_DEFAULT,
            {"is_default_data": str(other.id)},
            {"is_default_data": str(account.id)},
        ),
        (
            AuditAction.ACCOUNT_SET_DEFAULT,
            {"is_default_trading": None},
            {"is_default_trading": str(account.id)},
        ),
        (
            AuditAction.TOKEN_UPDATE,
            {"access_token": None, "token_expires_at": None},
            {"access_token": MASK, "token_expires_at": "2027-01-01T00:00:00Z"},
        ),
        (
            AuditAction.TOKEN_UPDATE,
            {
                "access_token": MASK,
                "refresh_token": None,
                "token_expires_at": "2027-01-01T00:00:00Z",
            },
            {"access_token": MASK, "refresh_token": MASK, "token_expires_at": None},
        ),
        (AuditAction.ACCOUNT_ERROR, {"error_count": 0}, {"error_count": 1}),
        (AuditAction.ACCOUNT_ERROR, {"error_count": 1}, {"error_count": 2}),
        (
            AuditAction.ACCOUNT_STATUS_CHANGE,
            {"status": "active", "auto_suspended": False},
            {"status": "suspended", "auto_suspended": True},
        ),
        (
            AuditAction.ACCOUNT_RESET_ERRORS,
            {
                "status": "suspended",
                "auto_suspended": True,
                "error_count": 2,
                "last_error": "no answer",
                **times,
            },
            {
                "status": "active",
                "auto_suspended": False,
                "error_count": 0,
                "last_error": None,
                "last_error_at": None,
                "failing_until": None,
            },
        ),
        (
            AuditAction.ACCOUNT_CLOSE,
            {
                "status": "active",
                "private_key": MASK,
                "access_token": MASK,
                "refresh_token": MASK,
                "is_default_data": True,
                "is_default_trading": True,
            },
            {
                "status": "closed",
                "private_key": None,
                "access_token": None,
                "refresh_token": None,
                "is_default_data": False,
                "is_default_trading": False,
            },
        ),
        (
            AuditAction.ACCOUNT_REOPEN,
            {"status": "closed", "private_key": None, "secret_key": None},
            {"status": "active", "private_key": MASK, "secret_key": MASK},
        ),
    ]
    assert written[0].action == AuditAction.ACCOUNT_CREATE
    assert written[0].new_values is not None
    assert written[0].new_values["account_number"] == account.account_number
    assert {(e.resource_type, e.resource_id) for e in written} == {
        ("tiger_account", str(account.id))
    }


async def test_replacing_a_default_account_records_an_event_for_both_accounts(
    session: AsyncSession,
) -> None:
    first = await factories.account(session, is_default_trading=True)
    second = await factories.account(session)
    await accounts.set_default_trading_account(session, second.id)
    told = (await factories.events(session))[2:]
    assert {event.tiger_account_id for event in told} == {first.id, second.id}
    for event in told:
        assert event.old_values == {"is_default_trading": str(first.id)}
        assert event.new_values == {"is_default_trading": str(second.id)}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_rolled_back_change_leaves_no_event(clone: Database, change: str) -> None:
    async with clone.session() as session:
        account = await factories.account(session, market_permissions=["US"])
        await accounts.record_error(session, account.id, message="one to forget")
        if change == "reopen":
            await accounts.close(session, account.id)
        before = await factories.everything(session)
        events = len(await factories.events(session))
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await CHANGES[change](session, account.id)
            assert len(await factories.events(session)) == events + 1
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.everything(session) == before


async def test_a_rolled_back_creation_leaves_no_account_and_no_event(clone: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await factories.account(session)
            assert len(await factories.events(session)) == 1
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.events(session) == []
        assert (await accounts.list_accounts(session)).items == []


@pytest.mark.slow
async def test_no_row_contains_a_secret_in_plain_text(clone: Database) -> None:
    newer: dict[str, Any] = {name: f"new-{value}" for name, value in SECRETS.items()}
    last: dict[str, Any] = {"private_key": "the-last-key", "secret_key": "the-last-secret"}
    tokens = [tiger_token(), tiger_token(SOON), "newer-refresh"]
    secrets = [*SECRETS.values(), *newer.values(), *last.values(), *tokens]
    async with clone.session() as session:
        account = await factories.account(session, **SECRETS)
        _, raw_key = await factories.api_key(session, tiger_account_id=account.id)
        secrets.append(raw_key[-64:])
        await accounts.update(session, account.id, **newer)
        await accounts.update(
            session, account.id, status=AccountStatus.INACTIVE, access_token=tokens[0]
        )
        await accounts.update(session, account.id, status=AccountStatus.ACTIVE)
        await accounts.set_default_trading_account(session, account.id)
        await accounts.set_default_data_account(session, account.id)
        await accounts.update_tokens(
            session, account.id, access_token=tokens[1], refresh_token=tokens[2]
        )
        current = [plain(getattr(account, name)) for name in SECRETS]
        message = f"{current} {raw_key} {tokens}"
        change_context(session, suspend_after=1)
        await accounts.record_error(session, account.id, message=message)
        await accounts.reset_errors(session, account.id)
        await factories.refresh(session, account)
        (claim,) = await crud.token_status.claim_due(session, worker="w")
        await crud.token_status.fail(session, claim, message=f"{tokens[:2]}")
        await accounts.close(session, account.id)
        await accounts.reopen(session, account.id, **last)
    async with clone.session() as session:
        stored = await factories.everything(session)
    for secret in secrets:
        assert secret not in stored
        assert secret.encode().hex() not in stored
    assert account.account_number in stored


async def test_deleting_an_account_changes_no_audit_event(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account_with_token(session)
        _, raw_key = await factories.api_key(session, tiger_account_id=account.id)
        await crud.api_keys.verify_api_key(session, raw_key)
        await factories.refresh(session, account)
        await accounts.close(session, account.id)
        before = [event.model_dump() for event in await factories.events(session)]
        await accounts.delete(session, account.id)
    async with clone.session() as session:
        for table in ("tiger_accounts", "api_keys", "api_key_usage", "token_statuses"):
            assert await session.scalar(text(f"SELECT count(*) FROM {table}")) == 0
        events = [event.model_dump() for event in await factories.events(session)]
        assert events[: len(before)] == before
    assert (len(before), len(events)) == (6, 8)
