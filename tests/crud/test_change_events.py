"""Each flushed change of an account or API key is recorded by one audit event."""

import subprocess
import sys
from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import SAWarning
from sqlalchemy.ext.asyncio import AsyncSession as PlainAsyncSession
from sqlalchemy.orm import Session
from sqlmodel import col

from tests.support import factories
from tests.support.contexts import change_context
from tests.support.recording import recorded
from tiger_db import (
    AccountStatus,
    Actor,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    AuditLog,
    Database,
    MarketPermission,
    TigerAccount,
    TigerEnvironment,
    acting_as,
)
from tiger_db.crud import accounts, api_keys
from tiger_db.crud.change_events import apply_change
from tiger_db.crud.common import fetch_one
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidState
from tiger_db.redaction import MASK

ALICE = Actor(user_id="alice", user_type="admin")
A = AuditAction


async def new_events(session: AsyncSession, before: list[AuditLog]) -> list[AuditLog]:
    return (await factories.events(session))[len(before) :]


async def only_event(session: AsyncSession, before: list[AuditLog]) -> AuditLog:
    """Flush the session, and return the only event since `before`."""
    await session.flush()
    (event,) = await new_events(session, before)
    return event


def new_key(number: int = 0, **overrides: Any) -> APIKey:
    values = {"name": "n", "scopes": ["mcp:read"], "key_prefix": f"p{number}", "key_hash": "hash"}
    return APIKey(**values | overrides)


# Assignments


async def test_assignments_to_an_account_are_recorded_with_old_and_new_values(
    session: AsyncSession,
) -> None:
    account = await factories.account(session, description="old")
    before = await factories.events(session)
    account.description = "new"
    account.environment = TigerEnvironment.SANDBOX
    event = await only_event(session, before)
    assert (event.action, event.result) == (A.ACCOUNT_UPDATE, "success")
    assert (event.resource_type, event.resource_id) == ("tiger_account", str(account.id))
    assert event.tiger_account_id == account.id
    assert event.old_values == {"description": "old", "environment": "PROD"}
    assert event.new_values == {"description": "new", "environment": "SANDBOX"}


async def test_an_assigned_status_has_the_action_of_the_change(session: AsyncSession) -> None:
    account = await factories.account(session)
    key, _ = await factories.api_key(session, tiger_account_id=account.id)
    before = await factories.events(session)
    account.status = AccountStatus.SUSPENDED
    await session.flush()
    key.status = APIKeyStatus.INACTIVE
    await session.flush()
    key.status = APIKeyStatus.REVOKED
    await session.flush()
    events = await new_events(session, before)
    assert [(e.action, e.old_values, e.new_values) for e in events] == [
        (A.ACCOUNT_STATUS_CHANGE, {"status": "active"}, {"status": "suspended"}),
        (A.API_KEY_UPDATE, {"status": "active"}, {"status": "inactive"}),
        (A.API_KEY_REVOKE, {"status": "inactive"}, {"status": "revoked"}),
    ]
    assert [(e.api_key_id, e.tiger_account_id) for e in events[1:]] == [(key.id, account.id)] * 2


