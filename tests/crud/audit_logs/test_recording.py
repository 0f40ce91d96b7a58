"""Recording of audit events."""

from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import inspect, text
from sqlalchemy.exc import InvalidRequestError

from tests.support import factories
from tiger_db import Actor, AuditAction, AuditLog, AuditResult, AuditSeverity, Database, Settings
from tiger_db.crud import audit_logs
from tiger_db.crud.audit_logs.recording import build_event
from tiger_db.database import AsyncSession
from tiger_db.errors import AlreadyExists, InvalidValue, StatementRefused

LOGIN = AuditAction.DASHBOARD_LOGIN
NONSENSE: Any = "nonsense"
no_deadline = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
storable_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False).filter(
        lambda x: abs(x) < 2**53  # larger ones are read as integers
    )
    | storable_text,
    lambda inner: st.lists(inner) | st.dictionaries(storable_text, inner),
    max_leaves=10,
)


async def test_an_event_stores_all_given_fields(clone: Database) -> None:
    told: dict[str, Any] = {
        "action": AuditAction.TRADE_PLACE_ORDER,
        "result": AuditResult.PARTIAL,
        "severity": AuditSeverity.CRITICAL,
        "resource_type": "order",
        "resource_id": "1",
        "user_id": "o'brien\" 🐅 --",
        "user_type": "admin",
        "session_id": "s",
        "ip_address": IPv4Address("192.0.2.7"),
        "user_agent": "claude/1.0",
        "request_method": "POST",
        "request_path": "/orders",
        "request_id": "r",
        "tiger_account_id": uuid4(),
        "api_key_id": uuid4(),
        "details": {"quantity": [1, {"a": None}]},
        "old_values": {},
        "new_values": {"a": 1.5},
        "error_code": "E",
        "error_message": "m",
        "duration_ms": 2**40,
        "tags": {"a": True},
    }
    async with clone.session() as session:
        event = await audit_logs.log_event(session, **told)
    async with clone.session() as session:
        (stored,) = await factories.events(session)
    assert stored.model_dump(include=set(told)) == told
    assert (stored.id, stored.created_at) == (event.id, event.created_at)


@pytest.mark.parametrize(
    ("action", "result", "severity"),
    [
        (AuditAction.SECURITY_KEY_LEAK, AuditResult.SUCCESS, AuditSeverity.HIGH),
        (AuditAction.TRADE_PLACE_ORDER, AuditResult.SUCCESS, AuditSeverity.MEDIUM),
        (AuditAction.TRADE_PLACE_ORDER, AuditResult.ERROR, AuditSeverity.HIGH),
        (AuditAction.DATA_QUERY, AuditResult.SUCCESS, AuditSeverity.LOW),
        (AuditAction.DATA_QUERY, AuditResult.FAILURE, AuditSeverity.MEDIUM),
    ],
)
async def test_severity_follows_from_action_and_result_unless_given(
    session: AsyncSession, action: AuditAction, result: AuditResult, severity: AuditSeverity
) -> None:
    assert (await audit_logs.log_event(session, action=action, result=result)).severity == severity
    low = await audit_logs.log_event(session, action=action, severity=AuditSeverity.LOW)
    assert low.severity == AuditSeverity.LOW


@pytest.mark.parametrize(("field", "value"), [("action", "a guess"), ("result", "lost")])
async def test_an_invalid_value_is_named_and_nothing_recorded(
    session: AsyncSession, field: str, value: object
) -> None:
    with pytest.raises(ValidationError, match=field):
        await audit_logs.log_event(session, **({"action": LOGIN} | {field: value}))  # type: ignore[arg-type]  # the point
    assert await factories.events(session) == []


async def test_an_event_with_unstorable_values_is_recorded(session: AsyncSession) -> None:
    bad: dict[str, Any] = {
        "user_id": "x" * 101,
        "request_method": "a\0b" * 9,
        "error_message": "\ud800",
        "ip_address": IPv6Address("fe80::1%eth0"),
        "duration_ms": 2**63,
        "details": {"a\0": float("inf"), "when": datetime.now(UTC), 1: {2**5000, b"\0"}},
        "new_values": {"a": ["\ud800"], "deep": [[[[{"password": "hunter2"}]]]]},
        "tiger_account_id": "not a UUID",
        "tags": {str(n): "x" * 90_000 for n in range(12)},
    }
    event = await audit_logs.log_event(session, action=LOGIN, **bad)
    before = event.model_dump()
    session.expire(event)
    await session.refresh(event)
    stored = event.model_dump()
    assert {**stored, "created_at": None} == {**before, "created_at": None}
    assert {name.split(".")[0] for name in stored["details"]["_made_safe"]} == set(bad)
    assert "hunter2" not in repr(event)


