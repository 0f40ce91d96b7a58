"""How refreshes end: with a new token, or badly."""

import hashlib
import random
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, ColumnElement, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import object_mapper
from sqlalchemy.orm.util import identity_key
from sqlmodel import col
from uuid_utils.compat import uuid7

from tiger_db.crud import audit_logs
from tiger_db.crud.common import (
    execute_driver_sql,
    fetch_one,
    get_or_raise,
    replace_unstorable,
)
from tiger_db.crud.token_status.changes import (
    ANSWER_LOST,
    LONGEST_BACKOFF,
    change_held,
    is_held,
    log,
)
from tiger_db.encryption import EncryptedSecret
from tiger_db.errors import AnswerLost, LeaseLost, StaleToken
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
from tiger_db.models.base import merge_row, row_expression
from tiger_db.models.secrets import aad_of, encrypt_secret, key_provider, readable_secrets
from tiger_db.redaction import redact_aggressively

# Exponential backoff with full jitter, from this long to LONGEST_BACKOFF:
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
BACKOFF = timedelta(seconds=30)

_LOST = "the answer was lost with its worker, or cannot be stored: maybe with a new token"
_LONGEST_MESSAGE = 10_000  # characters
_LONGEST_SECRET = 2_000  # characters of a message that may be the rest of a secret that was cut
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
SELECT {row_expression(TokenStatus, "refresh")} FROM refresh
"""  # noqa: S608  # names of columns

# Ends attempts whose outcome is unknown. It writes constants and loads no row, so that it works for
# rows and answers that cannot be handled otherwise.
_LOSE = f"""
WITH lost AS (%s), refresh AS (
    UPDATE token_statuses t
    SET status = CASE WHEN lost.given_up THEN 'failed' ELSE 'pending' END::token_refresh_status,
        scheduled_at = CASE WHEN lost.given_up THEN t.scheduled_at
            ELSE clock_timestamp() + $1::interval END,
        completed_at = CASE WHEN lost.given_up THEN clock_timestamp() END,
        next_refresh_at = CASE WHEN lost.given_up THEN clock_timestamp() + $1::interval END,
        retry_count = t.retry_count + 1, lease_expires_at = NULL,
        details = CASE jsonb_typeof(t.details) WHEN 'object' THEN t.details ELSE '{{}}' END
            || '{{"{ANSWER_LOST}": true}}',
        error_code = '{AnswerLost.__name__}', error_message = '{_LOST}'
    FROM lost
    WHERE t.id = lost.id AND t.fencing_token = lost.fencing_token AND t.status = 'in_progress'
    RETURNING t.id, t.tiger_account_id, t.status, t.trigger
), account AS (
    UPDATE tiger_accounts a
    SET error_count = a.error_count + 1, last_error = '{_LOST}', last_error_at = now()
    FROM refresh WHERE a.id = refresh.tiger_account_id AND refresh.status = 'failed'
    RETURNING a.id, a.error_count
)
SELECT refresh.*, account.error_count
FROM refresh LEFT JOIN account ON account.id = refresh.tiger_account_id
"""  # noqa: S608  # constants
_GIVEN_UP = "t.retry_count + 1 >= t.max_retries"
# Whatever is locked waits for the next time, so that no claim waits for it.
_LOST_LEASES = f"""
    SELECT t.id, t.fencing_token, true AS given_up
    FROM token_statuses t JOIN tiger_accounts a ON a.id = t.tiger_account_id
    WHERE t.status IN ('pending', 'in_progress') AND t.status = 'in_progress'
        AND t.scheduled_at <= clock_timestamp() AND t.lease_expires_at < clock_timestamp()
        AND {_GIVEN_UP} AND t.id <> ALL ($2)
    ORDER BY t.scheduled_at LIMIT 100 FOR NO KEY UPDATE OF t, a SKIP LOCKED
"""  # noqa: S608  # a constant
_CLAIMED = f"""
    SELECT t.id, t.fencing_token, {_GIVEN_UP} AS given_up
    FROM tiger_accounts a JOIN token_statuses t ON t.tiger_account_id = a.id
    WHERE t.id = $2 AND t.fencing_token = $3 AND t.status = 'in_progress' FOR NO KEY UPDATE OF a
