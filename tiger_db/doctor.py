"""Checks of an installation of tiger_db, with advice on each warning and problem.

Every check runs in its own transaction, with short timeouts. If a check raises an error, the result
of the check is a warning, and the other checks still run. The checks read large tables through
indexes only. Some checks scan the small tables `tiger_accounts` and `api_keys`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.checks import Outcome, Status, accounts, database, keys, trail
from tiger_db.connections import connect, maintenance_engine
from tiger_db.connections.error_advice import explain
from tiger_db.errors import Conflict, QueryTimeout, StatementRefused, TigerDBError
from tiger_db.migrations import SEARCH_PATH, SearchPath
from tiger_db.settings import Settings, quote_identifier
from tiger_db.sqlstates import PRIVILEGE_ADVICE

_TIMEOUTS = text(
    "SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '1s', true)"
)


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
        "invalid indexes": database.check_indexes,
        "collations": database.check_collations,
        "Citus": database.check_citus,
        "schema": database.check_schema,
        "triggers and functions": database.check_triggers,
        "database roles": partial(database.check_roles, settings=settings),
        "audit partitions": database.check_partitions,
        "unsealed events": trail.check_unsealed,
        "audit checkpoints": partial(trail.check_checkpoints, settings=settings),
        "refreshes": accounts.check_refreshes,
        "tokens": accounts.check_tokens,
        "accounts": accounts.check_accounts,
        "trading": accounts.check_trading,
        "API keys": keys.check_api_keys,
        "API key hashes": partial(keys.check_hashes, settings=settings),
        "API key peppers": keys.unless_unreadable("api_keys", keys.check_peppers, settings),
        "API key codes": keys.unless_unreadable("api_keys", keys.check_codes, settings),
        "account numbers": accounts.check_account_numbers,
        "readable rows": database.check_readable_rows,
        "encryption keys": keys.unless_unreadable(
            "tiger_accounts", keys.check_encryption_keys, settings
        ),
        "Tiger ids": keys.unless_unreadable("tiger_accounts", keys.check_tiger_ids, settings),
    }


async def _run_check(connection: AsyncConnection, name: str, check: Check) -> CheckResult:
    """Run a check. If the check raises an error, return a warning with the error's reason."""
    try:
        async with connection.begin():
            await connection.execute(_TIMEOUTS)
            return CheckResult(name, *await check(connection))
    except (DBAPIError, Conflict, QueryTimeout, StatementRefused) as error:
        seen = f"not checked: {explain(error)}"
        advice = "see `tiger-db check`"
        if isinstance(error, Conflict | QueryTimeout):
            advice = (
                "run `tiger-db doctor` again; `pg_stat_activity` shows sessions that hold locks"
            )
        elif seen.endswith(PRIVILEGE_ADVICE):
            seen, advice = seen.removesuffix(f": {PRIVILEGE_ADVICE}"), PRIVILEGE_ADVICE
        return CheckResult(name, "warning", seen, advice)


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
