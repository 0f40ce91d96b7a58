"""Lists, the overview and the statistics of refreshes."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.claims import claim_due
from tests.support.recording import recorded
from tiger_db import (
    Database,
    RefreshTrigger,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.crud import token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidCursor,
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


# Filters, orders and pages of `history`


@pytest.fixture
async def listed(session: AsyncSession) -> dict[str, TokenStatus]:
    """Return refreshes of three accounts, by name, oldest first."""
    now = datetime.now(UTC)
    one, two, three = [
        await factories.account(session, account_name=name, account_number=number)
        for name, number in (("First", "U1001"), ("50%_off", "U1002"), ("5000off", "U1003"))
    ]
    found: dict[str, TokenStatus] = {}
    for name, account, trigger, ago in (
        ("old", one, RefreshTrigger.SCHEDULED, 3 * DAY),
        ("failed", one, RefreshTrigger.MANUAL, 2 * DAY),
        ("cancelled", two, RefreshTrigger.ERROR, DAY),
        ("pending", two, RefreshTrigger.MANUAL, MINUTE),
        ("planned", three, RefreshTrigger.SCHEDULED, timedelta(0)),
    ):
        statuses = {"old": S.SUCCESS, "failed": S.FAILED, "cancelled": S.CANCELLED}
        found[name] = TokenStatus(
            id=UUID(int=round((now - ago).timestamp() * 1000) << 80 | len(found)),
            tiger_account_id=account.id,
            trigger=trigger,
            status=statuses.get(name, S.PENDING),
            scheduled_at=now + DAY if name == "planned" else now - ago,
        )
    session.add_all(found.values())
    await session.flush()
    return found


A_WEEK_AGO = datetime.now(UTC) - 7 * DAY


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({}, "planned pending cancelled failed old"),
        ({"status": S.FAILED}, "failed"),
        ({"status": "failed"}, "failed"),
        ({"status": [S.FAILED, "cancelled"]}, "cancelled failed"),
        ({"status": ()}, ""),
        ({"status": None}, "planned pending cancelled failed old"),
        ({"trigger": RefreshTrigger.SCHEDULED}, "planned old"),
        ({"trigger": {"scheduled", "error"}}, "planned cancelled old"),
        ({"since": A_WEEK_AGO + 4.5 * DAY}, "planned pending cancelled failed"),
        ({"until": A_WEEK_AGO + 4.5 * DAY}, "old"),
        ({"since": A_WEEK_AGO + 4.5 * DAY, "until": A_WEEK_AGO + 6.5 * DAY}, "cancelled failed"),
        ({"search": "first"}, "failed old"),
        ({"search": "u100"}, "planned pending cancelled failed old"),
        ({"search": "0%_O"}, "pending cancelled"),
        ({"search": "no such account"}, ""),
        ({"search": "1001", "status": ["failed", "pending"], "trigger": "manual"}, "failed"),
        ({"search": "1001", "trigger": "error"}, ""),
    ],
)
async def test_refreshes_are_filtered(
    session: AsyncSession, listed: dict[str, TokenStatus], filters: Any, names: str
) -> None:
    page = await token_status.history(session, **filters, count=True)
    assert page.items == [listed[name] for name in names.split()]
    assert page.total == len(page.items)


async def test_refreshes_of_one_or_several_accounts_are_listed(
    session: AsyncSession, listed: dict[str, TokenStatus]
) -> None:
    one, two, three = [listed[name].tiger_account_id for name in ("old", "pending", "planned")]
    for account_id, names in (
        (one, "failed old"),
        ([one, three], "planned failed old"),
        ({two}, "pending cancelled"),
        ([], ""),
        (uuid4(), ""),
    ):
        page = await token_status.history(session, account_id=account_id)
        assert page.items == [listed[name] for name in names.split()]
    pending = await token_status.get_pending_refreshes(
        session, account_id=[two, three], order_by="schedule", count=True
    )
    assert (pending.items, pending.total) == ([listed["pending"], listed["planned"]], 2)
    failed = await token_status.get_failed_refreshes(session, search="first", since=A_WEEK_AGO)
    assert failed.items == [listed["failed"]]
    assert (await token_status.get_failed_refreshes(session, account_id=two)).items == []


async def test_the_order_by_schedule_has_pages_in_both_directions(session: AsyncSession) -> None:
    at = [datetime(2026, 11, 1, tzinfo=UTC) + n * DAY for n in (0, 1, 1, 1, 2)]
    rows = [await factories.refresh(session, scheduled_at=time) for time in reversed(at)][::-1]
    in_order = sorted(rows, key=lambda row: (row.scheduled_at, row.id))
    pages = [await token_status.get_pending_refreshes(session, order_by="schedule", limit=2)]
    while (after := pages[-1].next_cursor) is not None:
        pages.append(
            await token_status.get_pending_refreshes(
                session, order_by="schedule", limit=2, after=after
            )
        )
    assert [row for page in pages for row in page] == in_order
    assert [len(page) for page in pages] == [2, 2, 1]
    before = pages[-1].previous_cursor
    assert before is not None
    for expected in (pages[1], pages[0]):
        assert before is not None
        page = await token_status.get_pending_refreshes(
            session, order_by="schedule", limit=2, before=before
        )
        assert page.items == expected.items
        before = page.previous_cursor
    assert before is None


async def test_a_cursor_of_refreshes_is_of_one_list_order_and_filter(
    session: AsyncSession, listed: dict[str, TokenStatus]
) -> None:
    account_id = listed["pending"].tiger_account_id
    page = await token_status.history(session, limit=1)
    cursor = page.next_cursor
    assert (await token_status.history(session, after=cursor, limit=1)).items == [listed["pending"]]
    others: list[Callable[..., Awaitable[object]]] = [
        partial(token_status.history, order_by="schedule"),
        partial(token_status.history, account_id=account_id),
        partial(token_status.history, search="a"),
        token_status.get_pending_refreshes,
        token_status.get_failed_refreshes,
    ]
    for other in others:
        for direction in ("after", "before"):
            with pytest.raises(InvalidCursor):
                await other(session, **{direction: cursor})


async def test_the_accounts_of_refreshes_are_loaded_with_one_more_statement(
    database: Database, session: AsyncSession, listed: dict[str, TokenStatus]
) -> None:
    session.expunge_all()
    for load, count, statements in (((), False, 1), (["tiger_account"], True, 2)):
        with recorded(database) as sent:
            page = await token_status.history(session, load=load, count=count)
        # The total of a list with one page is known without a further statement.
        assert len(sent) == statements
    assert [row.tiger_account.account_number for row in page] == [
        "U1003", "U1002", "U1002", "U1001", "U1001"
    ]  # fmt: skip
    with pytest.raises(InvalidValue, match="api_keys"):
        await token_status.get_pending_refreshes(session, load=["api_keys"])


async def test_a_filter_of_refreshes_is_checked(session: AsyncSession) -> None:
    wrong: list[dict[str, Any]] = [
        {"status": "done"}, {"trigger": ["because"]}, {"account_id": "U1"}, {"colour": "red"},
        {"search": 5}, {"since": datetime(2026, 1, 1)},  # noqa: DTZ001  # the point
        {"order_by": "name"},
    ]  # fmt: skip
    for filters in wrong:
        with pytest.raises(InvalidValue, match=next(iter(filters))):
            await token_status.history(session, **filters)
    more: dict[str, Any] = {"status": "failed"}
    with pytest.raises(InvalidValue, match="unknown filters: status"):
        await token_status.get_pending_refreshes(session, **more)


# Statistics


async def test_statistics_of_refreshes(database: Database, session: AsyncSession) -> None:
    since = datetime.now(UTC) - timedelta(minutes=1)
    account = await factories.account_with_token(session)
    for milliseconds in (100, 200, 300, 600):
        refresh = await factories.refresh(session, account)
        (claim,) = await claim_due(session)
        await token_status.complete(session, claim, access_token="new")
        await session.execute(
            text("UPDATE token_statuses SET duration_ms = :ms WHERE id = :id"),
            {"ms": milliseconds, "id": refresh.id},
        )
    for code in ("TIMEOUT", None, "TIMEOUT"):
        await factories.refresh(session, account, max_retries=1, trigger=RefreshTrigger.ERROR)
        (claim,) = await claim_due(session)
        await token_status.fail(session, claim, message="no answer", error_code=code)
    await factories.refresh(session, account)
    other = await factories.refresh(session, max_retries=1)
    await token_status.cancel(session, other.id)
    with recorded(database) as sent:
        found = await token_status.statistics(session, since=since, account_id=account.id)
    assert len(sent) == 1
    assert found.p95_ms == pytest.approx(555)
    assert found == token_status.RefreshStatistics(
        total=8,
        succeeded=4,
        failed=3,
        open=1,
        success_rate=4 / 7,
        mean_ms=300,
        median_ms=250,
        p95_ms=found.p95_ms,
        by_trigger={"manual": 5, "error": 3},
        by_error={"TIMEOUT": 2, "unknown": 1},
    )
    everything = await token_status.statistics(session, since=since)
    assert everything == replace(found, total=9, by_trigger={"manual": 6, "error": 3})
    one = await token_status.statistics(session, since=since, account_id=other.tiger_account_id)
    assert (one.total, one.success_rate, one.by_trigger) == (1, None, {"manual": 1})
    for empty in (
        await token_status.statistics(session, since=datetime.now(UTC) + timedelta(hours=1)),
        await token_status.statistics(session, since=since, account_id=uuid4()),
    ):
        assert empty == token_status.RefreshStatistics(
            total=0,
            succeeded=0,
            failed=0,
            open=0,
            success_rate=None,
            mean_ms=None,
            median_ms=None,
            p95_ms=None,
            by_trigger={},
            by_error={},
        )
    with pytest.raises(InvalidValue, match="since"):
        await token_status.statistics(session, since=datetime(2026, 1, 1))  # noqa: DTZ001


# The overview


@pytest.mark.slow
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
