"""Outcomes of refreshes: new tokens, failures, backoff and suspension."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from tests.support import factories
from tests.support.claims import LEASE, claim_due
from tests.support.concurrency import lock_until_waiting
from tests.support.contexts import changed_context
from tests.support.secrets_in_text import API_KEY, JWT, PEM
from tests.support.tiger_tokens import SOON, tiger_token
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
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.errors import (
    LeaseLost,
    StaleToken,
)
from tiger_db.redaction import MASK

S = TokenRefreshStatus
EXPIRED = timedelta(microseconds=1)  # a lease that has, as soon as it is given
MINUTE = timedelta(minutes=1)
LOST = {"answer_lost": True}


async def claim_with_token(session: AsyncSession) -> TokenStatus:
    """Claim the refresh of an account whose token was generated at `SOON`."""
    account = await factories.account(session, access_token=tiger_token(SOON))
    await factories.refresh(session, account)
    (claim,) = await claim_due(session, lease=LEASE)
    return claim


async def account_of(session: AsyncSession, refresh: TokenStatus) -> TigerAccount:
    account = await accounts.get(session, refresh.tiger_account_id)
    assert account is not None
    return account


def about(wait: timedelta, at: datetime | None) -> bool:
    return at is not None and abs(at - datetime.now(UTC) - wait) < timedelta(seconds=10)


async def test_completing_stores_the_token_and_resets_errors(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    await crud.accounts.record_error(session, claim.tiger_account_id, message="no answer")
    expiry = datetime.now(UTC) + timedelta(days=15)
    refresh = await token_status.complete(
        session,
        claim,
        access_token="token-2",
        refresh_token="refresh-2",
        expires_at=expiry,
        api_response_code=0,
        api_response_time_ms=12,
        server_version="3.1",
    )
    account = await crud.accounts.get(session, claim.tiger_account_id)
    assert account is not None
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == "token-2"
    assert account.refresh_token is not None
    assert account.refresh_token.get_secret_value() == "refresh-2"
    assert account.token_expires_at == expiry
    assert (account.error_count, account.last_error, account.last_error_at) == (0, None, None)
    assert refresh.status == S.SUCCESS
    assert refresh.completed_at is not None
    assert refresh.duration_ms is not None
    assert refresh.lease_expires_at is None
    assert refresh.old_token_hash == token_status.token_hash("token-1")
    assert refresh.new_token_hash == token_status.token_hash("token-2")
    assert refresh.new_token_expires_at == expiry
    assert refresh.next_refresh_at is not None
    ahead = expiry - refresh.next_refresh_at  # a fifth of the life
    assert abs(ahead - timedelta(days=3)) < timedelta(seconds=10)
    assert account.token_refresh_at is not None
    assert abs(account.token_refresh_at - refresh.next_refresh_at) < timedelta(seconds=10)
    answer = (refresh.api_response_code, refresh.api_response_time_ms, refresh.server_version)
    assert answer == (0, 12, "3.1")
    event = (await factories.events(session))[-1]
    assert (event.action, event.result) == (AuditAction.TOKEN_REFRESH, AuditResult.SUCCESS)
    assert (event.resource_id, event.tiger_account_id) == (str(claim.id), account.id)
    stored = await factories.everything(session)
    assert not any(secret in stored for secret in ("token-1", "token-2", "refresh-2"))


@pytest.mark.parametrize(
    "values",
    [
        {"access_token": ""},
        {"access_token": "\ud800"},
        {"access_token": "new", "refresh_token": "**********"},
        {"access_token": "new", "expires_at": datetime(2027, 1, 1)},  # noqa: DTZ001
        {"access_token": "new", "server_version": "x" * 51},
        {"access_token": "new", "api_response_code": 2**63},
        {"access_token": "new", "api_response_time_ms": -1},
    ],
)
async def test_a_refused_completion_changes_nothing(clone: Database, values: Any) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(ValidationError):
            await token_status.complete(session, claim, **values)
    async with clone.session() as session:
        assert await factories.everything(session) == before
        await token_status.complete(session, claim, access_token="good")


@pytest.mark.parametrize(
    "values", [{"error_code": "x" * 51}, {"api_response_code": 2**63}, {"api_response_time_ms": -1}]
)
async def test_a_refused_failure_changes_nothing(clone: Database, values: Any) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(ValidationError):
            await token_status.fail(session, claim, message="no answer", **values)
    async with clone.session() as session:
        assert await factories.everything(session) == before


async def test_an_unreadable_token_is_replaced(clone: Database) -> None:
    async with clone.session() as session:
        await factories.refresh(session)
    async with clone.sessions(
        info=changed_context(clone.info, key_provider=KeyRing.parse(generate_key("other")))
    ) as session:
        (claim,) = await claim_due(session)
        refresh = await token_status.complete(session, claim, access_token="new")
        account = await crud.accounts.get(session, claim.tiger_account_id)
    assert refresh.old_token_hash is None
    assert account is not None
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == "new"


@pytest.mark.parametrize("known", [True, False])
async def test_completing_after_the_token_has_changed_since_the_claim(
    clone: Database, *, known: bool
) -> None:
    """The account's token is not the one in the claim."""
    older, changed, newer = (tiger_token(SOON + n * timedelta(days=1)) for n in range(3))
    async with clone.session() as session:
        claim = await factories.claim(session)
        claim = claim if known else claim.model_copy()
        account_id = claim.tiger_account_id
        await crud.accounts.update_tokens(session, account_id, access_token=changed)
    async with clone.session() as session:
        before = await factories.everything(session)
        with pytest.raises(StaleToken):
            await token_status.complete(session, claim, access_token=older)
        assert await factories.everything(session) == before
    async with clone.session() as session:
        done = await token_status.complete(session, claim, access_token=newer)
    assert done.old_token_hash == token_status.token_hash(changed)
    assert done.new_token_hash == token_status.token_hash(newer)


