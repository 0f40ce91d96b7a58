"""Checks of an installation of tiger_db, with advice on each warning and problem.

Every check runs in its own transaction, with short timeouts. If a check raises an error, the result
of the check is a warning, and the other checks still run. The checks read large tables through
indexes only. Some checks scan the small tables `tiger_accounts` and `api_keys`.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Executable, Float, Row, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import class_mapper
from sqlmodel import col

from tiger_db.audit.checkpoints import newest_checkpoint
from tiger_db.checks import (
    Outcome,
    Status,
    check_citus,
    check_collations,
    check_readable_rows,
)
from tiger_db.connections import connect, maintenance_engine
from tiger_db.connections.error_advice import explain
from tiger_db.crud.accounts import RoutingReason, explain_for_operation
from tiger_db.crud.api_keys import current_pause
from tiger_db.crud.api_keys.signing import find_invalid_codes
from tiger_db.database import AsyncSession
from tiger_db.encryption import BOUND_MARK
from tiger_db.encryption_key_rotation import (
    find_unnormalized_secrets,
    list_encryption_key_usage,
)
from tiger_db.errors import (
    Conflict,
    FileError,
    InvalidState,
    QueryTimeout,
    SchemaMismatch,
    StatementRefused,
    TigerDBError,
)
from tiger_db.keys_in_force import (
    API_KEY_PEPPERS,
    AUDIT_SIGNING_KEY,
    ENCRYPTION_KEYS,
    KeySetting,
    in_force,
    required_key_ring,
    required_peppers,
)
from tiger_db.migrations import SEARCH_PATH, SearchPath, schema_state
from tiger_db.migrations.comparison import find_differences
from tiger_db.models import TigerAccount
from tiger_db.models.accounts import ACCOUNT_NUMBER, due_tokens, normalize_account_number
from tiger_db.settings import Settings, quote_identifier

T = TypeVar("T")

_MINUTE, _HOUR, _DAY = 60, 3600, 86400  # durations in seconds
_TIMEOUTS = text(
    "SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '1s', true)"
)
_MAX_ITEMS_LISTED = 3  # maximum number of items that a message lists

# Each of the next three constants contains two ages in seconds: the minimum age for a warning, and
# the minimum age for a problem.
UNSEALED_SECONDS = (_HOUR, _DAY)
_OVERDUE_SECONDS = (5 * _MINUTE, _HOUR)
_STALE_SECONDS = (_HOUR, _DAY)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The name of a check, its status, the state that it found, and advice or None."""

    check: str
    status: Status
    seen: str
    advice: str | None = None


Check: TypeAlias = Callable[[AsyncConnection], Awaitable[Outcome]]


async def run(settings: Settings) -> list[CheckResult]:
    """Run all checks of the installation. The checks change no data and start no server."""
    if settings.embedded:
        from tiger_db import embedded  # noqa: PLC0415  # `embedded` needs POSIX and an extra

        if await asyncio.to_thread(embedded.running, settings) is None:
            seen = f"{settings.location} is not running"
            return [CheckResult("server", "problem", seen, "run `tiger-db start-embedded`")]
    results: list[CheckResult] = []
    try:
        async with maintenance_engine(settings) as engine, engine.connect() as connection:
            results.append(await _check_search_path(connection, settings))
            for name, check in _checks(settings).items():
                results.append(await _run_check(connection, name, check))
                if name == "schema" and results[-1].status != "ok":
                    break  # the later checks need the tables of this release
    except (TigerDBError, OSError) as error:
        results.append(CheckResult("server", "problem", explain(error) or type(error).__name__))
    return results


def _checks(settings: Settings) -> dict[str, Check]:
    return {
        "invalid indexes": _check_indexes,
        "collations": check_collations,
        "Citus": check_citus,
        "schema": _check_schema,
        "triggers and functions": check_triggers,
        "audit partitions": _check_partitions,
        "unsealed events": _check_unsealed,
        "audit checkpoints": partial(_check_checkpoints, settings=settings),
        "refreshes": _check_refreshes,
        "tokens": _check_tokens,
        "accounts": _check_accounts,
        "trading": _check_trading,
        "API keys": _check_api_keys,
        "API key hashes": partial(_check_hashes, settings=settings),
        "API key peppers": partial(_check_peppers, settings=settings),
        "API key codes": partial(_check_codes, settings=settings),
        "account numbers": _check_account_numbers,
        "readable rows": check_readable_rows,
        "encryption keys": partial(_check_encryption_keys, settings=settings),
        "Tiger ids": partial(_check_tiger_ids, settings=settings),
    }


