"""Claiming refreshes, losing claims, and how refreshes end."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from tests.support import factories
from tests.support.claims import LEASE, USES, claim_due
from tests.support.concurrency import lock_until_waiting
from tests.support.contexts import changed_context
from tests.support.secrets_in_text import API_KEY, JWT, PEM
from tests.support.tiger_tokens import SOON, tiger_token
from tiger_db import (
    AuditAction,
    AuditResult,
    Database,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud import token_status
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.errors import (
    AlreadyExists,
    InvalidState,
    InvalidValue,
    LeaseLost,
    NotFound,
    StaleToken,
)
from tiger_db.redaction import MASK

S = TokenRefreshStatus


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


async def test_a_worker_does_not_take_over_from_itself(session: AsyncSession) -> None:
    refresh = await factories.refresh(session)
    other = await factories.refresh(session)
    assert len(await claim_due(session, lease=LEASE)) == 2
    (taken,) = await claim_due(session, lease=LEASE, skip={refresh.id})
    assert taken.id == other.id
    assert len(await claim_due(session)) == 2


async def test_only_active_accounts_are_refreshed(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    await factories.refresh(session, account)
    await crud.accounts.update(session, account.id, status="suspended")
    assert await claim_due(session) == []
    await crud.accounts.update(session, account.id, status="active")
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


async def test_a_heartbeat_renews_the_lease(session: AsyncSession) -> None:
    await factories.refresh(session)
    (claim,) = await claim_due(session, lease=LEASE)
    renewed = await token_status.heartbeat(session, claim)
    assert await claim_due(session) == []
    assert renewed.fencing_token == claim.fencing_token
    with pytest.raises(InvalidValue, match="lease"):
        await token_status.heartbeat(session, claim, lease=timedelta(0))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["taken over", "cancelled", "completed", "account closed"])
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
    await session.execute(text("DELETE FROM tiger_accounts"))
    with pytest.raises(NotFound, match="TigerAccount"):
        await USES[use](session, claim)


# Ending


async def test_completing_renews_the_token_and_forgets_errors(session: AsyncSession) -> None:
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
            await token_status.fail(session, claim, error="no answer", **values)
    async with clone.session() as session:
        assert await factories.everything(session) == before


async def test_a_token_that_nobody_can_read_any_more_is_replaced(clone: Database) -> None:
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
async def test_a_token_that_has_changed_since_the_claim(clone: Database, *, known: bool) -> None:
    """What the claim saw is not what it replaces."""
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


async def test_completing_waits_for_who_changes_the_account(clone: Database) -> None:
    """Then it decides on what that has left."""
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


async def test_completing_brings_the_session_s_own_objects_up_to_date(
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


async def claim_with_token(session: AsyncSession) -> TokenStatus:
    """A claim on the refresh of an account whose token was made at `SOON`."""
    account = await factories.account(session, access_token=tiger_token(SOON))
    await factories.refresh(session, account)
    (claim,) = await claim_due(session, lease=LEASE)
    return claim


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
async def test_a_token_in_an_error_is_not_kept(session: AsyncSession, secret: str) -> None:
    claim = await factories.claim(session)
    failed = await token_status.fail(session, claim, error=f"before {secret}; after")
    event = (await factories.events(session))[-1]
    assert failed.error_message is not None
    assert failed.error_message.startswith("before ")
    assert failed.error_message.endswith("; after")
    assert event.error_message == failed.error_message
    session.expunge_all()
    stored = await factories.everything(session)
    for line in secret.splitlines()[1:-1] or [secret.removeprefix("token=")[-20:]]:
        assert line not in stored


async def test_the_accounts_own_secrets_in_an_error_are_not_kept(session: AsyncSession) -> None:
    own = await factories.account_with_token(session, secret_key="a.b+c", access_token="opaque 1")
    claim = await factories.claim(session, of=own)
    failed = await token_status.fail(session, claim, error="a.b+c, or opaque 1, was refused")
    assert failed.error_message == f"{MASK}, or {MASK}, was refused"


async def test_a_failure_is_tried_again_until_it_is_given_up(session: AsyncSession) -> None:
    await factories.refresh(session, max_retries=3)
    for attempt in (1, 2, 3):
        (claim,) = await claim_due(session)
        failed = await token_status.fail(
            session,
            claim,
            error="no \0 answer \ud800",
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
        failed = await token_status.fail(session, claim, error="no answer")
        assert failed.scheduled_at is not None
        waits.append((failed.scheduled_at - before).total_seconds())
        failed.scheduled_at = before
    assert min(waits) >= -1
    assert max(waits) <= longest + 1
    assert max(waits) > longest / 4  # 12 times less than a quarter: one in 17 million
    assert len(set(waits)) == 12


async def test_a_given_wait_is_kept(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    wait = timedelta(minutes=7)
    before = datetime.now(UTC)
    failed = await token_status.fail(session, claim, error="busy", retry_after=wait)
    assert failed.scheduled_at is not None
    assert timedelta(0) <= failed.scheduled_at - before - wait < timedelta(seconds=5)
    assert await claim_due(session) == []


async def test_cancelling(session: AsyncSession) -> None:
    refresh = await factories.refresh(session)
    cancelled = await token_status.cancel(session, refresh.id)
    assert (cancelled.status, cancelled.completed_at is None) == (S.CANCELLED, False)
    assert (await factories.events(session))[-1].action == AuditAction.TOKEN_REFRESH_CANCEL
    with pytest.raises(InvalidState, match="cancelled"):
        await token_status.cancel(session, refresh.id)
    assert await claim_due(session) == []


async def test_trying_again(session: AsyncSession) -> None:
    claim = await factories.claim(session, max_retries=1)
    with pytest.raises(InvalidState, match="in_progress"):
        await token_status.retry(session, claim.id)
    await token_status.fail(session, claim, error="no answer")
    again = await token_status.retry(session, claim.id)
    assert (again.status, again.retry_count, again.completed_at) == (S.PENDING, 0, None)
    (second,) = await claim_due(session)
    assert second.id == claim.id
    with pytest.raises(LeaseLost):
        await token_status.heartbeat(session, claim)


async def test_no_second_refresh_is_opened_by_trying_again(clone: Database) -> None:
    async with clone.session() as session:
        claim = await factories.claim(session, max_retries=1)
        failed = await token_status.fail(session, claim, error="no answer")
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
async def test_changing_what_is_not_there_raises_not_found(
    session: AsyncSession, change: Callable[[AsyncSession, UUID], Awaitable[object]]
) -> None:
    with pytest.raises(NotFound):
        await change(session, uuid4())
