"""Claims: having one, keeping it, and giving it back."""

from collections.abc import Collection
from datetime import timedelta
from uuid import UUID

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import set_committed_value

from tiger_db.crud.common import execute_driver_sql
from tiger_db.crud.pagination import check_limit
from tiger_db.crud.token_status.changes import ANSWER_LOST, change_held
from tiger_db.crud.token_status.outcomes import fail_expired_leases
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.models.base import hydrate, row_expression
from tiger_db.models.secrets import key_provider

# Constant, and past the ORM: claiming is what a worker does all day.
CLAIM = f"""
WITH due AS (%s)
UPDATE token_statuses t
SET status = 'in_progress', worker = $1, started_at = clock_timestamp(),
    lease_expires_at = clock_timestamp() + $2::interval, fencing_token = t.fencing_token + 1,
    -- Whoever held it has vanished: that attempt has failed.
    retry_count = t.retry_count + (t.status = 'in_progress')::int,
    details = CASE t.status
        -- The broker's answer has vanished with it.
        WHEN 'in_progress' THEN coalesce(t.details, '{{}}') || '{{"{ANSWER_LOST}": true}}'
        ELSE t.details
    END
FROM due JOIN tiger_accounts a ON a.id = due.tiger_account_id
WHERE t.id = due.id
RETURNING {row_expression(TokenStatus, "t")} AS refresh,
    {row_expression(TigerAccount, "a")} AS account
"""  # noqa: S608  # names of columns
_FREE = """t.status IN ('pending', 'in_progress')
    AND (t.status = 'pending'
        OR t.lease_expires_at < clock_timestamp() AND t.retry_count + 1 < t.max_retries)"""
# The limit stands in it: were it a parameter, PostgreSQL would plan the statement anew each time.
DUE = f"""
    SELECT t.id, t.tiger_account_id
    FROM token_statuses t JOIN tiger_accounts a ON a.id = t.tiger_account_id
    WHERE {_FREE} AND t.scheduled_at <= clock_timestamp() AND a.status = 'active'
        AND t.id <> ALL ($3)
    ORDER BY t.scheduled_at LIMIT %d FOR UPDATE OF t SKIP LOCKED
"""  # noqa: S608  # a constant
_ONE = f"""
    SELECT t.id, t.tiger_account_id FROM token_statuses t WHERE t.id = $3 AND {_FREE} FOR UPDATE
"""  # noqa: S608  # a constant


async def claim_due(
    session: AsyncSession,
    *,
    worker: str,
    limit: int = 10,
    lease: timedelta = timedelta(seconds=60),
    skip: Collection[UUID] = (),
) -> list[TokenStatus]:
    """Claim refreshes that are due, or whose lease has expired, for a worker: longest due first.

    Each is claimed by one worker only. A lease that has expired counts as a failed attempt; where
    that was the last one, the refresh is not claimed. Once fewer than `limit` are due, such
    refreshes are given up: see `fail_expired_leases`.

    Commit before asking Tiger. The claims returned belong to no session and stay as they are: pass
    them to `heartbeat`, `complete` and `fail`. Each has its `tiger_account`, as it was at that
    time. `skip` are refreshes that the worker is at already, which it should not take over from
    itself.

    Raises:
        InvalidValue: the lease is not positive, the limit is not from 1 to 1000, or the worker's
            name is refused.
    """
    check_limit(limit)
    _check_lease(lease)
    claimed = await _claim(session, DUE % limit, worker, lease, list(skip))
    if len(claimed) < limit:  # it reads all that are due, so not while there are many
        await fail_expired_leases(session, skip=skip)
    return claimed


async def claim(
    session: AsyncSession,
    refresh_id: UUID,
    *,
    worker: str,
    lease: timedelta = timedelta(seconds=60),
) -> TokenStatus:
    """Claim one refresh, due or not, whatever the status of its account. See `claim_due`.

    Raises:
        InvalidState: it has ended, another worker has it, or its attempts are used up.
        InvalidValue: the lease is not positive, or the worker's name is refused.
    """
    claimed = await _claim(session, _ONE, worker, lease, refresh_id)
    if not claimed:
        raise InvalidState(
            "another worker is at this refresh, it has ended, or its attempts are used up"
        )
    return claimed[0]


async def _claim(
    session: AsyncSession, due: str, worker: str, lease: timedelta, which: UUID | list[UUID]
) -> list[TokenStatus]:
    _check_lease(lease)
    provider = key_provider(session.sync_session)
    claims = []
    rows = await execute_driver_sql(session, CLAIM % due, worker, lease, which)
    for refresh, account in map(tuple, rows):
        claimed = hydrate(TokenStatus, refresh, provider)
        set_committed_value(claimed, "tiger_account", hydrate(TigerAccount, account, provider))
        claims.append(claimed)
    return sorted(claims, key=lambda claimed: (claimed.scheduled_at, claimed.id))


async def heartbeat(
    session: AsyncSession, claim: TokenStatus, *, lease: timedelta = timedelta(seconds=60)
) -> TokenStatus:
    """Renew a claim's lease.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended.
    """
    _check_lease(lease)
    return await change_held(session, claim, lease_expires_at=func.clock_timestamp() + lease)


async def give_back(
    session: AsyncSession, claim: TokenStatus, *, wait: timedelta = timedelta(0)
) -> TokenStatus:
    """End a claim before the broker was asked: the refresh is due again after the wait.

    Raises:
        LeaseLost: someone else has claimed it, or it has ended; nothing has changed.
    """
    return await change_held(
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
