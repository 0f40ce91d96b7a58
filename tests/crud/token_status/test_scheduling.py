"""Scheduling of refreshes: opening, cancelling, retrying and pruning."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from tests.support import factories
from tests.support.claims import claim_due
from tiger_db import (
    AccountStatus,
    AuditAction,
    AuditLog,
    Database,
    RefreshTrigger,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud import token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AlreadyExists,
    InvalidState,
    InvalidValue,
    LeaseLost,
    MissingReference,
    NotFound,
)

S = TokenRefreshStatus
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


async def opened(
    session: AsyncSession, ago: timedelta, status: TokenRefreshStatus = S.SUCCESS
) -> TokenStatus:
    """Store a refresh of a new account that was opened this long ago."""
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


async def left(session: AsyncSession) -> set[UUID]:
    return {refresh.id for refresh in await token_status.history(session, limit=1000)}


async def test_a_new_refresh_has_the_values_of_its_account(session: AsyncSession) -> None:
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
    assert not first.found
    assert await factories.refresh(session, account, trigger=RefreshTrigger.ERROR) is first
    assert first.found
    (claim,) = await claim_due(session)
    again = await factories.refresh(session, account)
    assert (again.id, again.status, again.found) == (first.id, S.IN_PROGRESS, True)
    await token_status.complete(session, claim, access_token="new")
    other = await factories.refresh(session, account)
    assert (other.id == first.id, other.found) == (False, False)
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


# Refresh now


async def schedule_events(session: AsyncSession) -> list[AuditLog]:
    action = AuditAction.TOKEN_REFRESH_SCHEDULE
    return [event for event in await factories.events(session) if event.action == action]


async def test_refresh_now_opens_a_refresh_that_is_due(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    opened = await token_status.refresh_now(session, account.id)
    assert (opened.found, opened.status, opened.trigger) == (False, S.PENDING, "manual")
    assert "found" not in opened.model_dump()
    assert [event.resource_id for event in await schedule_events(session)] == [str(opened.id)]
    assert [claim.id for claim in await claim_due(session)] == [opened.id]


@pytest.mark.parametrize("state", ["planned", "after a failed attempt", "given back", "retried"])
async def test_refresh_now_brings_an_open_refresh_forward(
    session: AsyncSession, state: str
) -> None:
    later = datetime.now(UTC) + DAY
    account = await factories.account_with_token(session)
    refresh = await factories.refresh(session, account, trigger=RefreshTrigger.SCHEDULED)
    if state == "after a failed attempt":
        (claim,) = await claim_due(session)
        await token_status.fail(session, claim, message="busy", retry_after=DAY)
    elif state == "given back":
        (claim,) = await claim_due(session)
        await token_status.give_back(session, claim, wait=DAY)
    else:
        refresh.scheduled_at = later
        if state == "retried":
            refresh.next_refresh_at = later
        await session.flush()
    before = len(await schedule_events(session))
    assert await claim_due(session) == []
    planned = refresh.scheduled_at

    found = await token_status.refresh_now(session, account.id)
    assert (found.id, found.found, found.status) == (refresh.id, True, S.PENDING)
    assert found.trigger == RefreshTrigger.SCHEDULED
    assert found.retry_count == (state == "after a failed attempt")
    (event,) = (await schedule_events(session))[before:]
    assert event.resource_id == str(refresh.id)
    assert event.old_values is not None
    assert event.new_values is not None
    assert datetime.fromisoformat(str(event.old_values["scheduled_at"])) == planned
    assert datetime.fromisoformat(str(event.new_values["scheduled_at"])) == found.scheduled_at
    assert [claim.id for claim in await claim_due(session)] == [refresh.id]


async def test_refresh_now_leaves_a_refresh_that_is_due_or_in_progress(
    session: AsyncSession,
) -> None:
    refresh = await factories.refresh(session)
    (event,) = await schedule_events(session)
    due = await token_status.refresh_now(session, refresh.tiger_account_id)
    assert (due.id, due.found, due.scheduled_at) == (refresh.id, True, refresh.created_at)
    (claim,) = await claim_due(session)
    running = await token_status.refresh_now(session, refresh.tiger_account_id)
    assert (running.id, running.found, running.status) == (refresh.id, True, S.IN_PROGRESS)
    assert (running.worker, running.lease_expires_at) == (claim.worker, claim.lease_expires_at)
    assert await schedule_events(session) == [event]
    await token_status.heartbeat(session, claim)  # the claim is not lost


async def test_refresh_now_does_not_wait_for_the_next_refresh_of_a_failed_one(
    session: AsyncSession,
) -> None:
    claim = await factories.claim(session, max_retries=1)
    failed = await token_status.fail(session, claim, message="no answer")
    assert failed.next_refresh_at is not None
    assert failed.next_refresh_at > datetime.now(UTC)
    opened = await token_status.refresh_now(session, claim.tiger_account_id)
    assert (opened.id == failed.id, opened.found) == (False, False)
    assert [claim.id for claim in await claim_due(session)] == [opened.id]


async def test_refresh_now_refuses_closed_and_unknown_accounts(session: AsyncSession) -> None:
    account = await factories.account(session)
    await crud.accounts.update(session, account.id, status=AccountStatus.SUSPENDED)
    suspended = await token_status.refresh_now(session, account.id)
    assert suspended.is_open
    await crud.accounts.close(session, account.id)
    with pytest.raises(InvalidState, match="closed"):
        await token_status.refresh_now(session, account.id)
    with pytest.raises(NotFound):
        await token_status.refresh_now(session, uuid4())
    assert [row.id for row in await token_status.history(session)] == [suspended.id]


# Scheduling


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
    failed = await token_status.fail(session, claim, message="no answer")
    assert await token_status.schedule_due(session) == []
    assert failed.completed_at is not None
    assert failed.next_refresh_at is not None
    wait = failed.next_refresh_at - failed.completed_at
    assert abs(wait - timedelta(minutes=30)) < timedelta(seconds=1)
    failed.next_refresh_at -= timedelta(minutes=31)
    assert len(await token_status.schedule_due(session)) == 1


async def test_an_open_refresh_is_cancelled(session: AsyncSession) -> None:
    refresh = await factories.refresh(session)
    cancelled = await token_status.cancel(session, refresh.id)
    assert (cancelled.status, cancelled.completed_at is None) == (S.CANCELLED, False)
    assert (await factories.events(session))[-1].action == AuditAction.TOKEN_REFRESH_CANCEL
    with pytest.raises(InvalidState, match="cancelled"):
        await token_status.cancel(session, refresh.id)
    assert await claim_due(session) == []


async def test_a_failed_refresh_is_retried(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    with pytest.raises(InvalidState, match="in_progress"):
        await token_status.retry(session, claim.id)
    await token_status.fail(session, claim, message="no answer")
    again = await token_status.retry(session, claim.id)
    assert (again.status, again.retry_count, again.completed_at) == (S.PENDING, 0, None)
    (second,) = await claim_due(session)
    assert second.id == claim.id
    with pytest.raises(LeaseLost):
        await token_status.heartbeat(session, claim)


async def test_retrying_opens_no_second_refresh(clone: Database) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session, max_retries=1)
        failed = await token_status.fail(session, claim, message="no answer")
        account = await crud.accounts.get(session, claim.tiger_account_id)
        other = await factories.refresh(session, account)
        with pytest.raises(AlreadyExists):
            await token_status.retry(session, failed.id)
        await token_status.cancel(session, other.id)
        await crud.accounts.close(session, claim.tiger_account_id)
        with pytest.raises(InvalidState, match="closed"):
            await token_status.retry(session, failed.id)
    async with clone.session() as session:
        refreshes = await token_status.history(session)
        assert [refresh.status for refresh in refreshes] == [S.CANCELLED, S.FAILED]


@pytest.mark.parametrize("change", [token_status.cancel, token_status.retry])
async def test_cancelling_or_retrying_a_missing_refresh_raises_not_found(
    session: AsyncSession, change: Callable[[AsyncSession, UUID], Awaitable[object]]
) -> None:
    with pytest.raises(NotFound):
        await change(session, uuid4())


async def test_old_ended_refreshes_are_pruned(session: AsyncSession) -> None:
    old = {status: await opened(session, 31 * DAY, status) for status in S}
    young = await opened(session, 29 * DAY)
    assert await token_status.prune(session, older_than=32 * DAY) == 0
    assert await token_status.prune(session, older_than=30 * DAY) == 4
    assert await left(session) == {old[S.PENDING].id, old[S.IN_PROGRESS].id, young.id}
    assert await token_status.prune(session, older_than=30 * DAY) == 0


@pytest.mark.parametrize("off", [[], ["hashjoin", "hashagg", "mergejoin", "material", "sort"]])
async def test_the_oldest_refreshes_are_pruned_first_up_to_the_limit(
    session: AsyncSession, off: list[str]
) -> None:
    """The result does not depend on the plan, even if it could run the subquery again."""
    for method in off:
        await session.execute(text(f"SET LOCAL enable_{method} = off"))
    ids = [(await opened(session, days * DAY)).id for days in (5, 4, 3, 2)]
    assert await token_status.prune(session, older_than=DAY, limit=3) == 3
    assert await left(session) == {ids[-1]}
    assert await token_status.prune(session, older_than=DAY, limit=3) == 1


@pytest.mark.parametrize("older_than", [timedelta(0), -DAY])
async def test_the_age_of_pruned_refreshes_must_be_positive(
    session: AsyncSession, older_than: timedelta
) -> None:
    await opened(session, DAY)
    with pytest.raises(InvalidValue, match="older_than"):
        await token_status.prune(session, older_than=older_than)
    assert len(await left(session)) == 1


async def test_parallel_prunes_do_not_wait_for_each_other(clone: Database) -> None:
    async with clone.session() as session:
        for _ in range(4):
            await opened(session, 2 * DAY)
    async with clone.session() as one, clone.session() as other:
        assert await token_status.prune(one, older_than=DAY, limit=3) == 3
        assert await token_status.prune(other, older_than=DAY, limit=3) == 1