def _unusable(error: TigerDBError, keys: KeySetting[T]) -> Outcome:
    """Return the outcome of a check whose secret keys are missing, malformed or unreadable."""
    return Outcome("problem", str(error).removesuffix(f": {keys.advice}"), keys.advice)


async def _run_check(connection: AsyncConnection, name: str, check: Check) -> CheckResult:
    """Run a check. If the check raises an error, return a warning with the error's reason."""
    try:
        async with connection.begin():
            await connection.execute(_TIMEOUTS)
            return CheckResult(name, *await check(connection))
    except (DBAPIError, Conflict, QueryTimeout, StatementRefused) as error:
        if isinstance(error, Conflict | QueryTimeout):
            advice = (
                "run `tiger-db doctor` again; `pg_stat_activity` shows sessions that hold locks"
            )
        elif (
            isinstance(error, StatementRefused) or getattr(error.orig, "sqlstate", None) == "42501"
        ):
            advice = "GRANT the missing privilege to this role, or connect as the tables' owner"
        else:
            advice = "see `tiger-db check`"
        return CheckResult(name, "warning", f"not checked: {explain(error)}", advice)


async def _fetch_all(
    connection: AsyncConnection, statement: str | Executable
) -> Sequence[Row[Any]]:
    query = text(statement) if isinstance(statement, str) else statement
    return (await connection.execute(query)).all()


def _grade(value: float, thresholds: tuple[float, float]) -> Status:
    warning, problem = thresholds
    return "problem" if value >= problem else "warning" if value >= warning else "ok"