@pytest.mark.slow
@no_deadline
@given(details=st.dictionaries(storable_text, json_values))
async def test_any_json_is_read_as_it_was_recorded(
    session: AsyncSession, details: dict[str, Any]
) -> None:
    event = await audit_logs.log_event(session, action=LOGIN, details=details)
    session.expire(event)
    await session.refresh(event)
    assert event.details == AuditLog(action=LOGIN, details=details).details  # with masked secrets


@pytest.mark.slow
async def test_many_events_are_recorded_at_once(session: AsyncSession) -> None:
    batch = [AuditLog(action=LOGIN, user_id=f"user {n}") for n in range(1100)]
    assert await audit_logs.log_events(session, iter(batch)) == 1100
    assert await session.scalar(text("SELECT count(DISTINCT user_id) FROM audit_logs")) == 1100
    assert await audit_logs.log_events(session, []) == 0


async def test_one_invalid_event_refuses_the_whole_batch(session: AsyncSession) -> None:
    batch: list[Any] = [AuditLog(action=LOGIN), {"action": "dashboard:login"}]
    with pytest.raises(InvalidValue, match="AuditLog"):
        await audit_logs.log_events(session, batch)
    assert await factories.events(session) == []


async def test_an_event_is_recorded_only_once(clone: Database) -> None:
    event = AuditLog(action=LOGIN)
    async with clone.session() as session:
        await audit_logs.log_events(session, [event])
    with pytest.raises(AlreadyExists):
        async with clone.session() as session:
            again = [AuditLog(action=LOGIN), AuditLog(action=LOGIN, id=event.id)]
            await audit_logs.log_events(session, again)
    async with clone.session() as session:
        assert [stored.id for stored in await factories.events(session)] == [event.id]


async def test_a_rolled_back_transaction_leaves_no_events(clone: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await audit_logs.log_event(session, action=LOGIN)
            await audit_logs.log_events(session, [AuditLog(action=LOGIN)])
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.events(session) == []


async def test_a_logged_event_is_a_stored_object_of_the_session(clone: Database) -> None:
    actor = Actor(user_id="alice", ip_address="192.0.2.1")
    async with clone.session(actor=actor) as session:
        event = await audit_logs.log_event(session, action=LOGIN, details={"a": [1]})
        assert inspect(event).persistent
        assert await session.get(AuditLog, event.id) is event
        await session.refresh(event)
        assert (event.user_id, event.ip_address) == ("alice", IPv4Address("192.0.2.1"))
        assert not session.dirty
        with pytest.raises(InvalidRequestError, match="lazy='raise'"):
            _ = event.tiger_account
        savepoint = await session.begin_nested()
        lost = await audit_logs.log_event(session, action=LOGIN)
        await savepoint.rollback()
        assert inspect(lost).transient
        assert inspect(event).persistent
    async with clone.session() as session:
        assert [stored.id for stored in await factories.events(session)] == [event.id]


async def test_a_changed_detail_of_a_logged_event_is_refused(clone: Database) -> None:
    with pytest.raises(StatementRefused, match="append-only"):
        async with clone.session() as session:
            event = await audit_logs.log_event(session, action=LOGIN, details={"a": [1]})
            assert event.details is not None
            event.details["b"] = 2


async def test_the_builder_of_events_and_the_class_give_the_same_event() -> None:
    given: dict[str, Any] = {"action": LOGIN, "details": {"password": "x"}, "user_id": "u" * 200}
    built, made = build_event(**given), AuditLog(**given)
    assert built.model_dump(exclude={"id"}) == made.model_dump(exclude={"id"})
    assert built.model_fields_set == made.model_fields_set
    assert built == built.model_copy()


@pytest.mark.parametrize("pool", [1, 5])
async def test_a_recorded_event_stays_when_the_caller_rolls_back(
    clone_settings: Settings, pool: int
) -> None:
    """This includes a pool of one connection, which the caller holds."""
    few = {"db_pool_size": pool, "db_max_overflow": 0, "db_pool_timeout": 3}
    async with Database(clone_settings.model_copy(update=few)) as database:
        with pytest.raises(ZeroDivisionError):
            async with database.session() as session:
                await audit_logs.log_event(session, action=LOGIN, user_id="lost")
                event = await audit_logs.record_event(session, action=LOGIN, user_id="kept")
                _ = 1 / 0
        async with database.session() as session:
            (stored,) = await factories.events(session)
    assert (stored.id, stored.user_id) == (event.id, "kept")


async def test_without_an_out_of_band_writer_events_are_recorded_in_the_transaction(
    session: AsyncSession,
) -> None:
    event = await audit_logs.record_event(session, action=LOGIN)
    assert (await factories.events(session)) == [event]


# Queries
