"""Every CRUD function under the role of each kind, as docs/roles.md says."""

import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from tests.support import factories
from tests.support.roles import connected_as, documented, granted
from tiger_db import APIKeyScope, AuditAction, Database, MarketPermission, RefreshTrigger, crud
from tiger_db.database import AsyncSession
from tiger_db.errors import PrivilegeMissing
from tiger_db.models import RoleKind
from tiger_db.testing.databases import rolled_back_session

NOW = datetime.now(UTC)
Call = Callable[[AsyncSession, SimpleNamespace], Awaitable[object]]
ACCOUNTS: dict[str, Call] = {
    "add_market_permission": lambda s, x: crud.accounts.add_market_permission(
        s, x.account, MarketPermission.US
    ),
    "close": lambda s, x: crud.accounts.close(s, x.account),
    "counts": lambda s, _: crud.accounts.counts(s),
    "create": lambda s, _: crud.accounts.create(s, factories.new_account()),
    "delete": lambda s, x: crud.accounts.delete(s, x.unused),
    "explain_for_operation": lambda s, _: crud.accounts.explain_for_operation(s),
    "find_for_operation": lambda s, _: crud.accounts.find_for_operation(s),
    "get": lambda s, x: crud.accounts.get(s, x.account, load=["api_keys"]),
    "get_accounts_needing_token_refresh": (
        lambda s, _: crud.accounts.get_accounts_needing_token_refresh(s)
    ),
    "get_by_account_number": lambda s, _: crud.accounts.get_by_account_number(s, "U1"),
    "get_default_data_account": lambda s, _: crud.accounts.get_default_data_account(s),
    "get_default_trading_account": lambda s, _: crud.accounts.get_default_trading_account(s),
    "list_accounts": lambda s, _: crud.accounts.list_accounts(s, count=True, order_by="name"),
    "list_by_tiger_id": lambda s, _: crud.accounts.list_by_tiger_id(s, "20150001"),
    "record_error": lambda s, x: crud.accounts.record_error(s, x.account, message="x"),
    "remove_market_permission": (
        lambda s, x: crud.accounts.remove_market_permission(s, x.account, MarketPermission.US)
    ),
    "reopen": lambda s, x: crud.accounts.reopen(s, x.closed, private_key="x"),
    "reset_errors": lambda s, x: crud.accounts.reset_errors(s, x.account),
    "set_default_data_account": lambda s, x: crud.accounts.set_default_data_account(s, x.account),
    "set_default_trading_account": (
        lambda s, x: crud.accounts.set_default_trading_account(s, x.account)
    ),
    "update": lambda s, x: crud.accounts.update(s, x.account, description="x"),
    "update_tokens": lambda s, x: crud.accounts.update_tokens(s, x.account, access_token="x"),
}
API_KEYS: dict[str, Call] = {
    "activate": lambda s, x: crud.api_keys.activate(s, x.inactive),
    "authorize_api_key": lambda s, x: crud.api_keys.authorize_api_key(s, x.raw_key),
    "create_api_key": lambda s, _: crud.api_keys.create_api_key(
        s, name="x", scopes=[APIKeyScope.MCP_READ]
    ),
    "current_pause": lambda s, _: crud.api_keys.current_pause(s),
    "deactivate": lambda s, x: crud.api_keys.deactivate(s, x.key),
    "delete": lambda s, x: crud.api_keys.delete(s, x.key),
    "find_by_raw_key": lambda s, x: crud.api_keys.find_by_raw_key(s, x.raw_key),
    "get": lambda s, x: crud.api_keys.get(s, x.key),
    "get_by_prefix": lambda s, _: crud.api_keys.get_by_prefix(s, "x"),
    "get_keys_for_account": lambda s, x: crud.api_keys.get_keys_for_account(
        s, x.account, load=["tiger_account"]
    ),
    "is_paused": lambda s, _: crud.api_keys.is_paused(s),
    "limits": lambda s, x: crud.api_keys.limits(s, x.key),
    "list_api_keys": lambda s, _: crud.api_keys.list_api_keys(s, load=["tiger_account"]),
    "list_expiring": lambda s, _: crud.api_keys.list_expiring(s),
    "list_unsigned": lambda s, _: crud.api_keys.list_unsigned(s),
    "pause": lambda s, _: crud.api_keys.pause(s, reason="x"),
    "resume": lambda s, _: crud.api_keys.resume(s),
    "revoke": lambda s, x: crud.api_keys.revoke(s, x.key),
    "rotate": lambda s, x: crud.api_keys.rotate(s, x.key),
    "sign": lambda s, x: crud.api_keys.sign(s, [x.key_row]),
    "update": lambda s, x: crud.api_keys.update(s, x.key, name="y"),
    "usage": lambda s, _: crud.api_keys.usage(s, since=NOW, by=("day", "api_key_id")),
    "verify_api_key": lambda s, x: crud.api_keys.verify_api_key(s, x.raw_key),
}
LEAK = AuditAction.SECURITY_KEY_LEAK
AUDIT_LOGS: dict[str, Call] = {
    "get": lambda s, x: crud.audit_logs.get(s, x.account),
    "get_recent_events": lambda s, _: crud.audit_logs.get_recent_events(s, count=True),
    "get_security_events": lambda s, _: crud.audit_logs.get_security_events(s),
    "log_event": lambda s, _: crud.audit_logs.log_event(s, action=LEAK),
    "log_events": lambda s, _: crud.audit_logs.log_events(
        s, [factories.new_event(), factories.new_event()]
    ),
    "record_event": lambda s, _: crud.audit_logs.record_event(s, action=LEAK),
    "recorded": lambda _, x: record(x.database),
    "search": lambda s, _: crud.audit_logs.search(s, action=LEAK, since=NOW),
    "statistics": lambda s, _: crud.audit_logs.statistics(s, by=("hour", "action"), since=NOW),
}
REFRESHES = crud.token_status
TOKEN_STATUS: dict[str, Call] = {
    "cancel": lambda s, x: REFRESHES.cancel(s, x.pending),
    "claim": lambda s, x: REFRESHES.claim(s, x.pending, worker="w"),
    "claim_due": lambda s, _: REFRESHES.claim_due(s, worker="w"),
    "complete": lambda s, x: REFRESHES.complete(s, x.claim, access_token="y"),
    "create_refresh_operation": lambda s, x: REFRESHES.create_refresh_operation(
        s, tiger_account_id=x.unused, trigger=RefreshTrigger.MANUAL
    ),
    "fail": lambda s, x: REFRESHES.fail(s, x.claim, message="x"),
    "fail_expired_leases": lambda s, _: REFRESHES.fail_expired_leases(s),
    "fail_unknown": lambda s, x: REFRESHES.fail_unknown(s, x.claim),
    "get": lambda s, x: REFRESHES.get(s, x.pending),
    "get_failed_refreshes": lambda s, _: REFRESHES.get_failed_refreshes(s),
    "get_latest_status": lambda s, x: REFRESHES.get_latest_status(s, x.account),
    "get_pending_refreshes": lambda s, _: REFRESHES.get_pending_refreshes(s),
    "give_back": lambda s, x: REFRESHES.give_back(s, x.claim),
    "heartbeat": lambda s, x: REFRESHES.heartbeat(s, x.claim),
    "history": lambda s, _: REFRESHES.history(s, load=["tiger_account"]),
    "next_due": lambda s, _: REFRESHES.next_due(s),
    "overview": lambda s, _: REFRESHES.overview(s, since=NOW),
    "prune": lambda s, _: REFRESHES.prune(s, older_than=timedelta(days=1)),
    "refresh_now": lambda s, x: REFRESHES.refresh_now(s, x.with_token),
    "retry": lambda s, x: REFRESHES.retry(s, x.failed),
    "schedule_due": lambda s, _: REFRESHES.schedule_due(s, within=timedelta(days=1)),
    "statistics": lambda s, _: REFRESHES.statistics(s, since=NOW),
}
FUNCTIONS = {
    f"{module}.{name}": call
    for module, calls in {
        "accounts": ACCOUNTS,
        "api_keys": API_KEYS,
        "audit_logs": AUDIT_LOGS,
        "token_status": TOKEN_STATUS,
    }.items()
    for name, call in calls.items()
}


