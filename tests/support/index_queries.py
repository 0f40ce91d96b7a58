"""The queries that use each index: for tests/crud/test_indexes.py and docs/schema.md."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tiger_db import RefreshTrigger
from tiger_db.audit.storage import SELECT_LAST_SEAL, select_events
from tiger_db.crud import accounts, api_keys, audit_logs, token_status
from tiger_db.crud.accounts.queries import ACCOUNTS
from tiger_db.crud.api_keys.queries import API_KEYS, EXPIRING_API_KEYS
from tiger_db.crud.api_keys.rate_limits import CONSUME
from tiger_db.crud.pagination import EntityList, encode_cursor
from tiger_db.crud.token_status.queries import REFRESHES
from tiger_db.database import AsyncSession
from tiger_db.migrations.roles import FORGET

NOW = datetime.now(UTC)
OLD = NOW - datetime(2024, 6, 24, tzinfo=UTC)  # longer ago than the time in any id of `id_of`


def id_of(n: int) -> UUID:
    """Return the id of row n in the tables of test_indexes.py."""
    return UUID(f"0190a000-0000-7000-8000-{n:012}")


def cursor_of(n: int, listed: EntityList[Any], **filters: object) -> str:
    return encode_cursor(listed, id_of(n), filters=filters)


@dataclass(frozen=True)
class Call:
    """A call of a CRUD function, or of another function whose docstring describes its query."""

    function: Callable[..., Awaitable[object]]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self, session: AsyncSession) -> Awaitable[object]:
        return self.function(session, *self.arguments, **self.keywords)

    def __str__(self) -> str:
        """Return the call as text, with its optional keywords."""
        package, _, module = self.function.__module__.partition("tiger_db.")
        if package:
            return inspect.getdoc(self.function) or self.function.__name__
        parameters = inspect.signature(self.function).parameters
        given = [
            name
            for name in self.keywords
            if name not in parameters or parameters[name].default is not inspect._empty
        ]
        name = ".".join([*module.split(".")[:2], self.function.__name__])
        return f"`{name}({', '.join(f'{keyword}=…' for keyword in given)})`"


def asks(
    function: Callable[..., Awaitable[object]], *arguments: object, **keywords: object
) -> Call:
    """Build the call of a function whose first argument is the session."""
    return Call(function, arguments, keywords)


async def limited_use(session: AsyncSession) -> None:
    """A use of a limited API key."""
    connection = await session.connection()
    await connection.exec_driver_sql(CONSUME, (id_of(77), 9, 9))


async def events_to_seal(session: AsyncSession) -> None:
    """The events of a seal."""
    connection = await session.connection()
    await connection.exec_driver_sql(select_events(25_000, 25_100))


async def newest_seal(session: AsyncSession) -> None:
    """The newest seal."""
    connection = await session.connection()
    await connection.exec_driver_sql(SELECT_LAST_SEAL)


async def forgotten_role(session: AsyncSession) -> None:
    """A role whose grants are revoked."""
    connection = await session.connection()
    await connection.exec_driver_sql(FORGET, ("77",))


SERVES: list[tuple[str, Call]] = [
    ("pk_tiger_accounts", asks(accounts.get, id_of(77))),
    ("pk_tiger_accounts", asks(accounts.list_accounts, after=cursor_of(77, ACCOUNTS))),
    ("uq_tiger_accounts_account_number", asks(accounts.get_by_account_number, "U77")),
    ("ix_tiger_accounts_tiger_id_fingerprint", asks(accounts.list_by_tiger_id, "77")),
    ("uq_tiger_accounts_is_default_trading", asks(accounts.get_default_trading_account)),
    ("uq_tiger_accounts_is_default_data", asks(accounts.get_default_data_account)),
    ("uq_tiger_accounts_is_default_data", asks(accounts.set_default_data_account, id_of(77))),
    ("ix_tiger_accounts_token_refresh_at", asks(accounts.get_accounts_needing_token_refresh)),
    (
        "ix_tiger_accounts_token_refresh_at",
        asks(token_status.schedule_due, within=timedelta(hours=1)),
    ),
    ("ix_tiger_accounts_token_refresh_at", asks(token_status.schedule_due)),
    ("ix_tiger_accounts_token_refresh_at", asks(token_status.next_due)),
    ("pk_api_keys", asks(api_keys.get, id_of(77))),
    ("pk_api_keys", asks(api_keys.list_api_keys, after=cursor_of(77, API_KEYS))),
    ("uq_api_keys_key_prefix", asks(api_keys.get_by_prefix, f"tdb_test_{77:012}")),
    (
        "ix_api_keys_tiger_account_id_id",
        asks(
            api_keys.get_keys_for_account,
            id_of(77),
            after=cursor_of(10**9, API_KEYS, account_id=id_of(77)),
        ),
    ),
    ("ix_api_keys_expires_at_id", asks(api_keys.list_expiring)),
    (
        "ix_api_keys_expires_at_id",
        asks(
            api_keys.list_expiring,
            after=encode_cursor(EXPIRING_API_KEYS, id_of(77), NOW, order_by="expiry"),
        ),
    ),
    ("pk_api_key_limits", asks(limited_use)),
    ("pk_api_key_usage", asks(api_keys.usage, id_of(77), since=NOW - timedelta(hours=3))),
    ("pk_trading_pauses", asks(api_keys.pause, reason="stop")),
    ("pk_token_statuses", asks(token_status.get, id_of(77))),
    ("pk_token_statuses", asks(token_status.history, after=cursor_of(777, REFRESHES))),
    ("pk_token_statuses", asks(token_status.statistics, since=NOW)),
    ("pk_token_statuses", asks(token_status.claim, id_of(200), worker="w")),
    ("pk_token_statuses", asks(token_status.prune, older_than=OLD)),
    (
        "uq_token_statuses_tiger_account_id_open",
        asks(
            token_status.create_refresh_operation,
            tiger_account_id=id_of(9999),
            trigger=RefreshTrigger.MANUAL,
        ),
    ),
    ("uq_token_statuses_tiger_account_id_open", asks(token_status.refresh_now, id_of(9999))),
    ("uq_token_statuses_tiger_account_id_open", asks(token_status.schedule_due)),
    ("ix_token_statuses_due", asks(token_status.claim_due, worker="w")),
    ("ix_token_statuses_due", asks(token_status.fail_expired_leases)),
    ("ix_token_statuses_due", asks(token_status.next_due)),
    ("ix_token_statuses_due", asks(token_status.overview, since=NOW)),
    (
        "ix_token_statuses_due",
        asks(token_status.get_pending_refreshes, order_by="schedule"),
    ),
    ("ix_token_statuses_tiger_account_id_id", asks(token_status.history, account_id=id_of(77))),
    ("ix_token_statuses_tiger_account_id_id", asks(token_status.get_latest_status, id_of(77))),
    (
        "ix_token_statuses_tiger_account_id_id",
        asks(token_status.statistics, since=NOW - OLD, account_id=id_of(77)),
    ),
    ("ix_token_statuses_tiger_account_id_id", asks(token_status.schedule_due)),
    ("ix_token_statuses_failed", asks(token_status.get_failed_refreshes)),
    ("ix_token_statuses_failed", asks(token_status.history, status="failed")),
    ("ix_token_statuses_failed", asks(token_status.overview, since=NOW)),
    ("pk_audit_logs", asks(audit_logs.get_recent_events)),
    ("ix_audit_logs_tiger_account_id_id", asks(audit_logs.search, account_id=id_of(77))),
    ("ix_audit_logs_api_key_id_id", asks(audit_logs.search, api_key_id=id_of(77))),
    ("ix_audit_logs_user_id_id", asks(audit_logs.search, user_id="77")),
    ("ix_audit_logs_session_id", asks(audit_logs.search, session_id="s77")),
    ("ix_audit_logs_request_id_id", asks(audit_logs.search, request_id="r77")),
    ("ix_audit_logs_position", asks(events_to_seal)),
    ("pk_audit_seals", asks(newest_seal)),
    ("pk_granted_roles", asks(forgotten_role)),
]