async def test_completing_waits_for_another_change_of_the_account(clone: Database) -> None:
    """Completing then uses the changed account."""
    older, newer = tiger_token(), tiger_token(SOON)
    async with clone.session() as session:
        claim = await factories.claim(session)

    async def complete() -> None:
        async with clone.session() as session:
            await token_status.complete(session, claim, access_token=older)

    async with lock_until_waiting(clone, "tiger_accounts", waiting=1) as session:
        await crud.accounts.update_tokens(session, claim.tiger_account_id, access_token=newer)
        completing = asyncio.create_task(complete())
    with pytest.raises(StaleToken):
        await completing
    async with clone.session() as session:
        account = await crud.accounts.get(session, claim.tiger_account_id)
        assert account is not None
        assert factories.plain(account.access_token) == newer


async def test_completing_updates_the_objects_of_the_session(
    session: AsyncSession,
) -> None:
    account = await factories.account_with_token(session)
    refresh = await factories.refresh(session, account)
    (claim,) = await claim_due(session)
    account.description = "not yet saved"
    token = tiger_token()
    done = await token_status.complete(session, claim, access_token=token)
    assert done is refresh
    assert (refresh.status, refresh.worker) == (S.SUCCESS, "worker-1")
    assert factories.plain(account.access_token) == token
    assert account.token_expires_at == done.new_token_expires_at
    assert account.description == "not yet saved"
    done.details = {"a": 1}
    await session.flush()
    await session.refresh(done)
    assert done.details == {"a": 1}


async def test_an_older_token_leaves_the_claim_as_it_was(clone: Database) -> None:
    async with clone.session() as session:
        claim = await claim_with_token(session)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(StaleToken):
            await token_status.complete(session, claim, access_token=tiger_token())
    async with clone.session() as session:
        assert await factories.everything(session) == before
        newer = await token_status.complete(session, claim, access_token=tiger_token(SOON))
        assert newer.status == S.SUCCESS


@pytest.mark.parametrize("how", ["taken over", "cancelled", "completed", "account closed"])
async def test_a_lost_claim_with_an_older_token_is_lost(clone: Database, how: str) -> None:
    async with clone.session() as session:
        zombie = await claim_with_token(session)
    async with clone.session() as session:
        match how:
            case "taken over":
                assert len(await claim_due(session, worker="alive")) == 1
            case "cancelled":
                await token_status.cancel(session, zombie.id)
            case "completed":
                await token_status.complete(session, zombie, access_token=tiger_token(SOON))
            case "account closed":
                await crud.accounts.close(session, zombie.tiger_account_id)
        before = await factories.everything(session)
    async with clone.session() as session:
        with pytest.raises(LeaseLost):
            await token_status.complete(session, zombie, access_token=tiger_token())
    async with clone.session() as session:
        assert await factories.everything(session) == before


