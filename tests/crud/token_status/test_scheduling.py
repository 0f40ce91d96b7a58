from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from tests.support import factories
from tiger_db import (
    AuditAction,
    RefreshTrigger,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud import token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidState,
    InvalidValue,
    MissingReference,
)

S = TokenRefreshStatus


async def claim_due(session: AsyncSession, **arguments: Any) -> list[TokenStatus]:
    return await token_status.claim_due(session, **{"worker": "worker-1"} | arguments)


# Opening


async def test_a_refresh_is_opened_with_what_is_known(session: AsyncSession) -> None:
    account = await factories.account_with_token(session, environment="SANDBOX")
    refresh = await factories.refresh(session, account, max_retries=5, details={"a": [1]})
    assert refresh.model_dump(exclude_none=True) == {
        "id": refresh.id,
        "created_at": refresh.created_at,
        "updated_at": refresh.updated_at,
        "tiger_account_id": account.id,
        "status": "pending",
        "trigger": "manual",
        "old_token_expires_at": account.token_expires_at,
        "scheduled_at": refresh.created_at,
        "retry_count": 0,
        "max_retries": 5,
        "details": {"a": [1]},
        "environment": "SANDBOX",
        "fencing_token": 0,
    }


async def test_an_account_has_one_open_refresh(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    first = await factories.refresh(session, account)
    assert await factories.refresh(session, account, trigger=RefreshTrigger.ERROR) is first
    (claim,) = await claim_due(session)
    again = await factories.refresh(session, account)
    assert (again.id, again.status) == (first.id, S.IN_PROGRESS)
    await token_status.complete(session, claim, access_token="new")
    assert (await factories.refresh(session, account)).id != first.id
    actions = [event.action for event in await factories.events(session)]
    assert actions.count(AuditAction.TOKEN_REFRESH_SCHEDULE) == 2


async def test_unflushed_changes_survive_opening(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    account.description = "not flushed"
    await factories.refresh(session, account)
    assert account.description == "not flushed"


async def test_no_refresh_for_a_missing_or_closed_account(session: AsyncSession) -> None:
    account = await factories.account(session)
    await crud.accounts.close(session, account.id)
    with pytest.raises(InvalidState, match="closed"):
        await factories.refresh(session, account)
    with pytest.raises(MissingReference):
        await factories.refresh(session, tiger_account_id=uuid4())
    assert (await token_status.history(session)).items == []


@pytest.mark.parametrize(
    "values",
    [
        {"trigger": "because"},
        {"max_retries": -1},
        {"scheduled_at": datetime(2026, 1, 1)},  # noqa: DTZ001  # the point
        {"details": {"a": float("nan")}},
    ],
)
async def test_opening_names_a_refused_value(session: AsyncSession, values: Any) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        await factories.refresh(session, **values)
    assert (await token_status.history(session)).items == []


async def test_scheduling_opens_one_for_each_due_account(session: AsyncSession) -> None:
    now = datetime.now(UTC)

    async def expiring(minutes: int, **overrides: Any) -> TigerAccount:
        at = now + timedelta(minutes=minutes)
        return await factories.account_with_token(session, token_expires_at=at, **overrides)

    soon, expired, later = await expiring(50), await expiring(-50), await expiring(120)
    await expiring(5, status="suspended")
    await expiring(5, access_token=None)
    await factories.refresh(session, await expiring(5))
    opened = await token_status.schedule_due(session)
    assert {refresh.tiger_account_id: refresh.trigger for refresh in opened} == {
        soon.id: RefreshTrigger.SCHEDULED,
        expired.id: RefreshTrigger.EXPIRED,
    }
    assert await token_status.schedule_due(session) == []
    (last,) = await token_status.schedule_due(session, within=timedelta(hours=3))
    assert last.tiger_account_id == later.id
    actions = [event.action for event in await factories.events(session)]
    assert actions.count(AuditAction.TOKEN_REFRESH_SCHEDULE) == 4


async def test_scheduling_takes_the_soonest_first(session: AsyncSession) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=1)
    await factories.account_with_token(session)
    urgent = await factories.account_with_token(session, token_expires_at=soon)
    (opened,) = await token_status.schedule_due(session, limit=1)
    assert opened.tiger_account_id == urgent.id


async def test_an_account_given_up_is_left_alone_for_half_an_hour(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    failed = await token_status.fail(session, claim, error="no answer")
    assert await token_status.schedule_due(session) == []
    assert failed.completed_at is not None
    assert failed.next_refresh_at is not None
    wait = failed.next_refresh_at - failed.completed_at
    assert abs(wait - timedelta(minutes=30)) < timedelta(seconds=1)
    failed.next_refresh_at -= timedelta(minutes=31)
    assert len(await token_status.schedule_due(session)) == 1


# Reading


async def test_lists(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    failed = await factories.refresh(session, account, max_retries=1)
    await token_status.fail(session, (await claim_due(session))[0], error="no answer")
    pending = await factories.refresh(session, account)
    other = await factories.refresh(session)
    await token_status.cancel(session, other.id)

    assert (await token_status.get_pending_refreshes(session)).items == [pending]
    assert [r.id for r in await token_status.get_failed_refreshes(session)] == [failed.id]
    everyone = [r.id for r in await token_status.history(session)]
    assert everyone == [other.id, pending.id, failed.id]
    mine = [r.id for r in await token_status.history(session, account_id=account.id)]
    assert mine == [pending.id, failed.id]
    assert await token_status.get_latest_status(session, account.id) is pending
    assert await token_status.get(session, pending.id) is pending
    assert await token_status.get(session, uuid4()) is None
    assert await token_status.get_latest_status(session, uuid4()) is None


async def test_statistics(session: AsyncSession) -> None:
    since = datetime.now(UTC) - timedelta(minutes=1)
    account = await factories.account_with_token(session)
    for milliseconds in (100, 200, 300):
        refresh = await factories.refresh(session, account)
        (claim,) = await claim_due(session)
        await token_status.complete(session, claim, access_token="new")
        await session.execute(
            text("UPDATE token_statuses SET duration_ms = :ms WHERE id = :id"),
            {"ms": milliseconds, "id": refresh.id},
        )
    for code in ("TIMEOUT", None):
        await factories.refresh(session, account, max_retries=1, trigger=RefreshTrigger.ERROR)
        (claim,) = await claim_due(session)
        await token_status.fail(session, claim, error="no answer", error_code=code)
    await factories.refresh(session, account)
    assert await token_status.statistics(session, since=since) == token_status.RefreshStatistics(
        total=6,
        succeeded=3,
        failed=2,
        open=1,
        success_rate=0.6,
        p50_ms=200,
        p95_ms=290,
        by_trigger={"manual": 4, "error": 2},
        by_error={"TIMEOUT": 1, "unknown": 1},
    )
    empty = await token_status.statistics(session, since=datetime.now(UTC) + timedelta(hours=1))
    assert (empty.total, empty.success_rate, empty.p50_ms, empty.by_trigger) == (0, None, None, {})
    with pytest.raises(InvalidValue, match="since"):
        await token_status.statistics(session, since=datetime(2026, 1, 1))  # noqa: DTZ001