def _duration(seconds: float) -> str:
    for unit, length in (("d", _DAY), ("h", _HOUR), ("min", _MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"


def _join_first(items: Sequence[str]) -> str:
    """Join the first items with semicolons, and append the number of the omitted items."""
    more = len(items) - _MAX_ITEMS_LISTED
    return "; ".join(items[:_MAX_ITEMS_LISTED]) + (f"; and {more} more" if more > 0 else "")


async def _check_search_path(direct: AsyncConnection, settings: Settings) -> CheckResult:
    """Compare the search path of sessions with the search path that tiger_db needs.

    A pooler refuses or drops the search path that a client sends when the client connects.
    Therefore, sessions behind a pooler use the search path of the role or of the database.
    """

    async def check(connection: AsyncConnection) -> Outcome:
        row = (await connection.exec_driver_sql(SEARCH_PATH)).one()
        return _grade_search_path(SearchPath._make(row), settings)

    if not settings.uses_pooler:
        return await _run_check(direct, "search path", check)
    try:
        connection = await connect(settings)
        try:
            row = await connection.fetchrow(SEARCH_PATH)
        finally:
            connection.terminate()
    except (TigerDBError, OSError) as error:
        return CheckResult("search path", "problem", explain(error) or type(error).__name__)
    assert row is not None
    return CheckResult("search path", *_grade_search_path(SearchPath._make(row), settings))


def _grade_search_path(path: SearchPath, settings: Settings) -> Outcome:
    schema, advice = settings.db_schema, f"run {path.repair_sql(settings.db_schema)}"
    if settings.uses_pooler:
        advice += "; then run RECONNECT on the pooler's console"
    if not path.resolves_to(schema):
        seen = (
            f"the search path {path.setting} is wrong: PostgreSQL must search pg_catalog first, and"
            f" then the schema {quote_identifier(schema)} (DB_SCHEMA)"
        )
        return Outcome("problem", seen, advice)
    # `Settings.search_path` has the schema's name in quotes. After ALTER ROLE, PostgreSQL reports
    # the schema's name without unnecessary quotes.
    if path.setting.removeprefix("pg_catalog, ") in (settings.search_path, f"{schema}, pg_temp"):
        return Outcome("ok", path.setting)
    seen = f"in the search path {path.setting}, another schema can hide tables of DB_SCHEMA"
    return Outcome("warning", seen, advice)


# A failed CREATE INDEX CONCURRENTLY leaves an invalid index.
_INVALID_INDEXES = """
SELECT i.indexrelid::regclass::text AS name, i.indisunique AS "unique" FROM pg_index i
WHERE NOT (i.indisvalid AND i.indisready)
    AND i.indexrelid NOT IN (SELECT index_relid FROM pg_stat_progress_create_index)
ORDER BY 2 DESC, 1
"""


async def _check_indexes(connection: AsyncConnection) -> Outcome:
    rows = await _fetch_all(connection, _INVALID_INDEXES)
    if not rows:
        return Outcome("ok", "none")
    return Outcome(
        "problem",
        _join_first([f"{row.name}{' (unique)' if row.unique else ''}" for row in rows]),
        f"run REINDEX INDEX CONCURRENTLY {rows[0].name}, or drop the index",
    )


async def _check_schema(connection: AsyncConnection) -> Outcome:
    try:
        state = await schema_state(connection)
        state.check()
    except SchemaMismatch as mismatch:
        seen, _, advice = str(mismatch).partition(": ")
        return Outcome("problem", seen, advice)
    return Outcome("ok", f"the schema is at revision {state.current}, the newest")


async def check_triggers(connection: AsyncConnection) -> Outcome:
    """Compare the triggers, functions, row security and rules in the database with this release."""
    differences = await find_differences(connection)
    changed = [difference.description for difference in differences if not difference.undeclared]
    added = [difference for difference in differences if difference.undeclared]
    seen = _join_first([*changed, *(difference.description for difference in added)])
    if changed:
        advice = "run the SQL that `tiger-db check` prints, and find out who changed the schema"
        return Outcome("problem", seen, advice)
    if added:  # an added trigger can change or refuse writes, such as the revocation of an API key
        return Outcome("warning", seen, added[0].repair)
    return Outcome("ok", "all triggers, functions and rules match this release")


_MONTHS_AHEAD = """
SELECT coalesce(min(n) - 1, 120) FROM generate_series(1, 120) AS n
WHERE NOT EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass
    AND inhrelid = to_regclass('audit_logs_' || to_char(
        date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => n), 'YYYY_MM')))
"""


async def audit_months_ahead(connection: AsyncConnection) -> int:
    """Count the consecutive months after the current month that have an audit partition."""
    return int((await _fetch_all(connection, _MONTHS_AHEAD))[0][0])


def grade_partitions(months_ahead: int) -> Outcome:
    """Return an Outcome for the number of future months that have an audit partition."""
    seen = f"future months with an audit partition: {months_ahead}"
    match months_ahead:
        case 0:
            advice = "run `tiger-db migrate` now, and `tiger-db maintain-audit` every day"
            return Outcome("problem", seen, advice)
        case 1:
            return Outcome("warning", seen, "run `tiger-db maintain-audit` every day")
    return Outcome("ok", seen)


async def _check_partitions(connection: AsyncConnection) -> Outcome:
    return grade_partitions(await audit_months_ahead(connection))


# The column `age` is the age in seconds of the oldest audit event in the first 1,000 unsealed
# positions. For the column `age`, PostgreSQL reads the index ix_audit_logs_position.
UNSEALED_EVENTS = """
SELECT taken - upto AS events, seals, extract(epoch FROM clock_timestamp() - (
    SELECT min(created_at) FROM audit_logs WHERE position > upto AND position <= upto + 1000
))::float AS age
FROM (SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS taken FROM audit_logs_position_seq)
    AS t,
    (SELECT coalesce(max((statement::json ->> 'upto')::bigint), 0) AS upto, count(*) AS seals
    FROM (SELECT statement FROM audit_seals ORDER BY number DESC LIMIT 1) AS s) AS last
"""


async def _check_unsealed(connection: AsyncConnection) -> Outcome:
    row = (await _fetch_all(connection, UNSEALED_EVENTS))[0]
    if row.events < 0:
        return Outcome(
            "problem",
            f"the sequence of positions is {-row.events:,} behind the newest seal",
            "run `tiger-db seal-audit --repair-sequence`",
        )
    if row.age is None:
        return Outcome("ok", "none")
    status = _grade(row.age, UNSEALED_SECONDS)
    if status == "problem" and not row.seals:
        status = "warning"  # some installations do not seal audit events
    return Outcome(
        status,
        f"unsealed events: at most {row.events:,}, the oldest {_duration(row.age)} old",
        None if status == "ok" else "run `tiger-db seal-audit` every minute",
    )


async def _check_checkpoints(connection: AsyncConnection, *, settings: Settings) -> Outcome:
    folder = settings.audit_checkpoints
    if await asyncio.to_thread(in_force, settings, AUDIT_SIGNING_KEY, generate=False) is None:
        return Outcome("ok", "this process does not seal audit events")
    if folder is None:
        return Outcome(
            "warning",
            "no folder of checkpoints is set, so the sealer cannot notice that seals were replaced",
            "set AUDIT_CHECKPOINTS to a folder that the owner of the database cannot change",
        )
    try:
        newest = await asyncio.to_thread(newest_checkpoint, folder)
    except (FileError, InvalidState) as error:
        return Outcome("problem", str(error), "see AUDIT_CHECKPOINTS in the documentation")
    number = 0 if newest is None else newest.payload().number
    last = (await _fetch_all(connection, "SELECT coalesce(max(number), 0) FROM audit_seals"))[0][0]
    if number > last:
        seen = f"the newest seal is {last}, but {folder} has a checkpoint of seal {number}"
        return Outcome("problem", seen, "run `tiger-db verify-audit`")
    return Outcome("ok", f"the newest checkpoint is of seal {number}, the newest seal is {last}")


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


async def _check_refreshes(connection: AsyncConnection) -> Outcome:
    row = (await _fetch_all(connection, OPEN_REFRESHES))[0]
    if row.age is None:
        return Outcome("ok", "no refresh is overdue")
    status = _grade(row.age, _OVERDUE_SECONDS)
    return Outcome(
        status,
        f"due refreshes: {row.waiting}; refreshes with an expired lease: {row.abandoned};"
        f" longest wait of a refresh: {_duration(row.age)}",
        None if status == "ok" else "run more `tiger-db run-refresh-worker` processes",
    )


DUE_TOKENS = select(
    func.count().label("accounts"),
    func.count().filter(col(TigerAccount.token_expires_at) <= func.now()).label("expired"),
    func.extract("epoch", func.now() - func.min(col(TigerAccount.token_refresh_at)))
    .cast(Float)
    .label("age"),
).where(due_tokens())


async def _check_tokens(connection: AsyncConnection) -> Outcome:
    row = (await _fetch_all(connection, DUE_TOKENS))[0]
    if not row.accounts:
        return Outcome("ok", "no token is due for a refresh")
    status: Status = "problem" if row.expired else _grade(row.age, _STALE_SECONDS)
    advice = "see `tiger-db watch-refreshes`; keep `tiger-db run-refresh-worker` running"
    return Outcome(
        status,
        f"tokens that are due for a refresh: {row.accounts}; expired tokens: {row.expired};"
        f" the first token became due {_duration(row.age)} ago",
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


async def _check_accounts(connection: AsyncConnection) -> Outcome:
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
    seen = _join_first(
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


async def _check_trading(connection: AsyncConnection) -> Outcome:
    async with AsyncSession(connection) as session:
        paused = await current_pause(session)
    if paused is None:
        return Outcome("ok", "not paused")
    advice = "when the reason for the pause no longer applies, run `tiger-db resume`"
    return Outcome("warning", f"paused {paused}", advice)


# For EXPIRING_KEYS, PostgreSQL reads the index ix_api_keys_expires_at_id.
EXPIRING_KEYS = """
SELECT key_prefix, extract(epoch FROM expires_at - now())::float AS left, count(*) OVER () AS keys
FROM api_keys
WHERE status = 'active' AND expires_at > now() AND expires_at <= now() + interval '7 days'
ORDER BY expires_at LIMIT 1
"""


async def _check_api_keys(connection: AsyncConnection) -> Outcome:
    rows = await _fetch_all(connection, EXPIRING_KEYS)
    if not rows:
        return Outcome("ok", "no API key expires within 7 days")
    row = rows[0]
    return Outcome(
        "warning",
        f"API keys that expire within 7 days: {row.keys}, the first ({row.key_prefix}) in"
        f" {_duration(row.left)}",
        "list the API keys with `tiger-db list-expiring-api-keys`; give each key a later expiry"
        " with `tiger-db update-api-key`, or rotate the key",
    )


# _UNPEPPERED_KEYS scans the whole table api_keys, because the table is small, and no other query
# needs an index of API keys without a pepper.
_UNPEPPERED_KEYS = """
SELECT array_agg(key_prefix ORDER BY id) AS prefixes,
    (clock_timestamp() AT TIME ZONE 'UTC')::date AS today
FROM api_keys
WHERE status = 'active' AND coalesce(expires_at > now(), true) AND pepper_id IS NULL
"""


async def _check_hashes(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find the active API keys whose hashes have no pepper."""
    until = settings.api_keys_allow_unpeppered_until
    row = (await _fetch_all(connection, _UNPEPPERED_KEYS))[0]
    if row.prefixes is None:
        return Outcome("ok", "all active API keys have hashes with a pepper")
    seen = f"active API keys whose hash has no pepper: {len(row.prefixes)}"
    seen = f"{seen} ({_join_first(row.prefixes)})"
    advice = "revoke the keys that you did not create, and rotate the other keys"
    if until is not None and row.today <= until:
        return Outcome(
            "warning",
            f"{seen}; these API keys are accepted until the end of {until} (UTC)",
            f"{advice}; the next use of an API key stores a new hash with a pepper",
        )
    advice += "; to accept these keys until a date, set API_KEYS_ALLOW_UNPEPPERED_UNTIL"
    return Outcome("problem", f"{seen}; these API keys are refused", advice)


# _PEPPERS_IN_USE scans the small table api_keys.
_PEPPERS_IN_USE = """
SELECT pepper_id AS id, count(*) AS keys FROM api_keys
WHERE status = 'active' AND coalesce(expires_at > now(), true) AND pepper_id IS NOT NULL
GROUP BY pepper_id ORDER BY pepper_id
"""


async def _check_peppers(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find the active API keys whose pepper is missing."""
    try:
        peppers = await asyncio.to_thread(required_peppers, settings)
    except TigerDBError as error:
        return _unusable(error, API_KEY_PEPPERS)
    configured = peppers.key_ids if peppers is not None else ()
    rows = await _fetch_all(connection, _PEPPERS_IN_USE)
    if missing := [row for row in rows if row.id not in configured]:
        refused = sum(row.keys for row in missing)
        names = ", ".join(row.id for row in missing)
        seen = f"active API keys whose pepper is missing: {refused}; these API keys are refused"
        return Outcome("problem", seen, f"put {names} back into API_KEY_PEPPERS")
    seen = ", ".join(
        f"{row.id}: {row.keys:,} active {'key' if row.keys == 1 else 'keys'}" for row in rows
    )
    return Outcome("ok", seen or "no pepper is in use")


async def _check_codes(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find the API keys in force whose authentication code is missing or wrong."""
    try:
        peppers = await asyncio.to_thread(required_peppers, settings)
    except TigerDBError as error:
        return _unusable(error, API_KEY_PEPPERS)
    if peppers is None:
        return Outcome("ok", "no pepper exists yet, and no API key")
    async with AsyncSession(connection) as session:
        found = await find_invalid_codes(session, peppers)
        today = await session.scalar(text("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date"))
    if found.wrong:
        seen = (
            "API keys whose row was created or changed by another program than tiger_db:"
            f" {len(found.wrong)} ({_join_first(found.wrong)}); these API keys are refused"
        )
        advice = "revoke or delete these API keys, and find out who changed the table api_keys"
        return Outcome("problem", seen, advice)
    if not found.missing:
        return Outcome("ok", "all active API keys have valid authentication codes")
    seen = f"active API keys without an authentication code: {len(found.missing)}"
    seen = f"{seen} ({_join_first(found.missing)})"
    advice = "revoke the API keys that you did not create, and run `tiger-db sign-api-keys`"
    until = settings.api_keys_allow_unsigned_until
    if until is not None and today is not None and today <= until:
        seen += f"; these API keys are accepted until the end of {until} (UTC)"
        return Outcome("warning", seen, advice)
    return Outcome("problem", f"{seen}; these API keys are refused", advice)


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


async def _check_account_numbers(connection: AsyncConnection) -> Outcome:
    """Find the accounts whose numbers an older release of tiger_db stored without normalization."""
    rows = await _fetch_all(connection, _ACCOUNT_NUMBERS)
    ids_of = defaultdict[str, list[str]](list)
    for row in rows:
        if row.open:
            with suppress(ValueError):
                ids_of[normalize_account_number(row.account_number)].append(row.id)
    if same := [" and ".join(ids) for ids in ids_of.values() if len(ids) > 1]:
        seen = _join_first([f"accounts {ids} are the same account at Tiger" for ids in same])
        advice = "close all but one account: a token refresh ends the tokens of the other accounts"
        return Outcome("problem", seen, advice)
    if old := [row.id for row in rows if row.open and not row.normal]:
        seen = f"account numbers are not normalized in these accounts: {_join_first(old)}"
        advice = "set the account numbers with `crud.accounts.update`, or close the accounts"
        return Outcome("warning", seen, advice)
    exempting = await _fetch_all(connection, _EXEMPTING)
    if exempting and all(row.normal for row in rows):
        return Outcome(
            "warning",
            "all account numbers are normalized, but the CHECK constraint still exempts accounts",
            f"run {exempting[0].alter_table} CHECK (account_number ~ '^({ACCOUNT_NUMBER})$')",
        )
    return Outcome("ok", "all account numbers are normalized")


async def _check_tiger_ids(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find accounts whose Tiger ids an older release of tiger_db stored without normalization."""
    try:
        ring = await asyncio.to_thread(required_key_ring, settings)
    except TigerDBError as error:
        advice = "to check the encrypted Tiger ids, run `tiger-db doctor` with ENCRYPTION_KEYS set"
        return Outcome("warning", f"not checked: {error}", advice)
    async with AsyncSession(connection) as session:
        found = await find_unnormalized_secrets(session, class_mapper(TigerAccount), ring)
    if found.foreign:
        ids = _join_first([*map(str, found.foreign)])
        seen = f"accounts whose secrets do not belong to their row: {ids}"
        advice = (
            "undo changes of account_number, environment, server_url and client_options that were"
            " made with SQL, or set new values for all secrets with `crud.accounts.update`"
        )
        return Outcome("problem", seen, advice)
    if found.normalizable:
        ids = _join_first([*map(str, found.normalizable)])
        seen = f"accounts whose Tiger ids are not normalized: {ids}"
        return Outcome("warning", seen, "run `tiger-db rotate-encryption-key`")
    if found.invalid:
        ids = _join_first([*map(str, found.invalid)])
        seen = f"accounts whose Tiger ids are not printable ASCII: {ids}"
        return Outcome("warning", seen, "set the Tiger ids with `crud.accounts.update`")
    if found.unreadable:
        seen = f"Tiger ids that cannot be decrypted, and were not checked: {found.unreadable:,}"
        return Outcome("warning", seen, "put the missing encryption keys back into ENCRYPTION_KEYS")
    return Outcome("ok", "all Tiger ids are normalized")


async def _check_encryption_keys(connection: AsyncConnection, settings: Settings) -> Outcome:
    try:
        ring = await asyncio.to_thread(required_key_ring, settings)
    except TigerDBError as error:
        return _unusable(error, ENCRYPTION_KEYS)
    async with AsyncSession(connection) as session:
        uses = await list_encryption_key_usage(session)
    seen = ", ".join(
        f"{use.key_id}: {use.rows:,} {'row' if use.rows == 1 else 'rows'} of {use.table}"
        for use in uses
    )
    needed = {use.key_id for use in uses}
    if missing := sorted(needed - {*ring.key_ids}):
        advice = f"to decrypt these rows, put {', '.join(missing)} back into ENCRYPTION_KEYS"
        return Outcome("problem", seen, advice)
    if old := sorted(needed - {ring.key_ids[0]}):
        advice = (
            f"keep {', '.join(old)} in ENCRYPTION_KEYS, and run `tiger-db rotate-encryption-key`"
        )
        return Outcome("warning", seen, advice)
    if unbound := sum(use.unbound for use in uses):
        advice = (
            "to bind these secrets to server_url, environment and account_number, run `tiger-db"
            " rotate-encryption-key`"
        )
        seen = f"{seen}; rows with ciphertexts of version 1: {unbound:,}"
        return Outcome("warning", seen, advice)
    if unmarked := [key_id for key_id in ring.key_ids if key_id not in ring.bound_key_ids]:
        advice = (
            f"append {BOUND_MARK} to {', '.join(unmarked)} in ENCRYPTION_KEYS, when no process of"
            " an earlier release is left. Then, ciphertexts of version 1 are refused"
        )
        return Outcome("warning", seen or "no encryption key is in use", advice)
    return Outcome("ok", seen or "no encryption key is in use")
