"""Functions that store the outcome of a token refresh: success, failure or unknown."""

import hashlib
import random
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, ColumnElement, and_, cast, func
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.util import identity_key
from sqlmodel import col
from uuid_utils.compat import uuid7

from tiger_db.actor import ACTOR_FIELDS, actor_in_force
from tiger_db.crud.audit_logs import recording
from tiger_db.crud.change_events import apply_change
from tiger_db.crud.common import (
    actor_of,
    context_of,
    fetch_one,
    fetch_rows,
    get_or_raise,
    replace_unstorable,
)
from tiger_db.crud.token_status.queries import newest
from tiger_db.encryption import EncryptedSecret, Secret
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
from tiger_db.models.secrets import encrypt_for_row, key_provider, readable_secrets
from tiger_db.public import public
from tiger_db.redaction import redact_aggressively
from tiger_db.tracebacks import forgets_locals

# Failed refreshes are attempted again after an exponential backoff with full jitter:
# https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
BACKOFF = timedelta(seconds=30)
MAX_BACKOFF = timedelta(minutes=30)
ANSWER_LOST = "answer_lost"  # this key in `TokenStatus.details` marks a lost answer of the broker
UNKNOWN_OUTCOME = (
    "the answer of the broker was lost or cannot be stored: the broker may have issued a token"
)
# The units of _MAX_MESSAGE_LENGTH and _MAX_SECRET_LENGTH are characters.
_MAX_MESSAGE_LENGTH = 10_000
_MAX_SECRET_LENGTH = 2_000
_EXPIRED_LEASES_LIMIT = 100
_EVENT = AuditAction.TOKEN_REFRESH

# The statement COMPLETE bypasses the ORM for speed, because workers complete refreshes frequently.
# If the account's token has changed or the claim is lost, COMPLETE changes no row. COMPLETE also
# compares the ciphertext of tiger_id, because a change of a column to whose value the secrets are
# bound replaces all ciphertexts of the row. To prevent
# deadlocks, every function locks the row of an account before the row of a refresh.
COMPLETE = f"""
WITH account AS (
    SELECT id FROM tiger_accounts
    WHERE id = $2 AND access_token IS NOT DISTINCT FROM $4 AND tiger_id = $15 FOR NO KEY UPDATE
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
        last_error_at = CASE WHEN a.auto_suspended THEN a.last_error_at END,
        failing_until = CASE WHEN a.auto_suspended THEN a.failing_until END
    FROM refresh WHERE a.id = refresh.tiger_account_id
), event AS (
    INSERT INTO audit_logs (id, action, result, severity, resource_type, resource_id,
        tiger_account_id, {", ".join(ACTOR_FIELDS)}, details, duration_ms)
    SELECT $14, '{_EVENT}', 'success', '{severity_of(_EVENT, AuditResult.SUCCESS)}',
        'token_status', refresh.id::text, refresh.tiger_account_id,
        {", ".join(f"${number}" for number, _ in enumerate(ACTOR_FIELDS, start=16))},
        jsonb_build_object('status', refresh.status, 'trigger', refresh.trigger),
        refresh.duration_ms
    FROM refresh
)
SELECT {row_expression(TokenStatus, "refresh")} FROM refresh
"""  # noqa: S608  # names of columns

