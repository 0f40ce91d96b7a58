"""Time that passes for stored rows."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.refresh_workers import at_once, run_once
from tests.support.waiting import until
from tiger_db import AuditAction, Database, KeyVerifier, crud
from tiger_db.database import AsyncSession
from tiger_db.errors import APIKeyExpired, InvalidValue, RateLimited
from tiger_db.testing import let_time_pass

HOUR = timedelta(hours=1)


async def test_a_key_expires_for_both_clocks(session: AsyncSession) -> None:
    expiry = datetime.now(UTC) + HOUR
    key, raw_key = await factories.api_key(session, expires_at=expiry)
    await let_time_pass(session, timedelta(minutes=50))
    assert await crud.api_keys.verify_api_key(session, raw_key)
    assert not key.is_expired
    await let_time_pass(session, timedelta(minutes=10))
    assert key.is_expired
    assert key.expires_at is not None
    assert expiry - key.expires_at == HOUR
    with pytest.raises(APIKeyExpired):
        await crud.api_keys.authorize_api_key(session, raw_key)


async def test_a_verifier_with_memory_sees_that_time_has_passed(clone: Database) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session, expires_at=datetime.now(UTC) + HOUR)

    async def is_refused() -> bool:
        try:
            await verifier.authorize(raw_key)
        except APIKeyExpired:
            return True
        return False

    async with KeyVerifier(clone, memory=True) as verifier:
        assert not await is_refused()
        async with clone.session() as session:
            await let_time_pass(session, 2 * HOUR)
        await until(is_refused)


async def test_a_limit_begins_anew_after_its_hour(session: AsyncSession) -> None:
    _, raw_key = await factories.api_key(session, rate_limit_per_hour=1, rate_limit_per_day=9)
    await crud.api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited) as limited:
        await crud.api_keys.authorize_api_key(session, raw_key)
    await let_time_pass(session, limited.value.retry_after)
    await crud.api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited):
        await crud.api_keys.authorize_api_key(session, raw_key)
    await let_time_pass(session, timedelta(microseconds=1))
    with pytest.raises(RateLimited):  # the hour has not ended
        await crud.api_keys.authorize_api_key(session, raw_key)


async def test_a_token_becomes_due(clone: Database) -> None:
    month = timedelta(days=30)
    async with clone.session() as session:
        account = await factories.account(
            session, access_token="t", token_expires_at=datetime.now(UTC) + month
        )
    assert (await run_once(clone, at_once)).counts["refreshed"] == 0
    async with clone.session() as session:
        await let_time_pass(session, month)
        (found,) = await crud.accounts.list_accounts(session)
        assert found.id == account.id
        assert found.needs_token_refresh
    assert (await run_once(clone, at_once)).counts["refreshed"] == 1


async def test_audit_events_keep_their_times_and_own_tables_do_not(clone: Database) -> None:
    async with clone.session() as session:
        await session.execute(text("CREATE TABLE own (id int, at timestamptz, on_day date)"))
        await session.execute(text("INSERT INTO own VALUES (1, now(), now()::date)"))
        event = await crud.audit_logs.log_event(session, action=AuditAction.DASHBOARD_LOGIN)
        created_at = event.created_at
        account = await factories.account(session)
        before = account.updated_at
        await let_time_pass(session, HOUR)
        assert event.created_at == created_at
        assert before is not None
        assert account.updated_at == before - HOUR
        assert (await session.scalar(text("SELECT now() - at FROM own"))) == HOUR
    # Triggers are on again.
    with pytest.raises(Exception, match="append-only"):
        async with clone.session() as session:
            await session.execute(text("DELETE FROM audit_logs"))


async def test_time_does_not_pass_backwards(session: AsyncSession) -> None:
    with pytest.raises(InvalidValue, match="negative"):
        await let_time_pass(session, -HOUR)
