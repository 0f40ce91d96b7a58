"""Claims of refreshes: claiming, the lease, giving back, and lost claims."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.claims import LEASE, USES, claim_due
from tiger_db import (
    AccountStatus,
    Database,
    TokenRefreshStatus,
    crud,
)
from tiger_db.crud import accounts, token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidState,
    InvalidValue,
    LeaseLost,
    NotFound,
)

S = TokenRefreshStatus
EXPIRED = timedelta(microseconds=1)  # a lease that has, as soon as it is given
MINUTE = timedelta(minutes=1)
LOST = {"answer_lost": True}


def about(wait: timedelta, at: datetime | None) -> bool:
    return at is not None and abs(at - datetime.now(UTC) - wait) < timedelta(seconds=10)


async def test_claims_come_longest_due_first(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    hours = [-1, -3, 1, -2]
    refreshes = [
        await factories.refresh(session, scheduled_at=now + timedelta(hours=n)) for n in hours
    ]
    ids = [refresh.id for refresh in refreshes]
    first = await claim_due(session, limit=2)
    rest = await claim_due(session)
    assert [ids.index(claim.id) for claim in (*first, *rest)] == [1, 3, 0]
    assert await claim_due(session) == []


async def test_a_claim_is_a_lease_that_belongs_to_no_session(session: AsyncSession) -> None:
    await factories.refresh(session)
    (claim,) = await claim_due(session, worker="w", lease=timedelta(minutes=5))
    assert claim not in session
    assert (claim.status, claim.worker, claim.fencing_token) == (S.IN_PROGRESS, "w", 1)
    assert claim.started_at is not None
    assert claim.lease_expires_at is not None
    lease = claim.lease_expires_at - claim.started_at
    assert timedelta(minutes=5) <= lease < timedelta(minutes=5, seconds=1)


async def test_a_claim_comes_with_its_account(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    await factories.refresh(session, account)
    (claim,) = await claim_due(session)
    seen = claim.tiger_account
    assert seen == account
    assert seen not in session
    assert (factories.plain(seen.access_token), factories.plain(seen.private_key)) == (
        "token-1",
        "test_key",
    )
    assert seen.label() == account.label()


async def test_skipped_refreshes_are_not_claimed(session: AsyncSession) -> None:
    refresh = await factories.refresh(session)
    other = await factories.refresh(session)
    assert len(await claim_due(session, lease=LEASE)) == 2
    (taken,) = await claim_due(session, lease=LEASE, skip={refresh.id})
    assert taken.id == other.id
    assert len(await claim_due(session)) == 2


async def test_only_active_accounts_are_refreshed(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    await factories.refresh(session, account)
    await crud.accounts.update(session, account.id, status=AccountStatus.SUSPENDED)
    assert await claim_due(session) == []
    await crud.accounts.update(session, account.id, status=AccountStatus.ACTIVE)
    assert len(await claim_due(session)) == 1


async def test_a_lapsed_lease_is_claimed_by_another(session: AsyncSession) -> None:
    await factories.refresh(session)
    (first,) = await claim_due(session, worker="dead", lease=LEASE)
    (second,) = await claim_due(session, worker="alive")
    assert (second.id, second.worker, second.fencing_token) == (first.id, "alive", 2)
    assert (first.worker, first.fencing_token) == ("dead", 1)
    assert await claim_due(session) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"lease": timedelta(0)},
        {"lease": timedelta(seconds=-1)},
        {"lease": timedelta.max},
        {"limit": 0},
        {"limit": 1001},
        {"worker": "x" * 101},
        {"worker": "a\0b"},
    ],
)
async def test_a_claim_refuses_bad_input(clone: Database, arguments: Any) -> None:
    async with clone.session() as session:
        refresh = await factories.refresh(session)
    with pytest.raises(InvalidValue):
        async with clone.session() as session:
            await claim_due(session, **arguments)
    async with clone.session() as session:
        assert await token_status.get(session, refresh.id) == refresh


async def test_the_abandoned_claim_of_a_later_refresh_is_claimed_again(
    session: AsyncSession,
) -> None:
    planned = await factories.refresh(session, scheduled_at=datetime.now(UTC) + timedelta(days=30))
    claimed = await token_status.claim(session, planned.id, worker="dead")
    assert claimed.scheduled_at is not None
    assert claimed.scheduled_at <= datetime.now(UTC)
    later = "now() + interval '30 days'"
    expired = f"lease_expires_at = now() - interval '1 s', scheduled_at = {later}"
    await session.execute(text(f"UPDATE token_statuses SET {expired}"))  # constants
    assert await claim_due(session, worker="other") == []
    now = await token_status.refresh_now(session, planned.tiger_account_id)
    assert (now.found, now.status) == (True, "in_progress")
    (again,) = await claim_due(session, worker="other")
    assert again.id == planned.id


async def test_a_heartbeat_renews_the_lease(session: AsyncSession) -> None:
    await factories.refresh(session)
    (claim,) = await claim_due(session, lease=LEASE)
    renewed = await token_status.heartbeat(session, claim)
    assert await claim_due(session) == []
    assert renewed.fencing_token == claim.fencing_token
    with pytest.raises(InvalidValue, match="lease"):
        await token_status.heartbeat(session, claim, lease=timedelta(0))


@pytest.mark.parametrize(
    ("use", "how"),
    [
        *((use, "taken over") for use in USES),
        *itertools.product(["complete", "fail"], ["cancelled", "completed", "account closed"]),
    ],
)
async def test_a_lost_claim_changes_nothing(clone: Database, use: str, how: str) -> None:
    async with clone.session() as session:
        await factories.refresh(session)
        (zombie,) = await claim_due(session, worker="zombie", lease=LEASE)
    async with clone.session() as session:
        match how:
            case "taken over":
                assert len(await claim_due(session, worker="alive")) == 1
            case "cancelled":
                await token_status.cancel(session, zombie.id)
            case "completed":
                await token_status.complete(session, zombie, access_token="good")
            case "account closed":
                await crud.accounts.close(session, zombie.tiger_account_id)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(LeaseLost):
            await USES[use](session, zombie)
    async with clone.session() as session:
        assert await factories.everything(session) == before


@pytest.mark.parametrize("use", ["complete", "fail"])
async def test_a_claim_goes_with_its_account(session: AsyncSession, use: str) -> None:
    claim = await factories.claim(session)
    await accounts.close(session, claim.tiger_account_id)
    await accounts.delete(session, claim.tiger_account_id)
    with pytest.raises(NotFound, match="TigerAccount"):
        await USES[use](session, claim)


async def test_one_refresh_is_claimed_by_its_id(session: AsyncSession) -> None:
    other = await factories.refresh(session)
    later = await factories.refresh(session, scheduled_at=datetime.now(UTC) + MINUTE)
    await accounts.update(session, later.tiger_account_id, status=AccountStatus.SUSPENDED)
    claim = await token_status.claim(session, later.id, worker="w", lease=5 * MINUTE)
    assert (claim.id, claim.status, claim.worker) == (later.id, S.IN_PROGRESS, "w")
    assert (claim.fencing_token, claim.details) == (1, None)
    assert about(5 * MINUTE, claim.lease_expires_at)
    assert claim not in session
    await session.refresh(other)
    assert other.status == S.PENDING


async def test_a_claimed_or_ended_refresh_is_not_claimed(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    with pytest.raises(InvalidState, match="another worker"):
        await token_status.claim(session, claim.id, worker="w")
    await token_status.complete(session, claim, access_token="new")
    cancelled = await factories.refresh(session)
    await token_status.cancel(session, cancelled.id)
    failed = await factories.claim(session, max_retries=1)
    await token_status.fail(session, failed, message="no answer")
    for ended in (claim.id, cancelled.id, failed.id):
        with pytest.raises(InvalidState):
            await token_status.claim(session, ended, worker="w")
    with pytest.raises(NotFound):
        await token_status.claim(session, uuid4(), worker="w")


@pytest.mark.parametrize("arguments", [{"lease": timedelta(0)}, {"worker": "x" * 101}])
async def test_a_bad_claim_is_refused(clone: Database, arguments: Any) -> None:
    async with clone.session() as session:
        refresh = await factories.refresh(session)
    with pytest.raises(InvalidValue):
        async with clone.session() as session:
            await token_status.claim(session, refresh.id, **{"worker": "w"} | arguments)
    async with clone.session() as session:
        assert await token_status.get(session, refresh.id) == refresh


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize(("details", "then"), [(None, LOST), ({"a": 1}, {"a": 1} | LOST)])
async def test_claiming_an_expired_lease_records_a_lost_answer(
    session: AsyncSession, one: bool, details: Any, then: Any
) -> None:
    await factories.refresh(session, details=details)
    (dead,) = await token_status.claim_due(session, worker="dead", lease=EXPIRED)
    assert dead.details == details
    if one:
        alive = await token_status.claim(session, dead.id, worker="alive")
    else:
        (alive,) = await token_status.claim_due(session, worker="alive")
    assert (alive.worker, alive.fencing_token, alive.details) == ("alive", 2, then)
    with pytest.raises(LeaseLost):
        await token_status.heartbeat(session, dead)
    failed = await token_status.fail(session, alive, message="busy", retry_after=timedelta(0))
    (again,) = await token_status.claim_due(session, worker="third")
    assert (failed.details, again.details) == (then, then)


@pytest.mark.parametrize("wait", [timedelta(0), 7 * MINUTE])
async def test_a_claim_given_back_is_due_after_the_wait(
    session: AsyncSession, wait: timedelta
) -> None:
    claim = await factories.claim(session)
    events = len(await factories.events(session))
    given = await token_status.give_back(session, claim, wait=wait)
    assert (given.status, given.worker, given.lease_expires_at) == (S.PENDING, None, None)
    assert (given.retry_count, given.details) == (0, None)
    assert about(wait, given.scheduled_at)
    assert len(await factories.events(session)) == events
    again = await token_status.claim_due(session, worker="other")
    assert [c.fencing_token for c in again] == ([2] if not wait else [])
    assert all(c.details is None for c in again)  # nobody was asked
    with pytest.raises(LeaseLost):
        await token_status.give_back(session, claim)