# The integers of a row that plain SQL has set to the greatest integer must not make the statements
# for all rows fail.
_MAX_COUNT = 2**63 - 2
# The statement _FAIL_UNKNOWN ends attempts with an unknown outcome. The row or the broker's answer
# is possibly invalid, so the statement _FAIL_UNKNOWN loads no entity and writes only constants.
_FAIL_UNKNOWN = f"""
WITH attempt AS (%s), refresh AS (
    UPDATE token_statuses t
    SET status = CASE WHEN attempt.given_up THEN 'failed' ELSE 'pending' END::token_refresh_status,
        scheduled_at = CASE WHEN attempt.given_up THEN t.scheduled_at
            ELSE clock_timestamp() + $1::interval END,
        completed_at = CASE WHEN attempt.given_up THEN clock_timestamp() END,
        next_refresh_at = CASE WHEN attempt.given_up THEN clock_timestamp() + $1::interval END,
        retry_count = least(t.retry_count, {_MAX_COUNT}) + 1, lease_expires_at = NULL,
        details = CASE jsonb_typeof(t.details) WHEN 'object' THEN t.details ELSE '{{}}' END
            || '{{"{ANSWER_LOST}": true}}',
        error_code = '{AnswerLost.__name__}', error_message = '{UNKNOWN_OUTCOME}'
    FROM attempt
    WHERE t.id = attempt.id AND t.fencing_token = attempt.fencing_token AND t.status = 'in_progress'
    RETURNING t.id, t.tiger_account_id, t.status, t.trigger
), account AS (
    UPDATE tiger_accounts a
    SET error_count = least(a.error_count, {_MAX_COUNT}) + 1,
        last_error = '{UNKNOWN_OUTCOME}', last_error_at = now(),
        failing_until = CASE WHEN a.error_count >= $2 - 1 THEN now() + $3::interval
            ELSE a.failing_until END
    FROM refresh WHERE a.id = refresh.tiger_account_id AND refresh.status = 'failed'
    RETURNING a.id, a.error_count, a.failing_until
)
SELECT refresh.id, tiger_account_id, status, trigger, error_count, failing_until
FROM refresh LEFT JOIN account ON account.id = refresh.tiger_account_id
"""  # noqa: S608  # constants
IS_LAST_ATTEMPT = "t.retry_count >= greatest(t.max_retries, 1) - 1"
# Locked rows are skipped, so that a call of `claim_due` never waits for a row lock.
_EXPIRED_LEASES = f"""
    SELECT t.id, t.fencing_token, true AS given_up
    FROM token_statuses t JOIN tiger_accounts a ON a.id = t.tiger_account_id
    WHERE t.status IN ('pending', 'in_progress') AND t.status = 'in_progress'
        AND t.scheduled_at <= clock_timestamp() AND t.lease_expires_at < clock_timestamp()
        AND {IS_LAST_ATTEMPT} AND t.id <> ALL ($4)
    ORDER BY t.scheduled_at LIMIT {_EXPIRED_LEASES_LIMIT} FOR NO KEY UPDATE OF t, a SKIP LOCKED
"""  # noqa: S608  # a constant
_HELD_CLAIM = f"""
    SELECT t.id, t.fencing_token, {IS_LAST_ATTEMPT} AS given_up
    FROM tiger_accounts a JOIN token_statuses t ON t.tiger_account_id = a.id
    WHERE t.id = $4 AND t.fencing_token = $5 AND t.status = 'in_progress' FOR NO KEY UPDATE OF a
"""  # noqa: S608  # a constant


async def update_refresh(
    session: AsyncSession, criterion: ColumnElement[bool], **values: object
) -> TokenStatus | None:
    """Update the refresh that meets a criterion, and return the updated refresh or None."""
    return await fetch_one(
        session, sql_update(TokenStatus).where(criterion).values(**values).returning(TokenStatus)
    )


async def update_claimed(
    session: AsyncSession, claim: TokenStatus, **values: object
) -> TokenStatus:
    """Update the refresh of a claim, if the claim is still valid.

    Raises:
        LeaseLost: another worker has claimed the refresh, or the refresh is not in progress.
        InvalidFields: a new value is invalid, so the refresh is not changed.
    """
    given = {name: v for name, v in values.items() if not isinstance(v, ColumnElement)}
    claim.validate_changes(given)
    refresh = await update_refresh(session, _is_held(claim), **values)
    if refresh is None:
        raise LeaseLost
    return refresh


def _is_held(claim: TokenStatus) -> ColumnElement[bool]:
    """Return the SQL condition that a claim is still valid."""
    return and_(
        col(TokenStatus.id) == claim.id,
        col(TokenStatus.fencing_token) == claim.fencing_token,
        col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
    )


@public
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
    """End a refresh with success: store the account's new token, and reset the error count.

    The aware datetime `expires_at` is the expiry of the access token. If `expires_at` is None, the
    expiry is read from a token in Tiger's format. A token with an unknown expiry is never due for a
    refresh. If `accounts.record_error` has suspended the account, the error count is not reset. If
    `complete` raises an error, the account and the refresh are not changed.

    Raises:
        LeaseLost: another worker has claimed the refresh, or the refresh is not in progress.
        StaleToken: the account has a newer access token.
        NotFound: the account was deleted.
        InvalidFields: a given value is invalid.
    """
    answer = {
        "api_response_code": api_response_code,
        "api_response_time_ms": api_response_time_ms,
        "server_version": server_version,
    }
    claim.validate_changes(answer)
    tokens: dict[str, Any] = {"access_token": access_token, "token_expires_at": expires_at}
    if refresh_token is not None:
        tokens["refresh_token"] = refresh_token
    account = vars(claim).get("tiger_account")
    if account is not None:
        with suppress(StaleToken):
            if refresh := await _complete(session, claim, account, tokens, answer):
                return refresh
    # The refresh is not completed if the account is not loaded, the account's token has changed, or
    # the claim is lost. The second call of _complete() uses the locked and reloaded account.
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    try:
        refresh = await _complete(session, claim, account, tokens, answer)
    except StaleToken:
        if await newest(session, _is_held(claim)) is None:
            raise LeaseLost from None
        raise
    if refresh is None:
        raise LeaseLost
    return refresh


