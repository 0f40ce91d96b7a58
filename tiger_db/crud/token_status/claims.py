"""Working on refreshes: claiming them, keeping the claim, and ending them well or badly."""

import hashlib
import random
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import BigInteger, ColumnElement, and_, case, cast, func, or_, select
from sqlalchemy import update as sql_update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.common import (
    check_limit,
    get_or_raise,
    many,
    one,
    storable,
)
from tiger_db.crud.token_status.changes import IS_OPEN, LONGEST_BACKOFF, log, set_values
from tiger_db.encryption import Secret
from tiger_db.errors import (
    EncryptionError,
    InvalidState,
    InvalidValue,
    LeaseLost,
    StaleToken,
)
from tiger_db.models import (
    AccountStatus,
    AuditAction,
    AuditResult,
    AuditSeverity,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.accounts import refresh_time
from tiger_db.models.base import readable_secrets
from tiger_db.redaction import redact

# Exponential backoff with full jitter, from this long to LONGEST_BACKOFF:
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
BACKOFF = timedelta(seconds=30)
ANSWER_LOST = "answer_lost"  # in a refresh's details: the broker may have replaced the token
_NO_DETAILS = cast({}, JSONB)
_LOST = cast({ANSWER_LOST: True}, JSONB)

_FREE = or_(
    col(TokenStatus.status) == TokenRefreshStatus.PENDING,
    col(TokenStatus.lease_expires_at) < func.clock_timestamp(),
)


async def claim_due(
    session: AsyncSession,
    *,
    worker: str,
    limit: int = 10,
    lease: timedelta = timedelta(seconds=60),
) -> list[TokenStatus]:
    """Claim refreshes that are due, or whose lease has expired, for a worker: longest due first.

    Each is claimed by one worker only. Commit before asking Tiger. The claims returned belong to no
    session and stay as they are: pass them to `heartbeat`, `complete` and `fail`.

    Raises:
        InvalidValue: the lease is not positive, the limit is not from 1 to 1000, or the worker's
            name is refused.
    """
    check_limit(limit)
    due = (
        select(col(TokenStatus.id))
        .join(TigerAccount, col(TigerAccount.id) == col(TokenStatus.tiger_account_id))
        .where(
            IS_OPEN,
            col(TokenStatus.scheduled_at) <= func.clock_timestamp(),
            _FREE,
            col(TigerAccount.status) == AccountStatus.ACTIVE,
        )
        .order_by(col(TokenStatus.scheduled_at))
        .limit(limit)
        .with_for_update(of=TokenStatus, skip_locked=True)
        .cte("due")
    )
    return await _claim(session, col(TokenStatus.id) == due.c.id, worker, lease)


async def claim(
    session: AsyncSession,
    refresh_id: UUID,
    *,
    worker: str,
    lease: timedelta = timedelta(seconds=60),
) -> TokenStatus:
    """Claim one refresh, due or not, whatever the status of its account. See `claim_due`.

    Raises:
        InvalidState: it has ended, or another worker has it.
        InvalidValue: the lease is not positive, or the worker's name is refused.
    """
    claimed = await _claim(
        session, and_(col(TokenStatus.id) == refresh_id, IS_OPEN, _FREE), worker, lease
    )
    if not claimed:
        raise InvalidState("another worker is at this refresh, or it has ended")
    return claimed[0]


async def _claim(
    session: AsyncSession, criterion: ColumnElement[bool], worker: str, lease: timedelta
) -> list[TokenStatus]:
    _check_lease(lease)
    claims = await many(
        session,
        sql_update(TokenStatus)
        .where(criterion)
        .values(
            status=TokenRefreshStatus.IN_PROGRESS,
            worker=worker,
            started_at=func.clock_timestamp(),
            lease_expires_at=func.clock_timestamp() + lease,
            fencing_token=col(TokenStatus.fencing_token) + 1,
            # Who had it has vanished, and what the broker answered with it.
            details=case(
                (
                    col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
                    func.coalesce(col(TokenStatus.details), _NO_DETAILS).op("||")(_LOST),
                ),
                else_=col(TokenStatus.details),
            ),
        )
        .returning(TokenStatus),
    )
    for claimed in claims:
        session.expunge(claimed)  # a claim must never pick up its successor's fencing token
    return sorted(claims, key=lambda claimed: (claimed.scheduled_at, claimed.id))


async def heartbeat(
    session: AsyncSession, claim: TokenStatus, *, lease: timedelta = timedelta(seconds=60)
) -> TokenStatus:
    """Renew a claim's lease.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended.
    """
    _check_lease(lease)
    return await _change(session, claim, lease_expires_at=func.clock_timestamp() + lease)


async def complete(
    session: AsyncSession,
    claim: TokenStatus,
    *,
    access_token: str,
    refresh_token: str | None = None,
    expires_at: datetime | None = None,
    api_response_code: int | None = None,
    api_response_time_ms: int | None = None,
    server_version: str | None = None,
) -> TokenStatus:
    """End a refresh well: new token on the account, errors forgotten, history and event written.

    `expires_at` is an aware datetime. None: it is read out of a token in Tiger's format; that of
    any other is unknown, and then `schedule_due` never finds the token. An account that too many
    errors have suspended meanwhile keeps both: `accounts.reset_errors` ends them.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
        StaleToken: the account has a newer token; nothing has changed.
        ValidationError: a value is refused; nothing has changed.
    """
    # The account first, as everyone who locks both does.
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    changes: dict[str, object] = {
        "access_token": access_token,
        "token_expires_at": expires_at,
    }
    if not account.auto_suspended:
        changes |= {"error_count": 0, "last_error": None, "last_error_at": None}
    if refresh_token is not None:
        changes["refresh_token"] = refresh_token
    account.validated(changes)  # refused before anything has changed
    try:
        expires_at = changes["token_expires_at"] = account.expiry_of_newer(access_token, expires_at)
    except StaleToken:
        if await one(session, select(TokenStatus).where(_held(claim))) is None:
            raise LeaseLost from None
        raise
    refresh = await _change(
        session,
        claim,
        status=TokenRefreshStatus.SUCCESS,
        completed_at=func.clock_timestamp(),
        duration_ms=_duration(),
        lease_expires_at=None,
        old_token_hash=_hash_of(account.access_token),
        new_token_expires_at=expires_at,
        new_token_hash=token_hash(access_token),
        next_refresh_at=refresh_time(access_token, expires_at),
        error_code=None,
        error_message=None,
        api_response_code=api_response_code,
        api_response_time_ms=api_response_time_ms,
        server_version=server_version,
    )
    account.sqlmodel_update(changes)
    await session.flush()
    await log(session, AuditAction.TOKEN_REFRESH, refresh)
    return refresh


async def fail(
    session: AsyncSession,
    claim: TokenStatus,
    *,
    error: str,
    error_code: str | None = None,
    retry_after: timedelta | None = None,
    credentials_dead: bool = False,
    answer_lost: bool = False,
    api_response_code: int | None = None,
    api_response_time_ms: int | None = None,
) -> TokenStatus:
    """End an attempt badly. It is tried again later, or given up after `max_retries` attempts.

    The wait is `retry_after`, where the broker said so, else random up to 30 s, doubled with each
    attempt, 30 min at most. `credentials_dead`: it is given up at once, and an active account is
    suspended until a person looks at it. `answer_lost`: the broker was asked, and may have replaced
    the token; the refresh's details keep that. Of the error's text, tokens, keys and the account's
    own secrets are masked before it is stored.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
        ValidationError: a value is refused; nothing has changed.
    """
    # The account first, as everyone who locks both does.
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    known = readable_secrets(account)
    attempts = claim.retry_count + 1
    if credentials_dead or attempts >= claim.max_retries:
        ending: dict[str, object] = {
            "status": TokenRefreshStatus.FAILED,
            "completed_at": func.clock_timestamp(),
            "next_refresh_at": func.clock_timestamp() + LONGEST_BACKOFF,
        }
    else:
        wait = retry_after if retry_after is not None else _backoff(attempts)
        ending = {
            "status": TokenRefreshStatus.PENDING,
            "scheduled_at": func.clock_timestamp() + wait,
        }
    if answer_lost:
        ending["details"] = {**(claim.details or {}), ANSWER_LOST: True}
    refresh = await _change(
        session,
        claim,
        **ending,
        retry_count=attempts,
        duration_ms=_duration(),
        lease_expires_at=None,
        error_code=error_code,
        error_message=storable(redact(error, *known)),
        api_response_code=api_response_code,
        api_response_time_ms=api_response_time_ms,
    )
    await log(
        session,
        AuditAction.TOKEN_REFRESH,
        refresh,
        result=AuditResult.FAILURE,
        error_code=error_code,
        error_message=refresh.error_message,
    )
    if credentials_dead and account.status == AccountStatus.ACTIVE:
        await _suspend(session, account, refresh)
    return refresh


async def _suspend(session: AsyncSession, account: TigerAccount, refresh: TokenStatus) -> None:
    old, account.status = account.status, AccountStatus.SUSPENDED
    await session.flush()
    await audit_logs.log_event(
        session,
        action=AuditAction.ACCOUNT_STATUS_CHANGE,
        severity=AuditSeverity.CRITICAL,
        resource_type="tiger_account",
        resource_id=str(account.id),
        tiger_account_id=account.id,
        old_values={"status": old.value},
        new_values={"status": account.status.value},
        details={"reason": "the broker refuses its credentials", "refresh": str(refresh.id)},
    )


async def give_back(
    session: AsyncSession, claim: TokenStatus, *, wait: timedelta = timedelta(0)
) -> TokenStatus:
    """End a claim before the broker was asked: the refresh is due again after the wait.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
    """
    return await _change(
        session,
        claim,
        status=TokenRefreshStatus.PENDING,
        scheduled_at=func.clock_timestamp() + wait,
        lease_expires_at=None,
        worker=None,
    )


def token_hash(token: str) -> str:
    """What the history keeps of a token: enough to tell two apart, nothing to use."""
    return hashlib.sha256(token.encode("utf-8")).hexdigest()


def _hash_of(token: Secret | None) -> str | None:
    try:
        return None if token is None else token_hash(token.get_secret_value())
    except EncryptionError:  # a token that nobody can read any more may still be replaced
        return None


async def _change(session: AsyncSession, claim: TokenStatus, **values: object) -> TokenStatus:
    given = {name: v for name, v in values.items() if not isinstance(v, ColumnElement)}
    claim.validated(given)  # as if assigned
    refresh = await set_values(session, _held(claim), **values)
    if refresh is None:
        raise LeaseLost
    return refresh


def _held(claim: TokenStatus) -> ColumnElement[bool]:
    """Whether the claim is still good."""
    return and_(
        col(TokenStatus.id) == claim.id,
        col(TokenStatus.fencing_token) == claim.fencing_token,
        col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
    )


def _duration() -> ColumnElement[int]:
    elapsed = func.extract("epoch", func.clock_timestamp() - col(TokenStatus.started_at))
    return cast(func.greatest(elapsed * 1000, 0), BigInteger)


def _backoff(attempts: int) -> timedelta:
    longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** min(attempts - 1, 20))
    share = random.random()  # noqa: S311  # spreads load, protects nothing
    return timedelta(seconds=longest.total_seconds() * share)


def _check_lease(lease: timedelta) -> None:
    if lease <= timedelta(0):
        raise InvalidValue("lease must be positive")