@pytest.mark.parametrize("secret", [tiger_token(), API_KEY, JWT, PEM, "token=hunter2"])
async def test_a_token_in_an_error_message_is_masked(session: AsyncSession, secret: str) -> None:
    claim = await factories.claim(session)
    failed = await token_status.fail(session, claim, message=f"before {secret}; after")
    event = (await factories.events(session))[-1]
    assert failed.error_message is not None
    assert failed.error_message.startswith("before ")
    assert failed.error_message.endswith("; after")
    assert event.error_message == failed.error_message
    session.expunge_all()
    stored = await factories.everything(session)
    for line in secret.splitlines()[1:-1] or [secret.removeprefix("token=")[-20:]]:
        assert line not in stored


async def test_the_account_s_own_secrets_in_an_error_message_are_masked(
    session: AsyncSession,
) -> None:
    own = await factories.account_with_token(session, secret_key="a.b+c", access_token="opaque 1")
    claim = await factories.claim(session, of=own)
    failed = await token_status.fail(session, claim, message="a.b+c, or opaque 1, was refused")
    assert failed.error_message == f"{MASK}, or {MASK}, was refused"


async def test_a_failure_is_tried_again_until_it_is_given_up(session: AsyncSession) -> None:
    await factories.refresh(session, max_retries=3)
    for attempt in (1, 2, 3):
        (claim,) = await claim_due(session)
        failed = await token_status.fail(
            session,
            claim,
            message="no \0 answer \ud800",
            error_code="TIMEOUT",
            api_response_code=-1,
            retry_after=timedelta(0),
        )
        assert (failed.retry_count, failed.error_code, failed.api_response_code) == (
            attempt,
            "TIMEOUT",
            -1,
        )
        assert failed.lease_expires_at is None
        assert failed.status == (S.PENDING if attempt < 3 else S.FAILED)
        assert (failed.completed_at is None) == (attempt < 3)
    assert await claim_due(session) == []
    event = (await factories.events(session))[-1]
    assert (event.result, event.error_code) == (AuditResult.FAILURE, "TIMEOUT")
    assert event.error_message == failed.error_message
    assert event.error_message == "no \ufffd answer ?"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failed_before", "longest"), [(0, 30), (1, 60), (5, 960), (6, 1800), (60, 1800)]
)
async def test_the_wait_doubles_up_to_half_an_hour(
    session: AsyncSession, failed_before: int, longest: int
) -> None:
    refresh = await factories.refresh(session, max_retries=100)
    refresh.retry_count = failed_before
    waits = []
    for _ in range(12):
        (claim,) = await claim_due(session)
        claim.retry_count = failed_before
        before = datetime.now(UTC)
        failed = await token_status.fail(session, claim, message="no answer")
        assert failed.scheduled_at is not None
        waits.append((failed.scheduled_at - before).total_seconds())
        failed.scheduled_at = before
    assert min(waits) >= -1
    assert max(waits) <= longest + 1
    assert max(waits) > longest / 4  # 12 times less than a quarter: one in 17 million
    assert len(set(waits)) == 12


