"""`recorded` stores the intent of an action before it, and the outcome after it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from tests.support.command_line import SECRETS
from tiger_db import (
    Actor,
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
    Database,
    Settings,
    acting_as,
    crud,
    get_session,
)
from tiger_db.actor import ACTOR_FIELDS
from tiger_db.crud.audit_logs import recorded
from tiger_db.database import AsyncSession
from tiger_db.errors import DatabaseUnavailable, InvalidValue, OutcomeUnknown

PLACE = AuditAction.TRADE_PLACE_ORDER
ALICE = Actor(user_id="alice", ip_address="10.0.0.1", request_id="r1")


async def trail(database: Database) -> list[AuditLog]:
    """Return all events, the oldest first."""
    async with database.session() as session:
        return list(reversed(list(await crud.audit_logs.search(session, limit=1000))))


async def pair(database: Database) -> tuple[AuditLog, AuditLog]:
    """Return the only two events, after a check of what links them."""
    intent, outcome = await trail(database)
    assert intent.result == AuditResult.PENDING
    assert intent.duration_ms is None
    assert outcome.request_id == intent.request_id is not None
    assert (outcome.details or {})["_intent"] == str(intent.id)
    assert outcome.duration_ms is not None
    return intent, outcome


async def test_the_intent_is_stored_before_the_action_and_the_outcome_after_it(
    clone: Database,
) -> None:
    order = {"symbol": "AAPL", "quantity": 100, "token": "abc"}
    async with recorded(clone, action=PLACE, resource_type="order", details=order) as event:
        (intent,) = await trail(clone)
        assert intent.result == AuditResult.PENDING
        assert intent.details == order | {"token": "**********"}
        event.resource_id = "31318"
        event.details = {"filled": 100}
        await asyncio.sleep(0.02)
    intent, outcome = await pair(clone)
    assert outcome.id == event.id
    assert (outcome.result, outcome.severity) == (AuditResult.SUCCESS, AuditSeverity.MEDIUM)
    assert (outcome.action, outcome.resource_type) == (PLACE, "order")
    assert (intent.resource_id, outcome.resource_id) == (None, "31318")
    assert outcome.details == {"_intent": str(intent.id), "filled": 100}
    assert outcome.duration_ms is not None
    assert 20 <= outcome.duration_ms < 20_000
    assert outcome.error_code is outcome.error_message is None


async def test_without_changes_the_outcome_has_the_fields_of_the_intent(clone: Database) -> None:
    given: dict[str, Any] = {"details": {"symbol": "AAPL"}, "tags": {"desk": "A"}}
    async with recorded(clone, action=PLACE, severity=AuditSeverity.LOW, **given):
        pass
    intent, outcome = await pair(clone)
    own = {"id", "created_at", "position", "result", "duration_ms", "details"}
    assert outcome.model_dump(exclude=own) == intent.model_dump(exclude=own)
    assert outcome.severity == AuditSeverity.LOW
    assert outcome.details == {"symbol": "AAPL", "_intent": str(intent.id)}


async def test_an_exception_is_an_error_and_is_raised(clone: Database) -> None:
    with pytest.raises(ConnectionError, match="no answer"):
        async with recorded(clone, action=PLACE):
            raise ConnectionError("no answer, password=hunter2")
    _, outcome = await pair(clone)
    assert (outcome.result, outcome.severity) == (AuditResult.ERROR, AuditSeverity.HIGH)
    assert outcome.error_code == "ConnectionError"
    assert outcome.error_message is not None
    assert outcome.error_message.startswith("no answer")
    assert "hunter2" not in outcome.error_message


async def test_an_exception_without_a_message_is_recorded(clone: Database) -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    with pytest.raises(BrokenError):
        async with recorded(clone, action=PLACE):
            raise BrokenError
    assert (await pair(clone))[1].error_message == "BrokenError"


async def test_fields_that_the_block_sets_stay(clone: Database) -> None:
    with pytest.raises(ValueError, match="rejected"):
        async with recorded(clone, action=PLACE) as event:
            event.result = AuditResult.FAILURE
            event.severity = AuditSeverity.CRITICAL
            event.error_code, event.error_message = "1200", "no buying power"
            event.duration_ms = 7
            raise ValueError("rejected")
    _, outcome = await pair(clone)
    assert (outcome.result, outcome.severity) == (AuditResult.FAILURE, AuditSeverity.CRITICAL)
    assert (outcome.error_code, outcome.error_message) == ("1200", "no buying power")
    assert outcome.duration_ms == 7


async def test_the_severity_follows_the_result(clone: Database) -> None:
    async with recorded(clone, action=PLACE) as event:
        event.result = AuditResult.FAILURE
    assert (await pair(clone))[1].severity == AuditSeverity.HIGH


@pytest.mark.parametrize("scope", ["asyncio", "anyio"])
async def test_a_cancelled_action_is_recorded(clone: Database, scope: str) -> None:
    """An anyio scope cancels every `await`, also those that store the outcome."""
    if scope == "asyncio":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as timeout, recorded(clone, action=PLACE):
                timeout.reschedule(0)
                await asyncio.sleep(30)
    else:
        with anyio.CancelScope() as cancelling:
            async with recorded(clone, action=PLACE):
                cancelling.cancel()
                await anyio.sleep(30)
        assert cancelling.cancelled_caught
    async with Database(clone.settings) as other:
        async with asyncio.timeout(30):
            while len(await trail(other)) < 2:  # noqa: ASYNC110  # the writer stores it soon
                await asyncio.sleep(0.01)
    _, outcome = await pair(clone)
    assert (outcome.result, outcome.error_code) == (AuditResult.ERROR, "CancelledError")
    assert outcome.error_message == "cancelled: the action may have been done"


async def test_an_action_that_is_cancelled_before_it_began_is_not_left_pending(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, storing, begun = clone.out_of_band.record, asyncio.Event(), False

    async def slowly(event: AuditLog, actor: Actor | None = None) -> None:
        await record(event, actor)
        if event.result == AuditResult.PENDING:
            storing.set()
            await asyncio.Event().wait()

    async def act() -> None:
        nonlocal begun
        async with recorded(clone, action=PLACE):
            begun = True

    monkeypatch.setattr(clone.out_of_band, "record", slowly)
    task = asyncio.create_task(act())
    await asyncio.wait_for(storing.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not begun
    _, outcome = await pair(clone)
    assert outcome.error_message == "cancelled before the action began"


async def test_an_action_whose_coroutine_is_closed_awaits_nothing(clone: Database) -> None:
    context = recorded(clone, action=PLACE)
    await context.__aenter__()
    assert not await context.__aexit__(GeneratorExit, GeneratorExit(), None)
    assert [event.result for event in await trail(clone)] == [AuditResult.PENDING]


async def test_the_request_id_is_that_of_the_actor_or_a_given_one(clone: Database) -> None:
    with acting_as(ALICE):
        async with recorded(clone, action=PLACE), recorded(clone, action=PLACE):
            pass
        async with recorded(clone, action=PLACE, request_id="r2"):
            pass
    async with recorded(clone, action=PLACE):
        pass
    events = await trail(clone)
    ids = [event.request_id for event in events]
    assert ids[:6] == ["r1"] * 4 + ["r2"] * 2
    assert ids[6] == ids[7] not in {"r1", "r2", None}
    intents = {str(event.id) for event in events if event.result == AuditResult.PENDING}
    outcomes = [event for event in events if event.result == AuditResult.SUCCESS]
    assert {(event.details or {})["_intent"] for event in outcomes} == intents


async def test_the_block_cannot_change_the_request_id(clone: Database) -> None:
    async with recorded(clone, action=PLACE, request_id="r7") as event:
        event.request_id = None
    _, outcome = await pair(clone)
    assert outcome.request_id == "r7"


async def test_details_cannot_replace_the_link_to_the_intent(clone: Database) -> None:
    details = {"_intent": "forged", "symbol": "AAPL"}
    async with recorded(clone, action=PLACE, details=details):
        pass
    await pair(clone)


async def test_intent_and_outcome_have_one_actor(clone: Database) -> None:
    with acting_as(ALICE):
        context = recorded(clone, action=PLACE)
        await context.__aenter__()
    with acting_as(Actor(user_id="bob")):
        await context.__aexit__(None, None, None)
    for event in await pair(clone):
        assert {name: getattr(event, name) for name in ACTOR_FIELDS} == {
            name: getattr(ALICE, name) for name in ACTOR_FIELDS
        }


async def test_sessions_come_from_a_function_or_an_object(
    clone: Database, session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recorded(lambda: clone.session(actor=ALICE), action=PLACE):
        pass
    assert {event.user_id for event in await pair(clone)} == {"alice"}

    assert clone.settings.database_url is not None
    monkeypatch.setenv("DATABASE_URL", clone.settings.database_url.get_secret_value())

    async def record() -> None:
        async with recorded(get_session, action=PLACE, request_id="r3"):
            pass

    # In an event loop of its own, which closes its default Database.
    await asyncio.to_thread(asyncio.run, record())
    assert len(await trail(clone)) == 4

    class Source:
        """A source of one session, whose events are rolled back with it."""

        @asynccontextmanager
        async def session(self) -> AsyncIterator[AsyncSession]:
            yield session

    async with recorded(Source(), action=PLACE) as event:
        pass
    page = await crud.audit_logs.search(session, request_id=event.request_id)
    assert [each.result for each in page] == [AuditResult.SUCCESS, AuditResult.PENDING]


async def test_no_connection_is_held_while_the_action_runs(clone_settings: Settings) -> None:
    """Both events are stored though the caller holds the only connection and rolls back."""
    few = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 3}
    async with Database(clone_settings.model_copy(update=few)) as database:
        async with recorded(database, action=PLACE):
            assert "Connections in pool: 0" not in database.engine.pool.status()
            async with database.session() as session:
                await crud.audit_logs.get_recent_events(session)
        with pytest.raises(ZeroDivisionError):
            async with database.session() as session:
                await crud.audit_logs.log_event(session, action=PLACE)
                async with recorded(database, action=PLACE):
                    pass
                _ = 1 / 0
        assert len(await trail(database)) == 4


@pytest.mark.slow
async def test_200_concurrent_actions_have_an_outcome_each(clone: Database) -> None:
    async def act(number: int) -> None:
        async with recorded(clone, action=PLACE, resource_id=str(number)) as event:
            await asyncio.sleep(0)
            event.details = {"number": number}

    await asyncio.gather(*(act(number) for number in range(200)))
    events = await trail(clone)
    intents = {str(e.id): e.resource_id for e in events if e.result == AuditResult.PENDING}
    outcomes = [e for e in events if e.result == AuditResult.SUCCESS]
    assert len(intents) == len(outcomes) == 200
    for event in outcomes:
        details = event.details or {}
        assert intents[details["_intent"]] == event.resource_id == str(details["number"])  # type: ignore[index]  # text


def fail_to_store(
    database: Database, monkeypatch: pytest.MonkeyPatch, *results: AuditResult
) -> None:
    record = database.out_of_band.record

    async def fail(event: AuditLog, actor: Actor | None = None) -> None:
        if event.result in results:
            raise DatabaseUnavailable
        await record(event, actor)

    monkeypatch.setattr(database.out_of_band, "record", fail)


async def test_without_a_stored_intent_the_action_does_not_begin(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_store(clone, monkeypatch, AuditResult.PENDING)
    with pytest.raises(DatabaseUnavailable) as raised:
        async with recorded(clone, action=PLACE):
            pytest.fail("the action ran")
    assert not isinstance(raised.value, OutcomeUnknown)
    assert await trail(clone) == []


async def test_an_action_whose_outcome_cannot_be_stored_is_not_repeated(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_store(clone, monkeypatch, AuditResult.SUCCESS)
    orders = 0

    async def place(_: object) -> None:
        nonlocal orders
        async with recorded(clone, action=PLACE):
            orders += 1

    with pytest.raises(OutcomeUnknown, match="the outcome is not recorded") as raised:
        await clone.transaction(place)  # which repeats DatabaseUnavailable, but not OutcomeUnknown
    assert orders == 1
    (intent,) = await trail(clone)
    assert str(intent.id) in str(raised.value)


async def test_the_exception_of_the_action_wins_over_one_of_the_database(
    clone: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_to_store(clone, monkeypatch, AuditResult.ERROR)
    with pytest.raises(ValueError, match="rejected"):
        async with recorded(clone, action=PLACE):
            raise ValueError("rejected")
    (intent,) = await trail(clone)
    assert f"the outcome of the intent {intent.id} is not recorded" in caplog.text


async def test_a_cancellation_while_the_intent_cannot_be_stored_stays_a_cancellation(
    clone: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    storing = asyncio.Event()

    async def wait_or_fail(event: AuditLog, _actor: Actor | None = None) -> None:
        if event.result != AuditResult.PENDING:
            raise DatabaseUnavailable
        storing.set()
        await asyncio.Event().wait()

    async def act() -> None:
        async with recorded(clone, action=PLACE):
            pytest.fail("the action ran")

    monkeypatch.setattr(clone.out_of_band, "record", wait_or_fail)
    task = asyncio.create_task(act())
    await asyncio.wait_for(storing.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "is not recorded" in caplog.text


async def test_invalid_fields_are_refused_before_the_action(clone: Database) -> None:
    wrong: dict[str, Any] = {"action": PLACE, "result": AuditResult.SUCCESS}
    with pytest.raises(InvalidValue, match="result"):
        async with recorded(clone, **wrong):
            pytest.fail("the action ran")
    assert await trail(clone) == []


KILLED = """
import asyncio, os, signal
from tiger_db import AuditAction, Database, crud

