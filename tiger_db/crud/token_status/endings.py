"""How refreshes end: with a new token, or badly."""

import hashlib
import random
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import object_mapper
from sqlalchemy.orm.util import identity_key
from sqlmodel import col
from uuid_utils.compat import uuid7

from tiger_db.crud import audit_logs
from tiger_db.crud.common import execute, get_or_raise, one, storable, typed_errors
from tiger_db.crud.token_status.changes import (
    ANSWER_LOST,
    LONGEST_BACKOFF,
    change_held,
    is_held,
    log,
)
from tiger_db.encryption import SealedSecret
from tiger_db.errors import LeaseLost, StaleToken
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
from tiger_db.models.audit_logs import severity_of
from tiger_db.models.base import key_provider, place_of, readable_secrets, sealed
from tiger_db.models.rows import taken_in, whole
from tiger_db.redaction import redact

# Exponential backoff with full jitter, from this long to LONGEST_BACKOFF:
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
BACKOFF = timedelta(seconds=30)

_EVENT = AuditAction.TOKEN_REFRESH
# Constant, and past the ORM: completing is what a worker does all day. Nothing is done unless the
# account still has the token that was seen, and the claim is good. The account is locked first, as
# everyone who locks both does.
COMPLETE = f"""
WITH account AS (
    SELECT id FROM tiger_accounts
    WHERE id = $2 AND access_token IS NOT DISTINCT FROM $4 FOR NO KEY UPDATE
), refresh AS (
    UPDATE token_statuses t
    SET status = 'success', completed_at = clock_timestamp(), lease_expires_at = NULL,
        duration_ms = greatest(1000 * extract(epoch FROM clock_timestamp() - t.started_at), 0),
        old_token_hash = $5, new_token_hash = $6, new_token_expires_at = $7, next_refresh_at = $8,
        error_code = NULL, error_message = NULL,
        api_response_code = $9, api_response_time_ms = $10, server_version = $11
    FROM account
    WHERE t.id = $1 AND t.tiger_account_id = account.id AND t.fencing_token = $3
        AND t.status = 'in_progress'
    RETURNING t.*
), saved AS (
    UPDATE tiger_accounts a
    SET access_token = $12, refresh_token = coalesce($13, a.refresh_token), token_expires_at = $7,
        token_refresh_at = $8,
        error_count = CASE WHEN a.auto_suspended THEN a.error_count ELSE 0 END,
        last_error = CASE WHEN a.auto_suspended THEN a.last_error END,
        last_error_at = CASE WHEN a.auto_suspended THEN a.last_error_at END
    FROM refresh WHERE a.id = refresh.tiger_account_id
), event AS (
    INSERT INTO audit_logs (id, action, result, severity, resource_type, resource_id,
        tiger_account_id, details, duration_ms)
    SELECT $14, '{_EVENT}', 'success', '{severity_of(_EVENT, AuditResult.SUCCESS)}',
        'token_status', refresh.id::text, refresh.tiger_account_id,
        jsonb_build_object('status', refresh.status, 'trigger', refresh.trigger),
        refresh.duration_ms
    FROM refresh
)
SELECT {whole(TokenStatus, "refresh")} FROM refresh
"""  # noqa: S608  # names of columns


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
        NotFound: the account is gone, and the refresh with it.
        ValidationError: a value is refused; nothing has changed.
    """
    claim.validated(
        {
            "api_response_code": api_response_code,
            "api_response_time_ms": api_response_time_ms,
            "server_version": server_version,
        }
    )
    save = partial(
        _save,
        session,
        claim,
        access_token=access_token,
        refresh_token=refresh_token,
        expires_at=expires_at,
        answer=(api_response_code, api_response_time_ms, server_version),
    )
    seen = vars(claim).get("tiger_account")
    if seen is not None:
        with suppress(StaleToken):
            if refresh := await save(seen):
                return refresh
    # The claim came without its account, or that has changed since, or the claim is lost.
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    try:
        refresh = await save(account)
    except StaleToken:
        if await one(session, select(TokenStatus).where(is_held(claim))) is None:
            raise LeaseLost from None
        raise
    if refresh is None:
        raise LeaseLost
    return refresh


async def _save(
    session: AsyncSession,
    claim: TokenStatus,
    account: TigerAccount,
    *,
    access_token: str,
    refresh_token: str | None,
    expires_at: datetime | None,
    answer: tuple[int | None, int | None, str | None],
) -> TokenStatus | None:
    """The refresh as it has ended; None: the claim was lost, or the account has changed."""
    new: dict[str, Any] = {"access_token": access_token, "token_expires_at": expires_at}
    if refresh_token is not None:
        new["refresh_token"] = refresh_token
    new = account.validated(new)
    expires_at = account.expiry_of_newer(access_token, new["token_expires_at"])
    old = account.readable_token()
    with typed_errors():
        rows = await execute(
            session,
            COMPLETE,
            claim.id,
            account.id,
            claim.fencing_token,
            account.access_token.ciphertext
            if isinstance(account.access_token, SealedSecret)
            else None,
            token_hash(old) if old else None,
            token_hash(access_token),
            expires_at,
            refresh_time(access_token, expires_at),
            *answer,
            _sealed(session, account, "access_token", access_token),
            _sealed(session, account, "refresh_token", refresh_token),
            uuid7(),
        )
    if not rows:
        return None
    if identity_key(TigerAccount, account.id) in session.identity_map:
        await get_or_raise(session, TigerAccount, account.id)  # which is then as it is now
    return taken_in(session.sync_session, TokenStatus, rows[0][0])


def _sealed(
    session: AsyncSession, account: TigerAccount, column: str, text: str | None
) -> bytes | None:
    if text is None:
        return None
    place = place_of(object_mapper(account), column, account.id)
    return sealed(key_provider(session.sync_session), text, place)


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
    the token; the refresh's details keep that, and the errors that follow say it. Of the error's
    text, tokens, keys and the account's own secrets are masked before it is stored.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
        NotFound: the account is gone, and the refresh with it.
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
            "next_refresh_at": func.clock_timestamp()
            + max(LONGEST_BACKOFF, retry_after or timedelta(0)),
        }
    else:
        wait = retry_after if retry_after is not None else _backoff(attempts)
        ending = {
            "status": TokenRefreshStatus.PENDING,
            "scheduled_at": func.clock_timestamp() + wait,
        }
    lost_before = await _answer_lost_before(session, claim)
    if lost_before:
        error = f"{error} (the answer to an earlier attempt was lost, maybe with a new token)"
    if answer_lost or lost_before:
        ending["details"] = {**(claim.details or {}), ANSWER_LOST: True}
    refresh = await change_held(
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


async def _answer_lost_before(session: AsyncSession, claim: TokenStatus) -> bool:
    """Whether an earlier attempt has lost its answer: of this refresh, or of one given up."""
    if claim.details and claim.details.get(ANSWER_LOST):
        return True
    last = await one(
        session,
        select(TokenStatus)
        .where(
            col(TokenStatus.tiger_account_id) == claim.tiger_account_id,
            col(TokenStatus.id) != claim.id,
        )
        .order_by(col(TokenStatus.id).desc())
        .limit(1),
    )
    return (
        last is not None
        and last.status == TokenRefreshStatus.FAILED
        and bool(last.details and last.details.get(ANSWER_LOST))
    )


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


def token_hash(token: str) -> str:
    """What the history keeps of a token: enough to tell two apart, nothing to use."""
    return hashlib.sha256(token.encode("utf-8")).hexdigest()


def _duration() -> ColumnElement[int]:
    elapsed = func.extract("epoch", func.clock_timestamp() - col(TokenStatus.started_at))
    return cast(func.greatest(elapsed * 1000, 0), BigInteger)


def _backoff(attempts: int) -> timedelta:
    longest = min(LONGEST_BACKOFF, BACKOFF * 2 ** min(attempts - 1, 20))
    share = random.random()  # noqa: S311  # spreads load, protects nothing
    return timedelta(seconds=longest.total_seconds() * share)