async def test_the_next_attempt_is_due_after_the_given_wait(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    wait = timedelta(minutes=7)
    before = datetime.now(UTC)
    failed = await token_status.fail(session, claim, message="busy", retry_after=wait)
    assert failed.scheduled_at is not None
    assert timedelta(0) <= failed.scheduled_at - before - wait < timedelta(seconds=5)
    assert await claim_due(session) == []


@pytest.mark.parametrize(
    "status", [status for status in AccountStatus if status != AccountStatus.CLOSED]
)
async def test_refused_credentials_suspend_an_active_account(
    session: AsyncSession, status: AccountStatus
) -> None:
    claim = await factories.claim(session, max_retries=5)
    await accounts.update(session, claim.tiger_account_id, status=status)
    before = len(await factories.events(session))
    failed = await token_status.fail(
        session, claim, message="refused", error_code="DEAD", credentials_refused=True
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


@pytest.mark.slow
async def test_a_person_activates_an_account_with_refused_credentials(
    session: AsyncSession,
) -> None:
    claim = await factories.claim(session)
    await token_status.fail(session, claim, message="refused", credentials_refused=True)
    await accounts.update(session, claim.tiger_account_id, status=AccountStatus.ACTIVE)
    assert await token_status.schedule_due(session) == []  # half an hour
    await token_status.retry(session, claim.id)
    (again,) = await token_status.claim_due(session, worker="w")
    assert (again.id, again.retry_count) == (claim.id, 0)


@pytest.mark.slow
async def test_a_rollback_undoes_the_suspension_with_its_failure(clone: Database) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session)
        before = await factories.everything(session)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await token_status.fail(session, claim, message="refused", credentials_refused=True)
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.everything(session) == before
        await token_status.fail(session, claim, message="refused", credentials_refused=True)
    async with clone.session() as session:
        assert (await account_of(session, claim)).status == AccountStatus.SUSPENDED
        with pytest.raises(LeaseLost):
            await token_status.fail(session, claim, message="refused", credentials_refused=True)


@pytest.mark.parametrize("how", ["taken over", "cancelled", "completed", "account closed"])
async def test_a_lost_claim_suspends_no_account(clone: Database, how: str) -> None:
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
            await token_status.fail(session, zombie, message="no", credentials_refused=True)
        with pytest.raises(LeaseLost):
            await token_status.fail(session, zombie, message="no", answer_lost=True)
        with pytest.raises(LeaseLost):
            await token_status.give_back(session, zombie)
    async with clone.session() as session:
        assert await factories.everything(session) == before


@pytest.mark.parametrize(("details", "then"), [(None, LOST), ({"a": 1}, {"a": 1} | LOST)])
async def test_a_lost_answer_is_recorded_in_the_details(
    session: AsyncSession, details: Any, then: Any
) -> None:
    claim = await factories.claim(session, details=details)
    failed = await token_status.fail(
        session, claim, message="timeout", answer_lost=True, retry_after=timedelta(0)
    )
    assert (failed.status, failed.details) == (S.PENDING, then)
    (again,) = await token_status.claim_due(session, worker="w")
    failed = await token_status.fail(session, again, message="busy", retry_after=timedelta(0))
    assert failed.details == then
    (last,) = await token_status.claim_due(session, worker="w")
    done = await token_status.complete(session, last, access_token="new")
    assert done.details == then


async def test_the_next_refresh_mentions_a_lost_answer(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    await token_status.fail(session, claim, message="timeout", answer_lost=True)
    account = await account_of(session, claim)
    again = await factories.claim(session, of=account)
    failed = await token_status.fail(session, again, message="refused", credentials_refused=True)
    assert failed.details == LOST
    assert failed.error_message is not None
    assert failed.error_message.startswith("refused (the answer to an earlier attempt was lost")
    await accounts.update(session, account.id, status=AccountStatus.ACTIVE)
    third = await factories.claim(session, of=account)
    await token_status.complete(session, third, access_token="new")
    fourth = await factories.claim(session, of=account)
    failed = await token_status.fail(session, fourth, message="refused", credentials_refused=True)
    assert (failed.details, failed.error_message) == (None, "refused")


async def test_the_next_refresh_waits_as_long_as_the_broker_asked(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    failed = await token_status.fail(session, claim, message="busy", retry_after=100 * MINUTE)
    assert failed.status == S.FAILED
    assert about(100 * MINUTE, failed.next_refresh_at)


@pytest.mark.parametrize("wait", [timedelta(0), timedelta(seconds=90), timedelta(days=2)])
async def test_the_broker_s_wait_is_used_exactly(clone: Database, wait: timedelta) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session)
    async with clone.session() as session:
        failed = await token_status.fail(session, claim, message="busy", retry_after=wait)
        assert failed.scheduled_at is not None
        assert failed.updated_at is not None
        over = failed.scheduled_at - failed.updated_at - wait  # which began the transaction
        assert timedelta(0) <= over < timedelta(seconds=5)


async def test_an_account_is_scheduled_again_at_next_refresh_at(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=2)
    failed = await token_status.fail(session, claim, message="busy", retry_after=timedelta(0))
    assert failed.next_refresh_at is None
    (claim,) = await token_status.claim_due(session, worker="w")
    failed = await token_status.fail(session, claim, message="busy", retry_after=timedelta(0))
    assert failed.status == S.FAILED
    assert about(30 * MINUTE, failed.next_refresh_at)
    assert await token_status.schedule_due(session) == []
    assert await token_status.schedule_due(session, within=timedelta(days=1)) == []
    failed.next_refresh_at = datetime.now(UTC) - MINUTE
    (opened,) = await token_status.schedule_due(session)
    assert opened.tiger_account_id == failed.tiger_account_id


async def test_completing_resets_the_errors_of_account_and_refresh(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    await token_status.fail(
        session, claim, message="busy", error_code="BUSY", retry_after=timedelta(0)
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
