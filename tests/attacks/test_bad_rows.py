"""One row with values that Python cannot read must stop no reader of the other rows."""

import asyncio
import csv
import io
import json
import logging
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from asyncpg import CheckViolationError
from pydantic import SecretStr
from sqlalchemy import ARRAY

from tests.support import factories
from tests.support.attackers import DROP_READABLE_RULES
from tests.support.command_line import SECRETS, CommandLine
from tests.support.sql import sql
from tiger_db import (
    APIKey,
    AuditLog,
    Database,
    KeyVerifier,
    Settings,
    TigerAccount,
    TokenStatus,
    audit,
    crud,
    doctor,
)
from tiger_db.decoding import UNREADABLE
from tiger_db.models import metadata
from tiger_db.models.base import readable_rules
from tiger_db.signing import generate_signing_key

LAST = datetime.max.replace(tzinfo=UTC)
FIRST = datetime.min.replace(tzinfo=UTC)
DEEP = "repeat('{\"a\":', 3000) || '1' || repeat('}', 3000)"
# Each value that an event can have, and how `details` or the time of the event is read.
BAD_EVENTS: dict[str, tuple[str, str, Any]] = {
    "year 12000": ("created_at", "'12000-01-01'", LAST),
    "4000 BC": ("created_at", "'4000-01-01 BC'", FIRST),
    "array": ("details", "'[1]'", {UNREADABLE: [1]}),
    "text": ("details", "'\"x\"'", {UNREADABLE: "x"}),
    "integer": ("details", "'{\"a\": 1e5000}'", {"a": "1" + "0" * 5000}),
    "float": ("details", '\'{"a": 1e5000, "b": 1e400}\'', None),
    "fraction": ("details", f"'{{\"a\": {'1' + '0' * 400}.5}}'", {"a": f"1{'0' * 400}.5"}),
    "deep": ("details", f"({DEEP})::jsonb", {UNREADABLE: "the JSON has more than 100 levels"}),
}
FAST = {"year 12000", "integer"}
KINDS = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in BAD_EVENTS]
INSERT = """
INSERT INTO audit_logs (id, action, result, severity, user_id, {column})
VALUES ('{id}', 'data:query', 'success', 'low', 'mallory', {value})
"""


async def insert_bad_event(database: Database, column: str, value: str) -> UUID:
    bad = factories.new_event().id
    await sql(
        database.settings,
        DROP_READABLE_RULES,
        INSERT.format(column=column, value=value, id=bad),
        "SELECT 1",
    )
    return bad


