"""Checks of accounts, of their tokens and refreshes, and of the pause of trading."""

from collections import defaultdict
from contextlib import suppress

from sqlalchemy import Float, func, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from tiger_db.checks import (
    DAY,
    HOUR,
    MINUTE,
    Outcome,
    Status,
    duration,
    fetch_all,
    grade,
    join_first,
)
from tiger_db.crud.accounts import RoutingReason, explain_for_operation
from tiger_db.crud.api_keys import current_pause
from tiger_db.database import AsyncSession
from tiger_db.models import TigerAccount
from tiger_db.models.accounts import ACCOUNT_NUMBER, due_tokens, normalize_account_number

# Each constant contains two ages in seconds: the minimum age for a warning, and the minimum age for
# a problem.
_OVERDUE_SECONDS = (5 * MINUTE, HOUR)
_STALE_SECONDS = (HOUR, DAY)

# For OPEN_REFRESHES, PostgreSQL reads two partial indexes. OFFSET 0 prevents a join that reads all
# accounts, so that PostgreSQL looks up only the accounts of the refreshes.
OPEN_REFRESHES = """
SELECT count(*) FILTER (WHERE status = 'pending') AS waiting,
    count(*) FILTER (WHERE status = 'in_progress' AND lease_expires_at < now()) AS abandoned,
    extract(epoch FROM now() - min(CASE WHEN status = 'pending' THEN scheduled_at
        WHEN lease_expires_at < now() THEN lease_expires_at END))::float AS age
FROM token_statuses t
WHERE status IN ('pending', 'in_progress') AND scheduled_at <= now()
    AND EXISTS (SELECT FROM tiger_accounts a WHERE a.id = tiger_account_id AND a.status = 'active'
        OFFSET 0)
"""


async def check_refreshes(connection: AsyncConnection) -> Outcome:
    row = (await fetch_all(connection, OPEN_REFRESHES))[0]
    if row.age is None:
        return Outcome("ok", "no refresh is overdue")
    status = grade(row.age, _OVERDUE_SECONDS)
    return Outcome(
        status,
        f"due refreshes: {row.waiting}; refreshes with an expired lease: {row.abandoned};"
        f" longest wait of a refresh: {duration(row.age)}",
        None if status == "ok" else "run more `tiger-db run-refresh-worker` processes",
    )


DUE_TOKENS = select(
    func.count().label("accounts"),
    func.count().filter(col(TigerAccount.token_expires_at) <= func.now()).label("expired"),
    func.extract("epoch", func.now() - func.min(col(TigerAccount.token_refresh_at)))
    .cast(Float)
    .label("age"),
).where(due_tokens())


async def check_tokens(connection: AsyncConnection) -> Outcome:
    row = (await fetch_all(connection, DUE_TOKENS))[0]
    if not row.accounts:
        return Outcome("ok", "no token is due for a refresh")
    status: Status = "problem" if row.expired else grade(row.age, _STALE_SECONDS)
    advice = "see `tiger-db watch-refreshes`; keep `tiger-db run-refresh-worker` running"
    return Outcome(
        status,
        f"tokens that are due for a refresh: {row.accounts}; expired tokens: {row.expired};"
        f" the first token became due {duration(row.age)} ago",
        None if status == "ok" else advice,
    )


# Why an active account cannot serve requests, and what to do.
_UNABLE = {
    RoutingReason.NO_VALID_TOKEN: (
        "its license needs an access token, and the account has no valid token",
        "store an access token with `tiger-db import-account`",
    ),
    RoutingReason.FAILING: (
        "it is failing after several errors",
        "see the last error with `tiger-db show-account`",
    ),
}


async def check_accounts(connection: AsyncConnection) -> Outcome:
    """Find the active accounts that cannot serve any request."""
    async with AsyncSession(connection) as session:
        reasons_of = await explain_for_operation(session, environment=None)
    unable = {
        account_id: reasons
        for account_id, reasons in reasons_of.items()
        if reasons and RoutingReason.NOT_ACTIVE not in reasons
    }
    if not unable:
        return Outcome("ok", "all active accounts can serve requests")
    found = [reason for reason in _UNABLE if any(reason in rs for rs in unable.values())]
    seen = join_first(
        [
            f"{account_id} ({', and '.join(_UNABLE[reason][0] for reason in reasons)})"
            for account_id, reasons in unable.items()
        ]
    )
    return Outcome(
        "problem" if RoutingReason.NO_VALID_TOKEN in found else "warning",
        f"active accounts that cannot serve requests: {len(unable)}: {seen}",
        "; ".join(_UNABLE[reason][1] for reason in found),
    )


async def check_trading(connection: AsyncConnection) -> Outcome:
    async with AsyncSession(connection) as session:
        paused = await current_pause(session)
    if paused is None:
        return Outcome("ok", "not paused")
    advice = "when the reason for the pause no longer applies, run `tiger-db resume`"
    return Outcome("warning", f"paused {paused}", advice)


_ACCOUNT_NUMBERS = f"""
SELECT id::text, account_number, status <> 'closed' AS open,
    account_number ~ '^({ACCOUNT_NUMBER})$' AS normal
FROM tiger_accounts ORDER BY tiger_accounts.id
"""  # noqa: S608  # the inserted text is a constant
_EXEMPTING = """
SELECT format('ALTER TABLE tiger_accounts DROP CONSTRAINT %1$I, ADD CONSTRAINT %1$I', conname)
    AS alter_table
FROM pg_constraint WHERE conrelid = 'tiger_accounts'::regclass AND NOT convalidated
    AND conname = 'ck_tiger_accounts_account_number_form'
"""


async def check_account_numbers(connection: AsyncConnection) -> Outcome:
    """Find the accounts whose numbers an older release of tiger_db stored without normalization."""
    rows = await fetch_all(connection, _ACCOUNT_NUMBERS)
    ids_of = defaultdict[str, list[str]](list)
    for row in rows:
        if row.open:
            with suppress(ValueError):
                ids_of[normalize_account_number(row.account_number)].append(row.id)
    if same := [" and ".join(ids) for ids in ids_of.values() if len(ids) > 1]:
        seen = join_first([f"accounts {ids} are the same account at Tiger" for ids in same])
        advice = "close all but one account: a token refresh ends the tokens of the other accounts"
        return Outcome("problem", seen, advice)
    if old := [row.id for row in rows if row.open and not row.normal]:
        seen = f"account numbers are not normalized in these accounts: {join_first(old)}"
        advice = "set the account numbers with `crud.accounts.update`, or close the accounts"
        return Outcome("warning", seen, advice)
    exempting = await fetch_all(connection, _EXEMPTING)
    if exempting and all(row.normal for row in rows):
        return Outcome(
            "warning",
            "all account numbers are normalized, but the CHECK constraint still exempts accounts",
            f"run {exempting[0].alter_table} CHECK (account_number ~ '^({ACCOUNT_NUMBER})$')",
        )
    return Outcome("ok", "all account numbers are normalized")
