"""Lists, the overview and the statistics of refreshes."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.claims import claim_due
from tiger_db import (
    RefreshTrigger,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.crud import token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidValue,
)

S = TokenRefreshStatus
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


async def opened(
    session: AsyncSession, ago: timedelta, status: TokenRefreshStatus = S.SUCCESS
) -> TokenStatus:
    """A refresh of a new account that was opened so long ago."""
    milliseconds = round((datetime.now(UTC) - ago).timestamp() * 1000)
    account = await factories.account(session)
    row = TokenStatus(
        id=UUID(int=milliseconds << 80 | account.id.int % 2**64),
        tiger_account_id=account.id,
        trigger=RefreshTrigger.MANUAL,
        status=status,
    )
    if status == S.IN_PROGRESS:
        row.worker, row.lease_expires_at = "worker-1", datetime.now(UTC)
    session.add(row)
    await session.flush()
    return row


async def test_lists_of_refreshes(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    failed = await factories.refresh(session, account, max_retries=1)
    await token_status.fail(session, (await claim_due(session))[0], message="no answer")
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


async def test_statistics_of_refreshes(session: AsyncSession) -> None:
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
        await token_status.fail(session, claim, message="no answer", error_code=code)
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


async def test_the_overview_groups_refreshes(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    since = now - MINUTE
    running = [await factories.claim(session) for _ in range(2)]
    dead = await factories.claim(session, max_retries=1)
    await token_status.fail(session, dead, message="no answer")
    dead_too = await factories.claim(session)
    await token_status.fail(session, dead_too, message="refused", credentials_refused=True)
    await opened(session, DAY, S.FAILED)
    await opened(session, DAY)
    again = await factories.claim(session)
    await token_status.fail(session, again, message="busy", retry_after=5 * MINUTE)
    later = await factories.refresh(session, scheduled_at=now + 9 * MINUTE)
    due = [await factories.refresh(session, scheduled_at=now - n * MINUTE) for n in (1, 2)]
    session.expunge_all()
    groups = await token_status.overview(session, since=since)
    assert {name: [row.id for row in rows] for name, rows in groups.items()} == {
        "running": [row.id for row in running],
        "due": [due[1].id, due[0].id],
        "waiting": [again.id, later.id],
        "failed": [dead_too.id, dead.id],
    }
    first = await token_status.overview(session, since=since, limit=1)
    assert [len(rows) for rows in first.values()] == [1, 1, 1, 1]
    assert len((await token_status.overview(session, since=now - 2 * DAY))["failed"]) == 3


async def test_the_overview_without_refreshes_is_empty(session: AsyncSession) -> None:
    groups = await token_status.overview(session, since=datetime.now(UTC))
    assert groups == {"running": [], "due": [], "waiting": [], "failed": []}
    with pytest.raises(InvalidValue, match="since"):
        await token_status.overview(session, since=datetime(2026, 1, 1))  # noqa: DTZ001  # the point
    for limit in (0, 1001):
        with pytest.raises(InvalidValue, match="limit"):
            await token_status.overview(session, since=datetime.now(UTC), limit=limit)