async def record(database: Database) -> None:
    async with crud.audit_logs.recorded(database, action=AuditAction.DATA_QUERY):
        pass


async def rows_for_calls(session: AsyncSession) -> SimpleNamespace:
    """Store the rows that the calls need."""
    rows = SimpleNamespace()
    made = await factories.account_with_token(session, account_number="U1")
    rows.account, rows.unused = made.id, (await factories.account(session)).id
    rows.with_token = (await factories.account_with_token(session)).id
    rows.closed = (await crud.accounts.close(session, (await factories.account(session)).id)).id
    rows.key_row, rows.raw_key = await factories.api_key(session)
    rows.key, inactive = rows.key_row.id, (await factories.api_key(session))[0]
    rows.inactive = (await crud.api_keys.deactivate(session, inactive.id)).id
    refused = await factories.claim(session, max_retries=1)
    rows.failed = (await REFRESHES.fail(session, refused, message="x")).id
    rows.claim = await factories.claim(session)
    rows.pending = (await factories.refresh(session, made)).id
    return rows


def test_each_crud_function_is_in_the_table() -> None:
    functions = {
        f"{module}.{name}"
        for module in ("accounts", "api_keys", "audit_logs", "token_status")
        for name in getattr(crud, module).__all__
        if inspect.isfunction(getattr(getattr(crud, module), name))
    } - {"token_status.token_hash"}  # a function without a session
    assert {*FUNCTIONS} == {*documented("Functions")} == functions


@pytest.mark.slow
@pytest.mark.parametrize("kind", RoleKind)
async def test_a_role_may_call_the_functions_of_the_table(clone: Database, kind: RoleKind) -> None:
    async with clone.session() as session:
        rows = await rows_for_calls(session)
    allowed = {}
    async with (
        granted(clone.settings, kind) as role,
        Database(connected_as(clone.settings, role)) as rows.database,
    ):
        await rows.database.check()
        for name, call in FUNCTIONS.items():
            allowed[name] = True
            async with rolled_back_session(rows.database) as session:
                try:
                    await call(session, rows)
                    await session.flush()
                except PrivilegeMissing:
                    allowed[name] = False
    assert allowed == {name: kinds[kind] for name, kinds in documented("Functions").items()}