@forgets_locals
async def _complete(
    session: AsyncSession,
    claim: TokenStatus,
    account: TigerAccount,
    tokens: dict[str, Any],
    answer: dict[str, Any],
) -> TokenStatus | None:
    """Return the completed refresh, or None if the claim is lost or the stored token changed."""
    expires_at = account.validate_changes(tokens)["token_expires_at"]
    access_token = tokens["access_token"]
    expires_at = account.check_not_stale(access_token, expires_at)
    old, encrypted = account.readable_token(), account.access_token
    actor = actor_in_force(actor_of(session.info))
    rows = await fetch_rows(
        session,
        COMPLETE,
        claim.id,
        account.id,
        claim.fencing_token,
        _ciphertext(encrypted),
        token_hash(old) if old else None,
        token_hash(access_token),
        expires_at,
        refresh_time(access_token, expires_at),
        *answer.values(),
        _encrypt_token(session, account, "access_token", access_token),
        _encrypt_token(session, account, "refresh_token", tokens.get("refresh_token")),
        uuid7(),
        _ciphertext(account.tiger_id),
        *(getattr(actor, name) for name in ACTOR_FIELDS),
    )
    if not rows:
        return None
    if identity_key(TigerAccount, account.id) in session.identity_map:
        # The statement COMPLETE has bypassed the ORM, so the account is read again.
        await get_or_raise(session, TigerAccount, account.id)
    return merge_row(session.sync_session, TokenStatus, rows[0][0])


def _encrypt_token(
    session: AsyncSession, account: TigerAccount, column: str, text: str | None
) -> bytes | None:
    if text is None:
        return None
    return encrypt_for_row(key_provider(session.sync_session), account, column, text)


def _ciphertext(secret: Secret | None) -> bytes | None:
    return secret.ciphertext if isinstance(secret, EncryptedSecret) else None


@public
async def fail(
    session: AsyncSession,
    claim: TokenStatus,
    *,
    message: str,
    error_code: str | None = None,
    retry_after: timedelta | None = None,
    credentials_refused: bool = False,
    answer_lost: bool = False,
    api_response_code: int | None = None,
    api_response_time_ms: int | None = None,
) -> TokenStatus:
    """End an attempt with a failure.

    If the refresh has an attempt left, the refresh becomes pending again. The next attempt is due
    after `retry_after`, or after a random backoff if `retry_after` is None. After `max_retries`
    attempts, the status of the refresh becomes `failed`. If `credentials_refused` is true, the
    status becomes `failed` at once, and an active account is suspended. Set `answer_lost` to true
    if the broker has possibly issued a token. If `answer_lost` is true, the details of the refresh
    and the messages of later failures mention the lost answer. The first 10,000 characters of
    `message` are stored, with masked secrets. If `fail` raises an error, the account and the
    refresh are not changed.

    Raises:
        LeaseLost: another worker has claimed the refresh, or the refresh is not in progress.
        NotFound: the account was deleted.
        InvalidFields: a given value is invalid.
    """
    account = await get_or_raise(session, TigerAccount, claim.tiger_account_id, lock=True)
    secrets = readable_secrets(account)
    attempts = claim.retry_count + 1
    values: dict[str, object]
    if credentials_refused or attempts >= claim.max_retries:
        wait = max(MAX_BACKOFF, retry_after or timedelta(0))
        values = {
            "status": TokenRefreshStatus.FAILED,
            "completed_at": func.clock_timestamp(),
            "next_refresh_at": func.clock_timestamp() + wait,
        }
    else:
        wait = retry_after if retry_after is not None else _backoff(attempts)
        values = {
            "status": TokenRefreshStatus.PENDING,
            "scheduled_at": func.clock_timestamp() + wait,
        }
    if await _answer_lost_before(session, claim):
        lost = "the answer to an earlier attempt was lost, and may have contained a new token"
        message = f"{message} ({lost})"
        answer_lost = True
    if answer_lost:
        values["details"] = {**(claim.details or {}), ANSWER_LOST: True}
    elapsed = func.extract("epoch", func.clock_timestamp() - col(TokenStatus.started_at))
    refresh = await update_claimed(
        session,
        claim,
        **values,
        retry_count=attempts,
        duration_ms=cast(func.greatest(elapsed * 1000, 0), BigInteger),
        lease_expires_at=None,
        error_code=error_code,
        error_message=_message(message, secrets),
        api_response_code=api_response_code,
        api_response_time_ms=api_response_time_ms,
    )
    event = recording.refresh_event(
        refresh,
        action=_EVENT,
        result=AuditResult.FAILURE,
        error_code=error_code,
        error_message=refresh.error_message,
        duration_ms=refresh.duration_ms,
    )
    await recording.insert_event(session, event)
    if credentials_refused and account.status == AccountStatus.ACTIVE:
        await apply_change(
            session,
            account,
            {"status": AccountStatus.SUSPENDED},
            action=AuditAction.ACCOUNT_STATUS_CHANGE,
            severity=AuditSeverity.CRITICAL,
            details={"reason": "the broker refuses the credentials", "refresh": str(refresh.id)},
        )
    return refresh