"""  # noqa: S608  # a constant


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
    claim.validate_changes(
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
        if await fetch_one(session, select(TokenStatus).where(is_held(claim))) is None:
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
    new = account.validate_changes(new)
    expires_at = account.check_not_stale(access_token, new["token_expires_at"])
    old = account.readable_token()
    rows = await execute_driver_sql(
        session,
        COMPLETE,
        claim.id,
        account.id,
        claim.fencing_token,
        account.access_token.ciphertext
        if isinstance(account.access_token, EncryptedSecret)
        else None,
        token_hash(old) if old else None,
        token_hash(access_token),
        expires_at,
        refresh_time(access_token, expires_at),
        *answer,
        _encrypt_token(session, account, "access_token", access_token),
        _encrypt_token(session, account, "refresh_token", refresh_token),
        uuid7(),
    )
    if not rows:
        return None
    if identity_key(TigerAccount, account.id) in session.identity_map:
        await get_or_raise(session, TigerAccount, account.id)  # which is then as it is now
    return merge_row(session.sync_session, TokenStatus, rows[0][0])


def _encrypt_token(
    session: AsyncSession, account: TigerAccount, column: str, text: str | None
) -> bytes | None:
    if text is None:
        return None
    aad = aad_of(object_mapper(account), column, account.id)
    return encrypt_secret(key_provider(session.sync_session), text, aad)


async def fail(
    session: AsyncSession,
    claim: TokenStatus,
    *,
    error: str,
    error_code: str | None = None,
    retry_after: timedelta | None = None,
    credentials_refused: bool = False,
    answer_lost: bool = False,
    api_response_code: int | None = None,
    api_response_time_ms: int | None = None,
) -> TokenStatus:
    """End an attempt badly. It is tried again later, or given up after `max_retries` attempts.

    The wait is `retry_after`, where the broker said so, else random up to 30 s, doubled with each
    attempt, 30 min at most. `credentials_refused`: it is given up at once, and an active account is
    suspended until a person looks at it. `answer_lost`: the broker was asked, and may have replaced
    the token; the refresh's details keep that, and the errors that follow say it. Of the error's
    text, tokens, keys and the account's own secrets are masked before it is stored, and what
    follows its first 10,000 characters is left out.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
        NotFound: the account is gone, and the refresh with it.
        ValidationError: a value is refused; nothing has changed.
    """
    # The account first, as everyone who locks both does.
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    known = readable_secrets(account)
    attempts = claim.retry_count + 1
    if credentials_refused or attempts >= claim.max_retries:
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
        error_message=_message(error, known),
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
    if credentials_refused and account.status == AccountStatus.ACTIVE:
        await _suspend(session, account, refresh)
    return refresh


def _message(error: str, known: list[str]) -> str:
    """Return what may be stored of an error's text."""
    if len(error) <= _LONGEST_MESSAGE:
        return replace_unstorable(redact_aggressively(error, *known))
    # What is left of a secret that is cut is not recognized.
    cut = error[: _LONGEST_MESSAGE + _LONGEST_SECRET]
    shown = redact_aggressively(cut, *known)[:-_LONGEST_SECRET]
    return f"{replace_unstorable(shown)}... ({len(error)} characters)"


async def fail_unknown(session: AsyncSession, claim: TokenStatus) -> None:
    """End an attempt whose outcome cannot be stored, not even by `fail`.

    Constants are written, and nothing that depends on an answer or on other values of the rows. The
    refresh is due again in half an hour, or given up after `max_retries` attempts; the account's
    errors count that.

    Raises:
        LeaseLost: another worker has claimed it, or it has ended; nothing has changed.
    """
    if not await _lose(session, _CLAIMED, claim.id, claim.fencing_token):
        raise LeaseLost


async def fail_expired_leases(session: AsyncSession, *, skip: Collection[UUID] = ()) -> int:
    """Give up refreshes whose lease ended in their last attempt; return how many, 100 at most.

    The worker of that attempt has vanished, perhaps with a new token: the account's errors count
    that. `skip` are refreshes that the caller is at itself.
    """
    return await _lose(session, _LOST_LEASES, list(skip))


async def _lose(session: AsyncSession, which: str, *values: object) -> int:
    ended = await execute_driver_sql(session, _LOSE % which, LONGEST_BACKOFF, *values)
    events = [
        audit_logs.refresh_event(
            refresh_id,
            account_id,
            action=AuditAction.TOKEN_REFRESH,
            result=AuditResult.FAILURE,
            details={"status": status, "trigger": trigger},
            error_code=AnswerLost.__name__,
            error_message=_LOST,
        )
        for refresh_id, account_id, status, trigger, _ in map(tuple, ended)
    ] + [
        audit_logs.account_event(
            account_id,
            action=AuditAction.ACCOUNT_ERROR,
            old_values={"error_count": count - 1},
            new_values={"error_count": count},
            error_message=_LOST,
        )
        for _, account_id, _, _, count in map(tuple, ended)
        if count is not None
    ]
    await audit_logs.log_events(session, events)
    return len(ended)


async def _answer_lost_before(session: AsyncSession, claim: TokenStatus) -> bool:
    """Whether an earlier attempt has lost its answer: of this refresh, or of one given up."""
    if claim.details and claim.details.get(ANSWER_LOST):
        return True
    last = await fetch_one(
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
    event = audit_logs.account_event(
        account.id,
        action=AuditAction.ACCOUNT_STATUS_CHANGE,
        severity=AuditSeverity.CRITICAL,
        old_values={"status": old},
        new_values={"status": account.status},
        details={"reason": "the broker refuses its credentials", "refresh": str(refresh.id)},
    )
    await audit_logs.insert_event(session, event)


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
