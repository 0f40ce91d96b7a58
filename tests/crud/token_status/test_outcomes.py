"""Claims of one refresh, claims given back, and the kinds of failure."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tests.support import factories
from tests.support.tiger_tokens import tiger_token
from tiger_db import (
    AccountStatus,
    AuditAction,
    AuditResult,
    AuditSeverity,
    Database,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud import accounts, token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidState, InvalidValue, LeaseLost

S = TokenRefreshStatus
EXPIRED = timedelta(microseconds=1)  # a lease that has, as soon as it is given
MINUTE = timedelta(minutes=1)
LOST = {"answer_lost": True}


async def account_of(session: AsyncSession, refresh: TokenStatus) -> TigerAccount:
    account = await accounts.get(session, refresh.tiger_account_id)
    assert account is not None
    return account


def about(wait: timedelta, at: datetime | None) -> bool:
    return at is not None and abs(at - datetime.now(UTC) - wait) < timedelta(seconds=10)


# Claiming one


async def test_one_refresh_is_claimed_by_its_id(session: AsyncSession) -> None:
    other = await factories.refresh(session)
    later = await factories.refresh(session, scheduled_at=datetime.now(UTC) + MINUTE)
    await accounts.update(session, later.tiger_account_id, status="suspended")
    claim = await token_status.claim(session, later.id, worker="w", lease=5 * MINUTE)
    assert (claim.id, claim.status, claim.worker) == (later.id, S.IN_PROGRESS, "w")
    assert (claim.fencing_token, claim.details) == (1, None)
    assert about(5 * MINUTE, claim.lease_expires_at)
    assert claim not in session
    await session.refresh(other)
    assert other.status == S.PENDING


async def test_a_refresh_that_is_held_or_has_ended_is_not_claimed(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    with pytest.raises(InvalidState, match="another worker"):
        await token_status.claim(session, claim.id, worker="w")
    await token_status.complete(session, claim, access_token="new")
    cancelled = await factories.refresh(session)
    await token_status.cancel(session, cancelled.id)
    failed = await factories.claim(session, max_retries=1)
    await token_status.fail(session, failed, error="no answer")
    for ended in (claim.id, cancelled.id, failed.id, uuid4()):
        with pytest.raises(InvalidState):
            await token_status.claim(session, ended, worker="w")


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
async def test_who_takes_over_knows_that_an_answer_may_be_lost(
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
    failed = await token_status.fail(session, alive, error="busy", retry_after=timedelta(0))
    (again,) = await token_status.claim_due(session, worker="third")
    assert (failed.details, again.details) == (then, then)


# Giving back


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


# Failing for good


@pytest.mark.parametrize("status", ["active", "inactive", "suspended", "pending_verification"])
async def test_dead_credentials_suspend_an_active_account(
    session: AsyncSession, status: str
) -> None:
    claim = await factories.claim(session, max_retries=5)
    await accounts.update(session, claim.tiger_account_id, status=status)
    before = len(await factories.events(session))
    failed = await token_status.fail(
        session, claim, error="refused", error_code="DEAD", credentials_refused=True
    )
    assert (failed.status, failed.retry_count, failed.error_code) == (S.FAILED, 1, "DEAD")
    assert failed.completed_at is not None
    account = await account_of(session, claim)
    await session.refresh(account)
    was_active = status == "active"
    assert account.status == ("suspended" if was_active else status)
    assert not account.auto_suspended  # forgetting errors does not lift it
    told = (await factories.events(session))[before:]
    assert told[0].action == AuditAction.TOKEN_REFRESH
    assert told[0].result == AuditResult.FAILURE
    critical = [event for event in told if event.severity == AuditSeverity.CRITICAL]
    assert critical == told[1:]
    assert len(critical) == was_active
    for event in critical:
        assert event.action == AuditAction.ACCOUNT_STATUS_CHANGE
        assert (event.old_values, event.new_values) == (
            {"status": "active"},
            {"status": "suspended"},
        )
        assert event.tiger_account_id == account.id
        assert event.details is not None
        assert event.details["refresh"] == str(claim.id)
    await accounts.reset_errors(session, account.id)
    assert account.status == (AccountStatus.SUSPENDED if was_active else status)
    assert await token_status.schedule_due(session) == []


async def test_a_person_brings_an_account_with_dead_credentials_back(
    session: AsyncSession,
) -> None:
    claim = await factories.claim(session)
    await token_status.fail(session, claim, error="refused", credentials_refused=True)
    await accounts.update(session, claim.tiger_account_id, status="active")
    assert await token_status.schedule_due(session) == []  # half an hour
    await token_status.retry(session, claim.id)
    (again,) = await token_status.claim_due(session, worker="w")
    assert (again.id, again.retry_count) == (claim.id, 0)


async def test_a_suspension_is_undone_with_its_failure(clone: Database) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session)
        before = await factories.everything(session)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await token_status.fail(session, claim, error="refused", credentials_refused=True)
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.everything(session) == before
        await token_status.fail(session, claim, error="refused", credentials_refused=True)
    async with clone.session() as session:
        assert (await account_of(session, claim)).status == AccountStatus.SUSPENDED
        with pytest.raises(LeaseLost):
            await token_status.fail(session, claim, error="refused", credentials_refused=True)


@pytest.mark.parametrize("how", ["taken over", "cancelled", "completed", "account closed"])
async def test_a_zombie_suspends_nobody(clone: Database, how: str) -> None:
    async with clone.session() as session:
        await factories.refresh(session)
        (zombie,) = await token_status.claim_due(session, worker="zombie", lease=EXPIRED)
    async with clone.session() as session:
        match how:
            case "taken over":
                assert len(await token_status.claim_due(session, worker="alive")) == 1
            case "cancelled":
                await token_status.cancel(session, zombie.id)
            case "completed":
                await token_status.complete(session, zombie, access_token="good")
            case "account closed":
                await accounts.close(session, zombie.tiger_account_id)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(LeaseLost):
            await token_status.fail(session, zombie, error="no", credentials_refused=True)
        with pytest.raises(LeaseLost):
            await token_status.fail(session, zombie, error="no", answer_lost=True)
        with pytest.raises(LeaseLost):
            await token_status.give_back(session, zombie)
    async with clone.session() as session:
        assert await factories.everything(session) == before


# Failing for now


@pytest.mark.parametrize(("details", "then"), [(None, LOST), ({"a": 1}, {"a": 1} | LOST)])
async def test_a_lost_answer_is_kept(session: AsyncSession, details: Any, then: Any) -> None:
    claim = await factories.claim(session, details=details)
    failed = await token_status.fail(
        session, claim, error="timeout", answer_lost=True, retry_after=timedelta(0)
    )
    assert (failed.status, failed.details) == (S.PENDING, then)
    (again,) = await token_status.claim_due(session, worker="w")
    failed = await token_status.fail(session, again, error="busy", retry_after=timedelta(0))
    assert failed.details == then
    (last,) = await token_status.claim_due(session, worker="w")
    done = await token_status.complete(session, last, access_token="new")
    assert done.details == then


async def test_the_next_refresh_knows_of_a_lost_answer(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    await token_status.fail(session, claim, error="timeout", answer_lost=True)
    account = await account_of(session, claim)
    again = await factories.claim(session, of=account)
    failed = await token_status.fail(session, again, error="refused", credentials_refused=True)
    assert failed.details == LOST
    assert failed.error_message is not None
    assert failed.error_message.startswith("refused (the answer to an earlier attempt was lost")
    await accounts.update(session, account.id, status="active")
    third = await factories.claim(session, of=account)
    await token_status.complete(session, third, access_token="new")
    fourth = await factories.claim(session, of=account)
    failed = await token_status.fail(session, fourth, error="refused", credentials_refused=True)
    assert (failed.details, failed.error_message) == (None, "refused")


async def test_the_broker_s_wait_is_kept_by_the_next_refresh(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    failed = await token_status.fail(session, claim, error="busy", retry_after=100 * MINUTE)
    assert failed.status == S.FAILED
    assert about(100 * MINUTE, failed.next_refresh_at)


@pytest.mark.parametrize("wait", [timedelta(0), timedelta(seconds=90), timedelta(days=2)])
async def test_the_broker_s_wait_is_kept_exactly(clone: Database, wait: timedelta) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session)
    async with clone.session() as session:
        failed = await token_status.fail(session, claim, error="busy", retry_after=wait)
        assert failed.scheduled_at is not None
        assert failed.updated_at is not None
        over = failed.scheduled_at - failed.updated_at - wait  # which began the transaction
        assert timedelta(0) <= over < timedelta(seconds=5)


async def test_who_was_given_up_is_scheduled_when_it_says(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=2)
    failed = await token_status.fail(session, claim, error="busy", retry_after=timedelta(0))
    assert failed.next_refresh_at is None
    (claim,) = await token_status.claim_due(session, worker="w")
    failed = await token_status.fail(session, claim, error="busy", retry_after=timedelta(0))
    assert failed.status == S.FAILED
    assert about(30 * MINUTE, failed.next_refresh_at)
    assert await token_status.schedule_due(session) == []
    assert await token_status.schedule_due(session, within=timedelta(days=1)) == []
    failed.next_refresh_at = datetime.now(UTC) - MINUTE
    (opened,) = await token_status.schedule_due(session)
    assert opened.tiger_account_id == failed.tiger_account_id


async def test_completing_forgets_the_errors_of_both(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    await token_status.fail(
        session, claim, error="busy", error_code="BUSY", retry_after=timedelta(0)
    )
    await crud.accounts.record_error(session, claim.tiger_account_id, message="no answer")
    (claim,) = await token_status.claim_due(session, worker="w")
    made = datetime.now(UTC).replace(microsecond=0)
    done = await token_status.complete(session, claim, access_token=tiger_token(made))
    assert (done.error_code, done.error_message, done.retry_count) == (None, None, 1)
    account = await account_of(session, claim)
    assert (account.error_count, account.last_error, account.last_error_at) == (0, None, None)
    assert done.next_refresh_at == account.token_refresh_at == made + timedelta(days=24)
    assert await token_status.schedule_due(session) == []