async def _answer_lost_before(session: AsyncSession, claim: TokenStatus) -> bool:
    """Return whether the broker's answer to an earlier attempt for the account was lost."""
    if (claim.details or {}).get(ANSWER_LOST):
        return True
    of_account = col(TokenStatus.tiger_account_id) == claim.tiger_account_id
    last = await newest(session, and_(of_account, col(TokenStatus.id) != claim.id))
    if last is None or last.status != TokenRefreshStatus.FAILED:
        return False
    return bool((last.details or {}).get(ANSWER_LOST))


def _message(error: str, secrets: list[str]) -> str:
    """Return an error message with masked secrets. A long message is truncated."""
    if len(error) <= _MAX_MESSAGE_LENGTH:
        return replace_unstorable(redact_aggressively(error, *secrets))
    # Redaction does not recognize a truncated secret, so a message is truncated after redaction.
    start = error[: _MAX_MESSAGE_LENGTH + _MAX_SECRET_LENGTH]
    message = redact_aggressively(start, *secrets)[:-_MAX_SECRET_LENGTH]
    return f"{replace_unstorable(message)}... ({len(error)} characters)"


def _backoff(attempts: int) -> timedelta:
    longest: timedelta = min(MAX_BACKOFF, BACKOFF * 2 ** min(attempts - 1, 20))
    return longest * random.random()  # noqa: S311  # jitter needs no secure randomness


@public
async def fail_unknown(session: AsyncSession, claim: TokenStatus) -> None:
    """End an attempt whose outcome cannot be stored by `complete` or `fail`.

    `fail_unknown` stores a constant error message, because the broker's answer can be invalid. The
    refresh is due again in half an hour. After `max_retries` attempts, the status of the refresh
    becomes `failed`. A failed refresh adds 1 to the error count of the account.

    Raises:
        LeaseLost: another worker has claimed the refresh, or the refresh is not in progress.
    """
    if not await _fail_unknown(session, _HELD_CLAIM, claim.id, claim.fencing_token):
        raise LeaseLost


@public
async def fail_expired_leases(session: AsyncSession, *, skip: Collection[UUID] = ()) -> int:
    """Set the status `failed` for refreshes whose lease expired in the last attempt.

    One call changes at most 100 refreshes. Return the number of changed refreshes. A lease expires
    if a worker stops during an attempt, so the broker has possibly issued a token. Each failed
    refresh adds 1 to the error count of its account. `skip` contains the ids of refreshes that the
    caller still works on.
    """
    return await _fail_unknown(session, _EXPIRED_LEASES, list(skip))


async def _fail_unknown(session: AsyncSession, attempts: str, *values: object) -> int:
    context = context_of(session.info)
    rows = await fetch_rows(
        session,
        _FAIL_UNKNOWN % attempts,
        MAX_BACKOFF,
        context.failing_after,
        context.failing_for,
        *values,
    )
    events = [
        recording.refresh_event(
            recording.RefreshRow(*refresh),
            action=_EVENT,
            result=AuditResult.FAILURE,
            error_code=AnswerLost.__name__,
            error_message=UNKNOWN_OUTCOME,
        )
        for *refresh, _, _ in rows
    ] + [
        recording.account_error_event(
            account_id,
            UNKNOWN_OUTCOME,
            error_count=error_count,
            failing_until=failing_until,
        )
        for _, account_id, _, _, error_count, failing_until in rows
        if error_count is not None
    ]
    await recording.log_events(session, events)
    return len(rows)


@public
def token_hash(token: str) -> str:
    """Return the SHA-256 of a token. The history of refreshes stores hashes instead of tokens."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