async def test_a_column_that_a_trigger_changes_with_the_status_is_listed(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    change_context(session, suspend_after=1)
    await accounts.record_error(session, account.id, message="no answer")
    before = await factories.events(session)
    account.status = AccountStatus.ACTIVE
    event = await only_event(session, before)
    assert event.old_values == {"status": "suspended", "auto_suspended": True}
    assert event.new_values == {"status": "active", "auto_suspended": False}


async def test_a_changed_secret_is_listed_and_masked(session: AsyncSession) -> None:
    account = await factories.account(session, secret_key="first-secret-key")
    before = await factories.events(session)
    account.sqlmodel_update({"secret_key": "second-secret-key", "access_token": "a-token"})
    event = await only_event(session, before)
    assert event.old_values == {"secret_key": MASK, "access_token": None}
    assert event.new_values == {"secret_key": MASK, "access_token": MASK}


async def test_a_changed_hash_of_a_key_is_listed_and_masked(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    before = await factories.events(session)
    key.key_hash = "another hash"
    event = await only_event(session, before)
    assert event.action == A.API_KEY_UPDATE
    assert event.old_values == event.new_values == {"key_hash": MASK}


# Old values that the session has not loaded


@pytest.mark.parametrize(
    ("change", "name", "old", "new"),
    [
        (lambda key: key.tags.update(desk="B"), "tags", {"desk": "A"}, {"desk": "B"}),
        (
            lambda key: key.scopes.append("trade:read"),
            "scopes",
            ["mcp:read"],
            ["mcp:read", "trade:read"],
        ),
        (
            lambda key: key.allowed_ips.append(ip_network("10.1.0.0/16")),
            "allowed_ips",
            ["10.0.0.0/8"],
            ["10.0.0.0/8", "10.1.0.0/16"],
        ),
    ],
)
async def test_changes_in_place_are_recorded_with_old_and_new_values(
    session: AsyncSession, change: Callable[[APIKey], object], name: str, old: object, new: object
) -> None:
    key, _ = await factories.api_key(session, tags={"desk": "A"}, allowed_ips=["10.0.0.0/8"])
    before = await factories.events(session)
    change(key)
    event = await only_event(session, before)
    assert (event.old_values, event.new_values) == ({name: old}, {name: new})


async def _assign(session: AsyncSession, key: APIKey) -> None:
    key.tags = {"on": True}
    await session.flush()


async def _change_in_place(session: AsyncSession, key: APIKey) -> None:
    key.tags["on"] = True
    await session.flush()


async def _update(session: AsyncSession, key: APIKey) -> None:
    await api_keys.update(session, key.id, tags={"on": True})


@pytest.mark.parametrize("change", [_assign, _change_in_place, _update])
async def test_a_change_between_json_values_that_only_python_finds_equal_is_saved_and_recorded(
    session: AsyncSession, change: Callable[[AsyncSession, APIKey], Awaitable[None]]
) -> None:
    key, _ = await factories.api_key(session, tags={"on": 1})
    before = await factories.events(session)
    await change(session, key)
    (event,) = await new_events(session, before)
    assert (
        repr((event.old_values, event.new_values))
        == "({'tags': {'on': 1}}, {'tags': {'on': True}})"
    )
    stored = await session.scalar(
        text("SELECT tags::text FROM api_keys WHERE id = :id"), {"id": key.id}
    )
    assert stored == '{"on": true}'


async def test_a_change_of_a_list_of_an_account_in_place_is_recorded(session: AsyncSession) -> None:
    account = await factories.account(session, market_permissions=["US"])
    before = await factories.events(session)
    account.market_permissions.append(MarketPermission.HK)
    account.quote_permissions.append({"name": "hk", "expire_at": -1})
    event = await only_event(session, before)
    assert event.old_values == {"market_permissions": ["US"], "quote_permissions": []}
    assert event.new_values == {
        "market_permissions": ["US", "HK"],
        "quote_permissions": [{"name": "hk", "expire_at": -1}],
    }


async def test_old_values_of_expired_objects_are_read_from_the_database(
    session: AsyncSession,
) -> None:
    account = await factories.account(session, description="old", secret_key="one")
    before = await factories.events(session)
    session.expire(account)
    account.sqlmodel_update({"description": "new", "secret_key": "one"})
    event = await only_event(session, before)
    assert (event.old_values, event.new_values) == ({"description": "old"}, {"description": "new"})


async def test_old_values_are_those_of_the_row_and_not_those_that_were_loaded(
    clone: Database,
) -> None:
    async with clone.session() as session:
        account = await factories.account(session, description="old")
        key, _ = await factories.api_key(session)
        before = await factories.events(session)
    async with clone.session() as session:
        await accounts.update(session, account.id, description="newer")
        await session.execute(delete(APIKey.__table__))  # type: ignore[attr-defined]
    async with clone.session() as session:
        session.add_all([account, key])
        account.description = "newest"
        await session.flush()
        await session.delete(key)
        with pytest.warns(SAWarning, match="expected to delete 1 row"):
            await session.flush()
        _, event = await new_events(session, before)
    assert (event.action, event.old_values) == (A.ACCOUNT_UPDATE, {"description": "newer"})


# Inserts and deletions


async def test_inserted_rows_are_recorded_with_all_values(session: AsyncSession) -> None:
    before = await factories.events(session)
    account = factories.new_account(tags={"desk": "A"})
    key = new_key(tiger_account_id=account.id)
    session.add_all([key, account])
    await session.flush()
    created, key_created = await new_events(session, before)
    assert (created.action, created.old_values) == (A.ACCOUNT_CREATE, None)
    assert created.new_values is not None
    assert created.new_values["private_key"] == MASK
    assert created.new_values["tags"] == {"desk": "A"}
    left_out = {"created_at", "updated_at", "token_refresh_at"}
    assert created.new_values.keys() == TigerAccount.model_fields.keys() - left_out
    assert (key_created.action, key_created.api_key_id) == (A.API_KEY_CREATE, key.id)
    assert key_created.new_values is not None
    assert key_created.new_values["scopes"] == ["mcp:read"]
    left_out |= {"key_hash", "pepper_id", "mac", "mac_denied_at"}
    assert key_created.new_values.keys() == APIKey.model_fields.keys() - left_out


@pytest.mark.parametrize("expired", [False, True])
async def test_deleted_rows_are_recorded_with_their_last_values(
    session: AsyncSession, expired: bool
) -> None:
    account = await factories.account(session, tags={"desk": "A"})
    key, _ = await factories.api_key(session, allowed_ips=["10.0.0.0/8"])
    before = await factories.events(session)
    account_id, key_id = account.id, key.id
    if expired:
        session.expire_all()
    else:
        account.tags["desk"] = "B"  # the stored value counts
        key.name = "renamed"
    with session.no_autoflush:
        await session.delete(account)
        await session.delete(key)
        await session.flush()
    events = {event.action: event for event in await new_events(session, before)}
    assert events.keys() == {A.ACCOUNT_DELETE, A.API_KEY_DELETE}
    assert events[A.ACCOUNT_DELETE].tiger_account_id == account_id
    assert events[A.API_KEY_DELETE].api_key_id == key_id
    old = events[A.ACCOUNT_DELETE].old_values or {}
    assert (old["tags"], old["private_key"]) == ({"desk": "A"}, MASK)
    old = events[A.API_KEY_DELETE].old_values or {}
    assert (old["name"], old["allowed_ips"]) == ("assistant", ["10.0.0.0/8"])
    assert "key_hash" not in old


async def test_a_new_id_is_recorded_with_the_old_one(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    before, old_id = await factories.events(session), key.id
    key.id, key.scopes = uuid4(), [APIKeyScope.TRADE_ADMIN]
    event = await only_event(session, before)
    assert event.api_key_id == key.id
    assert event.old_values == {"id": str(old_id), "scopes": ["mcp:read"]}
    assert event.new_values == {"id": str(key.id), "scopes": ["trade:admin"]}


# One event for each change


async def test_a_function_and_the_hook_record_one_event(session: AsyncSession) -> None:
    account = await factories.account(session)
    key, _ = await factories.api_key(session, tiger_account_id=account.id)
    await accounts.update(session, account.id, description="new")
    await accounts.update_tokens(session, account.id, access_token="a")
    change_context(session, suspend_after=1)
    await accounts.record_error(session, account.id, message="no answer")
    await accounts.reset_errors(session, account.id)
    await accounts.set_default_trading_account(session, account.id)
    await api_keys.revoke(session, key.id)
    await accounts.close(session, account.id)
    await accounts.reopen(session, account.id, private_key="new_key")
    assert [event.action for event in await factories.events(session)] == [
        A.ACCOUNT_CREATE,
        A.API_KEY_CREATE,
        A.ACCOUNT_UPDATE,
        A.TOKEN_UPDATE,
        A.ACCOUNT_ERROR,
        A.ACCOUNT_STATUS_CHANGE,
        A.ACCOUNT_RESET_ERRORS,
        A.ACCOUNT_SET_DEFAULT,
        A.API_KEY_REVOKE,
        A.ACCOUNT_CLOSE,
        A.ACCOUNT_REOPEN,
    ]


async def test_an_assignment_before_a_function_has_an_event_of_its_own(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    before = await factories.events(session)
    account.description = "assigned"
    await accounts.update(session, account.id, tags={"desk": "A"})
    events = await new_events(session, before)
    assert [event.new_values for event in events] == [
        {"description": "assigned"},
        {"tags": {"desk": "A"}},
    ]


async def test_a_change_that_changes_nothing_records_no_event(
    database: Database, session: AsyncSession
) -> None:
    account = await factories.account(
        session,
        tags={"desk": "A"},
        description="d",
        secret_key="s",
        access_token="t",
    )
    key, _ = await factories.api_key(session)
    before = await factories.events(session)
    with recorded(database) as statements:
        account.sqlmodel_update(
            {"tags": {"desk": "A"}, "description": "d", "private_key": "test_key"}
        )
        key.scopes = [APIKeyScope.MCP_READ]
        await session.flush()
        await accounts.update(session, account.id, description="d", secret_key="s")
        await accounts.update_tokens(session, account.id, access_token="t")
    assert not [sent for sent in statements if sent.startswith(("UPDATE", "INSERT"))]
    account.tags["desk"] = "B"
    account.tags["desk"] = "A"
    await session.flush()
    assert await new_events(session, before) == []


async def test_the_description_of_a_failed_change_does_not_stay(session: AsyncSession) -> None:
    account = await factories.account(session)
    other = await factories.account(session)
    with pytest.raises(Exception, match="account_number"):
        await accounts.update(session, account.id, account_number=other.account_number)
    before = await factories.events(session)
    account.description = "new"
    event = await only_event(session, before)
    assert (event.action, event.old_values) == (A.ACCOUNT_UPDATE, {"description": None})


async def test_a_function_can_add_fields_to_the_event(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    before = await factories.events(session)
    await apply_change(
        session, key, {"name": "new"}, action="desk:rename", details={"reason": "moved"}
    )
    event = await only_event(session, before)
    assert (event.action, event.details) == ("desk:rename", {"reason": "moved"})
    assert (event.old_values, event.new_values) == ({"name": "assistant"}, {"name": "new"})


@pytest.mark.slow
async def test_each_of_many_changes_in_one_flush_has_an_event(session: AsyncSession) -> None:
    before = await factories.events(session)
    keys = [new_key(number) for number in range(300)]
    session.add_all(keys)
    await session.flush()
    created = await new_events(session, before)
    assert {e.api_key_id for e in created if e.action == A.API_KEY_CREATE} == {k.id for k in keys}
    before = await factories.events(session)
    for number, key in enumerate(keys[:3]):
        key.name = f"name {number}"
    await session.delete(keys[3])
    await session.flush()
    events = await new_events(session, before)
    assert [e.new_values and e.new_values["name"] for e in events] == [
        "name 0", "name 1", "name 2", None,
    ]  # fmt: skip


# Transactions and actors


async def test_a_rollback_to_a_savepoint_removes_the_event_with_the_change(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    before = await factories.events(session)
    savepoint = await session.begin_nested()
    account.description = "new"
    await session.flush()
    assert len(await new_events(session, before)) == 1
    await savepoint.rollback()
    assert await new_events(session, before) == []


async def test_events_at_commit_have_the_actor_in_force(clone: Database) -> None:
    async with clone.session() as session:
        first = await factories.account(session)
        second, _ = await factories.api_key(session)
    async with clone.session(actor=ALICE) as session:
        session.add(first)
        first.description = "new"
    with acting_as(Actor(user_id="bob")):
        async with clone.session() as session:
            session.add(second)
            second.name = "new"
    async with clone.session() as session:
        session.add(first)
        first.description = "newer"
    async with clone.session() as session:
        events = await factories.events(session)
    assert [(e.user_id, e.user_type) for e in events[2:]] == [
        ("alice", "admin"),
        ("bob", None),
        (None, "unattributed"),
    ]


async def test_changes_in_sessions_that_an_application_makes_are_recorded(clone: Database) -> None:
    async with PlainAsyncSession(clone.engine) as session, session.begin():
        session.add(key := new_key())
        key_id = key.id
    async with PlainAsyncSession(clone.engine) as session, session.begin():
        (read,) = await session.scalars(select(APIKey))
        read.name = "new"
        with pytest.raises(InvalidState, match=r"crud\.api_keys\.delete"):
            await session.execute(delete(APIKey))
    async with clone.session() as mine:
        created, changed = await factories.events(mine)
    assert [created.action, changed.action] == [A.API_KEY_CREATE, A.API_KEY_UPDATE]
    assert changed.api_key_id == key_id
    assert (changed.old_values, changed.user_type) == ({"name": "n"}, "unattributed")


@pytest.mark.parametrize("name", ["APIKey", "TigerAccount"])
@pytest.mark.slow
def test_the_import_of_an_entity_starts_the_recording(name: str) -> None:
    code = (
        f"import sys, tiger_db; tiger_db.{name}; assert {apply_change.__module__!r} in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Bulk statements


@pytest.mark.parametrize(
    ("statement", "parameters", "function"),
    [
        (update(APIKey).values(name="x"), None, "api_keys.update"),
        (update(APIKey).values(name="x").returning(APIKey), None, "api_keys.update"),
        (delete(APIKey), None, "api_keys.delete"),
        (delete(APIKey).where(col(APIKey.name) == "x"), None, "api_keys.delete"),
        (insert(APIKey), [{"name": "x"}], "api_keys.create_api_key"),
        (insert(APIKey).returning(APIKey), [{"name": "x"}], "api_keys.create_api_key"),
        (update(TigerAccount).values(description="x"), None, "accounts.update"),
        (delete(TigerAccount), None, "accounts.delete"),
        (insert(TigerAccount), [{"description": "x"}], "accounts.create"),
        (
            select(APIKey).from_statement(update(APIKey).values(name="x").returning(APIKey)),
            None,
            "api_keys.update",
        ),
    ],
)
async def test_a_bulk_statement_is_refused_with_the_name_of_the_function(
    session: AsyncSession, statement: Any, parameters: Any, function: str
) -> None:
    await factories.account(session)
    await factories.api_key(session)
    before = await factories.everything(session)
    with pytest.raises(InvalidState, match=rf"use crud\.{function}$"):
        await session.execute(statement, parameters)
    assert await factories.everything(session) == before


@pytest.mark.parametrize("kind", ["update", "delete"])
async def test_bulk_statements_of_a_query_are_refused(session: AsyncSession, kind: str) -> None:
    def run(sync: Session) -> None:
        query = Session.query(sync, APIKey)  # SQLModel deprecates its own method
        query.update({"name": "x"}) if kind == "update" else query.delete()

    with pytest.raises(InvalidState, match=rf"crud\.api_keys\.{kind}"):
        await session.run_sync(run)


async def test_statements_on_the_table_and_plain_sql_are_possible(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    await session.execute(update(APIKey.__table__).values(name="core"))  # type: ignore[attr-defined]
    await session.execute(text("UPDATE api_keys SET description = 'sql'"))
    await session.refresh(key)
    assert (key.name, key.description) == ("core", "sql")
    assert await fetch_one(session, select(APIKey)) is key
