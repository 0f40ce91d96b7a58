"""Events with actions, results and severities that this release does not have."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.support import factories
from tests.support.newer_release import NEWER_EVENT, NEWER_SCHEMA
from tests.support.newer_release import NEWER_VALUES as VALUES
from tests.support.trail import exported
from tiger_db import AuditAction, AuditLog, AuditResult, AuditSeverity, Database, audit, crud
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.models.base import hydrate, row_expression


def values_of(event: AuditLog) -> tuple[str, str, str]:
    return event.action, event.result, event.severity


@pytest.fixture
async def newer(signing: Database) -> AsyncIterator[Connection]:
    """Yield the connection of a newer release, which has added values to the enums."""
    connection = await connect(signing.settings)
    for change in NEWER_SCHEMA:
        await connection.execute(change)
    yield connection
    await connection.close()


@pytest.fixture
async def event(signing: Database, newer: Connection) -> AuditLog:
    """A stored event of the newer release."""
    await newer.execute(NEWER_EVENT)
    async with signing.session() as session:
        (event,) = await crud.audit_logs.get_recent_events(session)
    return event


async def test_unknown_values_are_read_as_texts(signing: Database, event: AuditLog) -> None:
    assert values_of(event) == VALUES
    assert {type(value) for value in values_of(event)} == {str}
    async with signing.session() as session:
        for page in (
            await crud.audit_logs.search(session),
            await crud.audit_logs.search(session, action=["mcp:future"]),
            await crud.audit_logs.search(session, action=["data:query", "mcp"]),
            await crud.audit_logs.get_security_events(session),  # fatal is above high
        ):
            assert [values_of(found) for found in page] == [VALUES]
        assert (await crud.audit_logs.search(session, action=["data", "mcp:connect"])).items == []


async def test_unknown_values_are_counted(signing: Database, event: AuditLog) -> None:
    async with signing.session() as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
        assert event.created_at is not None
        counted = await crud.audit_logs.statistics(
            session,
            by=("action", "result", "family"),
            since=event.created_at.replace(hour=0, minute=0),
        )
    assert {(group.action, group.result, group.family, group.count) for group in counted} == {
        ("mcp:future", "deferred", "mcp", 1),
        (AuditAction.DATA_QUERY, AuditResult.SUCCESS, "data", 1),
    }


def test_a_row_with_unknown_values_is_dumped_and_shown(event: AuditLog) -> None:
    for dumped in (event.model_dump(), json.loads(event.model_dump_json())):
        assert [dumped[name] for name in ("action", "result", "severity")] == [*VALUES]
    assert "result='deferred'" in repr(event)
    assert values_of(event.model_copy()) == VALUES


def test_an_unknown_result_is_not_recorded() -> None:
    with pytest.raises(ValidationError, match="result"):
        AuditLog(action="mcp:future", result="deferred")


async def test_a_raw_row_with_unknown_values_is_hydrated(
    newer: Connection, event: AuditLog
) -> None:
    row = await newer.fetchval(f"SELECT {row_expression(AuditLog, 'a')} FROM audit_logs AS a")
    assert values_of(hydrate(AuditLog, row, None)) == VALUES
    await newer.execute("SET session_replication_role = replica")
    await newer.execute(
        "UPDATE audit_logs SET action = 'data:query', result = 'error', severity = 'low'"
    )
    row = await newer.fetchval(f"SELECT {row_expression(AuditLog, 'a')} FROM audit_logs AS a")
    known = values_of(hydrate(AuditLog, row, None))
    assert known == (AuditAction.DATA_QUERY, AuditResult.ERROR, AuditSeverity.LOW)
    assert [type(value) for value in known] == [AuditAction, AuditResult, AuditSeverity]


@pytest.mark.slow
async def test_an_event_with_unknown_values_is_followed(
    signing: Database, newer: Connection
) -> None:
    begun = asyncio.Event()
    stream = audit.follow(signing, progress=lambda *_: begun.set(), action=["mcp"])
    async with aclosing(stream) as events:
        following = asyncio.ensure_future(anext(events))
        await asyncio.wait_for(begun.wait(), 20)
        await newer.execute(NEWER_EVENT)
        assert values_of(await asyncio.wait_for(following, 20)) == VALUES


@pytest.mark.slow
async def test_an_event_with_unknown_values_is_sealed_exported_and_verified(
    signing: Database, event: AuditLog, tmp_path: Path
) -> None:
    async with signing.session() as session:
        await crud.audit_logs.log_events(session, [factories.new_event(action="backup:run")])
    assert (await audit.seal(signing)).rows == 2
    verified = await audit.verify(signing)
    assert (verified.sound, verified.rows) == (True, 2)
    lines = await exported(signing)
    first = json.loads(lines[1])
    assert [first[name] for name in ("action", "result", "severity")] == [*VALUES]
    assert [json.loads(lines[1])] == [
        json.loads(line) for line in await exported(signing, action="mcp")
    ]
    assert ",".join(VALUES) in "".join(await exported(signing, form="csv"))
    file = tmp_path / "trail.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    key = await signing.signing_key()
    assert key is not None
    verified = await audit.verify_export(file, keys=[key.public_key()])
    assert (verified.sound, verified.rows) == (True, 2)
