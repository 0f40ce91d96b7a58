"""Functions that claim token refreshes, renew leases, and give claimed refreshes back."""

from collections.abc import Collection
from datetime import timedelta
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import set_committed_value

from tiger_db.crud.common import fetch_rows, get_or_raise
from tiger_db.crud.pagination import check_limit
from tiger_db.crud.token_status.outcomes import (
    ANSWER_LOST,
    IS_LAST_ATTEMPT,
    fail_expired_leases,
    update_claimed,
)
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.models.base import hydrate, row_expression
from tiger_db.models.secrets import key_provider
from tiger_db.public import public

LEASE = timedelta(seconds=60)
# The SQL text CLAIM bypasses the ORM for speed, because workers claim refreshes frequently.
CLAIM = f"""
WITH due AS (%s)
UPDATE token_statuses t
SET status = 'in_progress', worker = $1, started_at = clock_timestamp(),
    lease_expires_at = clock_timestamp() + $2::interval,
    -- The number of a row that plain SQL has set to the greatest integer starts again at 1.
    fencing_token = t.fencing_token %% 9223372036854775807 + 1,
    -- A refresh that is claimed early is due now, so that another worker finds its expired lease.
    scheduled_at = least(t.scheduled_at, clock_timestamp()),
    -- An expired lease counts as a failed attempt: the broker's answer may be lost.
    retry_count = t.retry_count + (t.status = 'in_progress')::int,
    details = CASE t.status
        WHEN 'in_progress' THEN coalesce(t.details, '{{}}') || '{{"{ANSWER_LOST}": true}}'
        ELSE t.details
    END
FROM due JOIN tiger_accounts a ON a.id = due.tiger_account_id
WHERE t.id = due.id
RETURNING {row_expression(TokenStatus, "t")} AS refresh,
    {row_expression(TigerAccount, "a")} AS account
"""  # noqa: S608  # names of columns
_IS_CLAIMABLE = f"""t.status IN ('pending', 'in_progress')
    AND (t.status = 'pending'
        OR t.lease_expires_at < clock_timestamp() AND NOT {IS_LAST_ATTEMPT})"""
# LIMIT is a constant, because PostgreSQL would plan a statement with a LIMIT parameter at every
# execution.
DUE = f"""
    SELECT t.id, t.tiger_account_id
    FROM token_statuses t JOIN tiger_accounts a ON a.id = t.tiger_account_id
    WHERE {_IS_CLAIMABLE} AND t.scheduled_at <= clock_timestamp() AND a.status = 'active'
        AND t.id <> ALL ($3)
    ORDER BY t.scheduled_at LIMIT %d FOR UPDATE OF t SKIP LOCKED
"""  # noqa: S608  # a constant
_BY_ID = f"""
    SELECT t.id, t.tiger_account_id FROM token_statuses t
    WHERE t.id = $3 AND {_IS_CLAIMABLE} FOR UPDATE
"""  # noqa: S608  # a constant


@public
async def claim_due(
    session: AsyncSession,
    *,
    worker: str,
    limit: int = 10,
    lease: timedelta = LEASE,
    skip: Collection[UUID] = (),
) -> list[TokenStatus]:
    """Claim refreshes that are due or whose lease has expired, the longest due refresh first.

    Only one worker at a time can claim a refresh. An expired lease counts as a failed attempt. If
    fewer than `limit` refreshes can be claimed, `claim_due` also calls `fail_expired_leases`.

    Commit the transaction before you send a request to the broker. A claim is not bound to a
    session. Pass the claim to `heartbeat`, `complete`, `fail` or `give_back` with any session. The
    relationship `tiger_account` of each claim is loaded. `claim_due` does not claim refreshes whose
    ids are in `skip`. Pass the ids of the refreshes that the worker still works on as `skip`.

    Raises:
        InvalidValue: the lease is not positive, `limit` is not from 1 to 1000, or the name of the
            worker is invalid.
    """
    check_limit(limit)
    claims = await _claim(session, DUE % limit, worker, lease, list(skip))
    if len(claims) < limit:  # fail_expired_leases is slow if many refreshes are due
        await fail_expired_leases(session, skip=skip)
    return claims


@public
async def claim(
    session: AsyncSession, refresh_id: UUID, *, worker: str, lease: timedelta = LEASE
) -> TokenStatus:
    """Claim one refresh, even if the refresh is not due, or the account is not active.

    Raises:
        NotFound: no refresh has the id `refresh_id`.
        InvalidState: the refresh has ended, is claimed by another worker, or has no attempt left.
        InvalidValue: the lease is not positive, or the name of the worker is invalid.
    """
    claims = await _claim(session, _BY_ID, worker, lease, refresh_id)
    if not claims:
        await get_or_raise(session, TokenStatus, refresh_id)
        raise InvalidState(
            "this refresh has ended, is claimed by another worker, or has no attempt left"
        )
    return claims[0]


async def _claim(
    session: AsyncSession, due: str, worker: str, lease: timedelta, ids: UUID | list[UUID]
) -> list[TokenStatus]:
    _check_lease(lease)
    provider = key_provider(session.sync_session)
    claims = []
    for refresh, account in await fetch_rows(session, CLAIM % due, worker, lease, ids):
        claim = hydrate(TokenStatus, refresh, provider)
        set_committed_value(claim, "tiger_account", hydrate(TigerAccount, account, provider))
        claims.append(claim)
    return sorted(claims, key=lambda claim: (claim.scheduled_at, claim.id))


@public
async def heartbeat(
    session: AsyncSession, claim: TokenStatus, *, lease: timedelta = LEASE
) -> TokenStatus:
    """Renew the lease of a claim. The renewed lease starts now and lasts for `lease`.

    Raises:
        LeaseLost: another worker has claimed the refresh, or the refresh is not in progress.
    """
    _check_lease(lease)
    return await update_claimed(session, claim, lease_expires_at=func.clock_timestamp() + lease)


@public
async def give_back(
    session: AsyncSession, claim: TokenStatus, *, wait: timedelta = timedelta(0)
) -> TokenStatus:
    """End a claim without a request to the broker. The refresh is due again after `wait`.

    Raises:
        LeaseLost: another worker has claimed the refresh, or the refresh is not in progress.
    """
    return await update_claimed(
        session,
        claim,
        status=TokenRefreshStatus.PENDING,
        scheduled_at=func.clock_timestamp() + wait,
        lease_expires_at=None,
        worker=None,
    )


def _check_lease(lease: timedelta) -> None:
    if lease <= timedelta(0):
        raise InvalidValue("lease must be positive")
