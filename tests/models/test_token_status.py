"""States of a refresh and their transitions."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.models.examples import made
from tests.support import factories
from tiger_db import Database, TokenRefreshStatus, TokenStatus, crud
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidState

SUCCESS, FAILED = TokenRefreshStatus.SUCCESS, TokenRefreshStatus.FAILED


def refresh(**values: object) -> TokenStatus:
    return made(TokenStatus, **values)


def started(**values: object) -> TokenStatus:
    row = refresh(**values)
    row.start_refresh()
    return row


def test_a_new_refresh_is_pending() -> None:
    row = refresh()
    assert row.status is TokenRefreshStatus.PENDING
    assert row.is_open
    assert not row.can_retry
    assert (row.retry_count, row.max_retries) == (0, 3)


@pytest.mark.parametrize("status", TokenRefreshStatus)
def test_pending_and_in_progress_are_open(status: TokenRefreshStatus) -> None:
    assert refresh(status=status).is_open == (status in {"pending", "in_progress"})


def test_starting_a_pending_refresh() -> None:
    before = datetime.now(UTC)
    row = started()
    assert row.status is TokenRefreshStatus.IN_PROGRESS
    assert row.started_at is not None
    assert before <= row.started_at <= datetime.now(UTC)


@pytest.mark.parametrize("status", [s for s in TokenRefreshStatus if s != "pending"])
def test_a_refresh_in_another_state_cannot_be_started(status: TokenRefreshStatus) -> None:
    row = refresh(status=status)
    with pytest.raises(InvalidState, match=status.value):
        row.start_refresh()
    assert (row.status, row.started_at) == (status, None)


def test_completing_with_success() -> None:
    row = started(error_code="5", error_message="of the attempt before", retry_count=1)
    expires_at = datetime.now(UTC) + timedelta(days=15)
    row.complete_refresh(success=True, new_token_expires_at=expires_at, new_token_hash="ab" * 32)
    assert row.status is SUCCESS
    assert not row.is_open
    assert (row.new_token_expires_at, row.new_token_hash) == (expires_at, "ab" * 32)
    assert (row.error_code, row.error_message, row.retry_count) == (None, None, 1)
    assert row.completed_at is not None
    assert row.started_at is not None
    assert row.completed_at >= row.started_at
    assert not row.can_retry


def test_completing_with_a_failure_counts_an_attempt() -> None:
    row = started(max_retries=2)
    row.complete_refresh(success=False, error_code="4", error_message="access forbidden")
    assert row.status is FAILED
    assert (row.error_code, row.error_message) == ("4", "access forbidden")
    assert (row.retry_count, row.new_token_hash) == (1, None)
    assert row.can_retry


@pytest.mark.parametrize("seconds", [0, 1.5, -60])  # a clock may be set back meanwhile
def test_the_duration_is_that_of_the_attempt(seconds: float) -> None:
    row = started()
    row.started_at = datetime.now(UTC) - timedelta(seconds=seconds)
    row.complete_refresh(success=True)
    assert row.duration_ms is not None
    if seconds < 0:
        assert row.duration_ms == 0
    else:
        assert seconds * 1000 <= row.duration_ms < seconds * 1000 + 1000


@pytest.mark.parametrize("status", [s for s in TokenRefreshStatus if s != "in_progress"])
@pytest.mark.parametrize("success", [True, False])
def test_a_refresh_in_another_state_cannot_be_completed(
    status: TokenRefreshStatus, *, success: bool
) -> None:
    row = refresh(status=status)
    before = row.model_dump()
    with pytest.raises(InvalidState, match=status.value):
        row.complete_refresh(success=success)
    assert row.model_dump() == before


@pytest.mark.parametrize(
    "bad",
    [
        {"success": True, "new_token_hash": "x" * 129},
        {"success": True, "new_token_expires_at": datetime(2027, 1, 1)},  # noqa: DTZ001
        {"success": False, "error_code": "x" * 51},
        {"success": False, "error_message": "\0"},
    ],
)
def test_an_invalid_completion_changes_nothing(bad: dict[str, object]) -> None:
    row = started()
    before = row.model_dump()
    with pytest.raises(ValidationError):
        row.complete_refresh(**bad)  # type: ignore[arg-type]
    assert row.model_dump() == before


@pytest.mark.parametrize(
    ("status", "retry_count", "can_retry"),
    [
        ("failed", 0, True),
        ("failed", 2, True),
        ("failed", 3, False),
        ("failed", 4, False),
        *((status, 0, False) for status in TokenRefreshStatus if status != "failed"),
    ],
)
def test_only_a_failed_refresh_with_attempts_left_can_be_retried(
    status: str, retry_count: int, *, can_retry: bool
) -> None:
    assert refresh(status=status, retry_count=retry_count).can_retry == can_retry


@pytest.mark.parametrize("success", [True, False])
async def test_a_refresh_run_in_memory_is_saved_after_its_end(
    session: AsyncSession, *, success: bool
) -> None:
    account = await factories.account(session)
    row = TokenStatus(tiger_account_id=account.id)
    row.start_refresh()
    row.complete_refresh(success=success, error_message=None if success else "timeout")
    session.add(row)
    await session.flush()
    await session.refresh(row)
    assert (row.status, row.retry_count) == ((SUCCESS, 0) if success else (FAILED, 1))
    assert (row.error_message, row.updated_at is None) == (None if success else "timeout", False)


@pytest.mark.parametrize("new", [True, False])
async def test_a_refresh_in_progress_without_a_lease_is_not_saved(
    clone: Database, *, new: bool
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        stored = None if new else await factories.refresh(session, account)
    with pytest.raises(InvalidState, match=r"claim the refresh with crud\.token_status\.claim"):
        async with clone.session() as session:
            row = stored or TokenStatus(tiger_account_id=account.id)
            session.add(row)
            row.start_refresh()
            await session.flush()
    async with clone.session() as session:
        left = await crud.token_status.get_latest_status(session, account.id)
        assert left is None or left.status is TokenRefreshStatus.PENDING
        claim = await factories.claim(session, of=account)
        assert claim.status is TokenRefreshStatus.IN_PROGRESS


@pytest.mark.parametrize("column", ["worker", "lease_expires_at"])
async def test_no_statement_takes_the_lease_from_a_refresh_in_progress(
    session: AsyncSession, column: str
) -> None:
    await factories.claim(session)
    with pytest.raises(IntegrityError, match="ck_token_statuses_in_progress_is_leased"):
        await session.execute(text(f"UPDATE token_statuses SET {column} = NULL"))
    await session.rollback()


async def test_a_claimed_refresh_can_be_changed_through_its_object(session: AsyncSession) -> None:
    claim = await factories.claim(session)
    loaded = await crud.token_status.get(session, claim.id)
    assert loaded is not None
    loaded.details = {"a": 1}
    await session.flush()
    await session.refresh(loaded)
    assert (loaded.status, loaded.details) == (TokenRefreshStatus.IN_PROGRESS, {"a": 1})


def test_a_refresh_needs_an_account() -> None:
    account_id = uuid4()
    assert refresh(tiger_account_id=account_id).tiger_account_id == account_id
    with pytest.raises(ValidationError, match="tiger_account_id"):
        refresh(tiger_account_id=None)