async def main():
    async with Database() as database:
        async with crud.audit_logs.recorded(database, action=AuditAction.TRADE_PLACE_ORDER):
            os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_killed_process_leaves_the_intent_pending(clone: Database) -> None:
    assert clone.settings.database_url is not None
    url = clone.settings.database_url.get_secret_value()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", KILLED],
        env={**os.environ, **SECRETS, "DATABASE_URL": url},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    (intent,) = await trail(clone)
    assert intent.result == AuditResult.PENDING


ENDED = """
import asyncio
from tiger_db import AuditAction, Database, crud

async def act(database, begun):
    async with crud.audit_logs.recorded(database, action=AuditAction.TRADE_PLACE_ORDER):
        begun.set()
        await asyncio.Event().wait()

async def record(database):
    async with database.session() as session:
        await crud.audit_logs.record_event(session, action=AuditAction.MCP_TOOL_CALL)

async def main():
    database = Database()
    begun = asyncio.Event()
    tasks.append(asyncio.create_task(act(database, begun)))
    await begun.wait()
    tasks.append(asyncio.create_task(record(database)))
    while not database.out_of_band._pending:
        await asyncio.sleep(0)

tasks = []
asyncio.run(main())
"""


@pytest.mark.slow
async def test_an_event_loop_that_ends_while_events_are_stored_still_records_the_outcome(
    clone: Database,
) -> None:
    assert clone.settings.database_url is not None
    url = clone.settings.database_url.get_secret_value()
    await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", ENDED],
        env={**os.environ, **SECRETS, "DATABASE_URL": url},
        check=True,
        timeout=60,
    )
    events = [event for event in await trail(clone) if event.action == PLACE]
    assert [event.result for event in events] == [AuditResult.PENDING, AuditResult.ERROR]