@pytest.mark.parametrize("kind", KINDS)
async def test_a_bad_event_stops_no_reader(
    clone: Database, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    column, value, expected = BAD_EVENTS[kind]
    async with clone.session() as session:
        await crud.audit_logs.log_event(session, action="data:query", user_id="alice")
    with caplog.at_level(logging.WARNING, "tiger_db"):
        bad = await insert_bad_event(clone, column, value)
        async with clone.session() as session:
            await crud.audit_logs.log_event(session, action="data:query", user_id="bob")
        async with clone.session() as session:
            page = await crud.audit_logs.search(session, action="data:query", count=True)
            assert [event.user_id for event in page] == ["bob", "mallory", "alice"]
            event = await crud.audit_logs.get(session, bad)
            assert event is not None
            assert expected is None or getattr(event, column) == expected
            json.loads(event.model_dump_json())
            since = datetime.now(UTC) - timedelta(days=1)
            groups = await crud.audit_logs.statistics(session, by=("day", "user_id"), since=since)
            assert len(groups) == 3
            page = await crud.audit_logs.search(session, limit=1)
            page = await crud.audit_logs.search(session, limit=1, after=page.next_cursor)
            assert [event.id for event in page] == [bad]
    warned = kind not in {"integer", "float", "fraction"}
    # Each reader has met the row, and the log names it once.
    assert caplog.text.count(str(bad)) == warned


async def test_followers_read_past_a_bad_event(clone: Database) -> None:
    begun = asyncio.Event()

    async def follow() -> list[str | None]:
        found = []
        events = audit.follow(clone, progress=lambda *_: begun.set(), action="data:query")
        async with aclosing(events):
            async for event in events:
                found.append(event.user_id)
                if event.user_id == "bob":
                    break
        return found

    following = asyncio.create_task(follow())
    await begun.wait()
    await insert_bad_event(clone, "created_at", "'12000-01-01'")
    async with clone.session() as session:
        await crud.audit_logs.log_event(session, action="data:query", user_id="bob")
    async with asyncio.timeout(20):
        assert await following == ["mallory", "bob"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD_EVENTS)
@pytest.mark.parametrize("filtered", [False, True])
async def test_exports_have_the_content_of_a_bad_event(
    clone: Database, kind: str, filtered: bool
) -> None:
    column, value, _ = BAD_EVENTS[kind]
    bad = await insert_bad_event(clone, column, value)
    async with clone.session() as session:
        await crud.audit_logs.log_event(session, action="data:query", user_id="bob")
    stored = await sql(
        clone.settings, f"SELECT to_json({column})::text FROM audit_logs WHERE id = '{bad}'"
    )
    filters: Any = {"action": "data:query"} if filtered else {}
    lines = [line async for line in audit.export(clone, **filters)]
    (line,) = [line for line in lines if str(bad) in line]
    if column == "details":
        assert f'"details":{stored}' in line
    text = "".join([line async for line in audit.export(clone, form="csv", **filters)])
    csv.field_size_limit(10**6)
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(text))}
    assert len(rows) == 2
    if column == "details":
        cell = rows[str(bad)]["details"]
        assert cell == (json.loads(str(stored)) if kind == "text" else stored)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_a_trail_with_a_bad_event_is_sealed_and_verified(
    clone_settings: Settings, kind: str, tmp_path: Path
) -> None:
    column, value, _ = BAD_EVENTS[kind]
    signing_key = SecretStr(generate_signing_key())
    settings = clone_settings.model_copy(update={"audit_signing_key": signing_key})
    async with Database(settings) as database:
        await insert_bad_event(database, column, value)
        assert (await audit.seal(database)).rows == 1
        report = await audit.verify(database)
        assert (report.findings, report.rows) == ([], 1)
        path = tmp_path / "export.jsonl"
        path.write_text("".join([line async for line in audit.export(database)]), "utf-8")
        key = await database.signing_key()
        assert key is not None
        assert not (await audit.verify_export(path, keys=[key.public_key()])).findings


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["year 12000", "array"])
async def test_commands_show_a_bad_event(
    clone: Database,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    column, value, _ = BAD_EVENTS[kind]
    bad = await insert_bad_event(clone, column, value)
    assert clone.settings.database_url is not None
    url = clone.settings.database_url.get_secret_value()
    cli = CommandLine(monkeypatch, capsys, {"DATABASE_URL": url, **SECRETS})
    out = str(tmp_path / "events.csv")
    for arguments in (
        ["list-events"], ["list-events", "--json"],
        ["count-events", "--by", "day", "--since", "1d"],
        ["export-events", "--out", out, "--format", "csv"],
    ):  # fmt: skip
        result = cli.process(*arguments)
        assert result.code == 0, result.err
    result = cli.process("doctor", "--json")
    (check,) = [item for item in result.json["items"] if item["check"] == "readable rows"]
    if kind in {"year 12000", "array"}:
        assert f"audit_logs {bad}" in check["seen"]


BAD_REFRESHES = {
    "next_refresh_at": "'20000-01-01'",
    "new_token_expires_at": "'4000-01-01 BC'",
    "details": "'[1]'",
    "fencing_token": "9223372036854775807",
    "retry_count": "9223372036854775807",
}


@pytest.mark.parametrize("column", BAD_REFRESHES)
async def test_a_bad_refresh_stops_no_other(clone: Database, column: str) -> None:
    async with clone.session() as session:
        bad, good = [await factories.refresh(session) for _ in range(2)]
    await sql(clone.settings, DROP_READABLE_RULES, "SELECT 1")
    await sql(
        clone.settings,
        f"UPDATE token_statuses SET {column} = {BAD_REFRESHES[column]} WHERE id = '{bad.id}'",
        "SELECT 1",
    )
    async with clone.session() as session:
        page = await crud.token_status.history(session)
        assert {row.id for row in page} == {bad.id, good.id}
        await crud.token_status.get_pending_refreshes(session)
        claims = await crud.token_status.claim_due(session, worker="w")
        assert {claim.id for claim in claims} == {bad.id, good.id}
    soon = datetime.now(UTC) + timedelta(days=1)
    for claim in claims:
        async with clone.session() as session:
            await crud.token_status.complete(session, claim, access_token="new", expires_at=soon)


@pytest.mark.parametrize(
    "change",
    ["last_error_at = '20000-01-01'", "failing_until = '4000-01-01 BC'", "tags = '[1]'",
     "quote_permissions = '{}'", "quote_permissions = '[1, null]'", "market_permissions = '{NULL}'",
    "market_permissions = '{{US}}'", "error_count = 9223372036854775807"],
)  # fmt: skip
async def test_a_bad_account_stops_no_other(clone: Database, change: str) -> None:
    async with clone.session() as session:
        bad, good = [await factories.account_with_token(session) for _ in range(2)]
    await sql(clone.settings, DROP_READABLE_RULES, "SELECT 1")
    await sql(
        clone.settings, f"UPDATE tiger_accounts SET {change} WHERE id = '{bad.id}'", "SELECT 1"
    )
    async with clone.session() as session:
        assert {row.id for row in await crud.accounts.list_accounts(session)} == {bad.id, good.id}
        await crud.token_status.schedule_due(session)
    async with clone.session() as session:
        claims = await crud.token_status.claim_due(session, worker="w")
        assert {claim.tiger_account_id for claim in claims} >= {good.id}
        for claim in claims:
            claim.tiger_account.model_dump_json()


# How a row of a key is changed, and whether the key is then refused.
BAD_KEYS = {
    "last_used_at = '20000-01-01', tags = '[1]'": False,
    "usage_count = 9223372036854775807": False,
    "expires_at = '20000-01-01'": True,
    "scopes = '{NULL}'": True,
    "scopes = '{{mcp:read}}'": True,
    "allowed_ips = '{NULL}'": True,
    "allowed_ips = '{{10.0.0.0/8}}'": True,
    "allowed_user_agents = '{NULL}'": True,
    "allowed_user_agents = '{{a}}'": True,
    "status = NULL": True,
    "allowed_ips = NULL": True,
    "key_hash = NULL": True,
}
NULLABLE = """ALTER TABLE api_keys ALTER status DROP NOT NULL, ALTER allowed_ips DROP NOT NULL,
    ALTER key_hash DROP NOT NULL"""


@pytest.mark.slow
@pytest.mark.parametrize("change", BAD_KEYS)
async def test_a_bad_key_stops_no_other(
    clone_settings: Settings, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(clone_settings) as database:
        async with database.session() as session:
            bad, bad_key = await factories.api_key(session)
            good, good_key = await factories.api_key(session)
        await sql(clone_settings, DROP_READABLE_RULES, NULLABLE, "SELECT 1")
        await sql(clone_settings, f"UPDATE api_keys SET {change} WHERE id = '{bad.id}'", "SELECT 1")
        with caplog.at_level(logging.WARNING, "tiger_db"):
            verifier = KeyVerifier(database)
            assert await verifier.verify(good_key)
            assert bool(await verifier.verify(bad_key)) != BAD_KEYS[change]
            async with database.session() as session:
                page = await crud.api_keys.list_api_keys(session)
                assert {row.id for row in page} == {bad.id, good.id}
                for row in page:
                    row.model_dump_json()
                    if row.id == bad.id and "allowed_ips = '" in change:
                        assert not row.is_ip_allowed("10.0.0.1")
        is_named = "usage_count" not in change and "= NULL" not in change
        assert caplog.text.count(str(bad.id)) == is_named
    # The counts of all uses are written.
    async with Database(clone_settings) as database, database.session() as session:
        used = await crud.api_keys.get(session, good.id)
        assert used is not None
        assert used.usage_count == 1
        if "status" not in change:
            await crud.api_keys.revoke(session, bad.id)
        await crud.api_keys.delete(session, bad.id)


LABELS = {
    "tiger_accounts": ("tiger_environment", "environment"),
    "api_keys": ("api_key_scope", "scopes[1]"),
    "token_statuses": ("refresh_trigger", "trigger"),
}


@pytest.mark.parametrize("table", LABELS)
async def test_a_label_of_a_newer_release_stops_no_reader(clone: Database, table: str) -> None:
    enum, column = LABELS[table]
    async with clone.session() as session:
        account = await factories.account_with_token(session)
        await factories.refresh(session)
        await factories.api_key(session)
    await sql(clone.settings, f"ALTER TYPE {enum} ADD VALUE 'new'", "SELECT 1")
    await sql(clone.settings, f"UPDATE {table} SET {column} = 'new'", "SELECT 1")
    async with clone.session() as session:
        assert len(await crud.api_keys.list_api_keys(session)) == 1
        assert account.id in {row.id for row in await crud.accounts.list_accounts(session)}
        assert len(await crud.token_status.history(session)) == 1
        await crud.token_status.schedule_due(session)
    async with clone.session() as session:
        claims = await crud.token_status.claim_due(session, worker="w")
        assert account.id in {claim.tiger_account_id for claim in claims}


@pytest.mark.parametrize("kind", ["year 12000", "4000 BC", "array", "text"])
async def test_new_bad_events_are_refused(clone: Database, kind: str) -> None:
    column, value, _ = BAD_EVENTS[kind]
    statement = INSERT.format(column=column, value=value, id=factories.new_event().id)
    with pytest.raises(CheckViolationError):
        await sql(clone.settings, statement)


@pytest.mark.parametrize("entity", [TigerAccount, APIKey, AuditLog, TokenStatus])
def test_each_column_for_times_json_and_lists_has_a_constraint(entity: Any) -> None:
    table = metadata.tables[entity.__tablename__]
    names = " ".join(readable_rules(table))
    for column in table.columns:
        if str(column.type) in {"TIMESTAMP", "JSONB"} or isinstance(column.type, ARRAY):
            assert f"ck_{table.name}_{column.name}_" in names


@pytest.mark.slow
async def test_doctor_names_bad_rows(clone_settings: Settings) -> None:
    async def outcome() -> doctor.CheckResult:
        results = await doctor.run(clone_settings)
        (found,) = [result for result in results if result.check == "readable rows"]
        return found

    assert (await outcome()).status == "ok"
    bad = factories.new_event().id
    await sql(
        clone_settings,
        DROP_READABLE_RULES,
        INSERT.format(column="tags", value="'1'", id=bad),
        "SELECT 1",
    )
    found = await outcome()
    assert found.status == "warning"
    assert f"audit_logs {bad}" in found.seen
