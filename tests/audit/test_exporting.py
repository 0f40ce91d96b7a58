"""Exports as JSON Lines and CSV, and their consistency while others write."""

import asyncio
import codecs
import csv
import io
import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.support import factories
from tests.support.trail import (
    FIELDS,
    TAMPERINGS,
    Trail,
    exported,
    fill,
    seals_of,
)
from tiger_db import AuditLog, Database, audit, crud
from tiger_db.audit.exporting import CSV_COLUMNS
from tiger_db.audit.seal_format import seal_from_json
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidValue

MANY = """
INSERT INTO audit_logs (id, action, result, severity, user_id, details)
SELECT gen_random_uuid(), 'data:query', 'success', 'low', 'user ' || n,
    jsonb_build_object('note', repeat('x', 600))
FROM generate_series(1, $1) AS n
"""
JSON = ("details", "old_values", "new_values", "tags")


@pytest.mark.slow
async def test_an_export_has_the_seals_and_events_of_the_database(
    trail: Trail, lines: list[str]
) -> None:
    """Each event as it was written, each seal before the events that it covers."""
    positions = [json.loads(line).get("position") for line in lines]
    assert [position for position in positions if position is not None] == sorted(
        {*trail.ids, *range(trail.end + 1, trail.end + 4)}
    )
    for number, payload in zip(seals_of(lines), trail.payloads, strict=True):
        assert seal_from_json(json.loads(lines[number])["seal"]).payload() == payload
        assert payload.after < positions[number + 1] <= payload.upto
    by_id = {json.loads(line).get("id"): json.loads(line) for line in lines}
    async with trail.database.session() as session:
        for event in await factories.events(session):
            fields = by_id.pop(str(event.id))
            shown = event.model_dump(mode="json", exclude_none=True)
            assert datetime.fromisoformat(fields.pop("created_at")) == event.created_at
            assert fields == {name: shown[name] for name in shown if name != "created_at"}
    assert [*by_id] == [None]


@pytest.mark.slow
async def test_filters_select_events(trail: Trail) -> None:
    """An export with filters has the matching events, oldest first, without seals."""
    told: list[int] = []
    everything = [json.loads(line) for line in await exported(trail.database)]
    for options, wanted in (
        ({"user_id": "王伟"}, lambda event: event.get("user_id") == "王伟"),
        ({"ip_address": "192.0.2.0/24"}, lambda event: event.get("ip_address") == "192.0.2.7"),
        ({"resource": "order"}, lambda event: event.get("resource_type") == "order"),
        ({"details": {"symbol": "AAPL"}}, lambda event: "details" in event),
        ({"since": datetime.now(UTC) - timedelta(days=1)}, lambda event: "id" in event),
        ({"until": datetime.now(UTC) - timedelta(days=1)}, lambda _: False),
    ):
        lines = await exported(
            trail.database, progress=lambda done, _: told.append(done), **options
        )
        expected = [event for event in everything if wanted(event)]
        assert [json.loads(line) for line in lines] == sorted(expected, key=lambda e: str(e["id"]))
        assert told[-1] == len(expected)
        told.clear()
    with pytest.raises(InvalidValue, match="since"):
        await exported(trail.database, since=datetime(2026, 1, 1))  # noqa: DTZ001  # which is wrong


@pytest.mark.parametrize("function", [audit.export, audit.follow])
def test_wrong_arguments_are_refused_at_the_call(database: Database, function: Any) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("since", {"since": datetime(2026, 1, 1)}),  # noqa: DTZ001  # the point
        ("account_id", {"account_id": "x"}),
        ("ip_address", {"ip_address": "nowhere"}),
        ("user", {"user": "alice"}),
        ("form", {"form": "xml"}),
        ("progress", {"progress": 1}),
    ]
    for name, keywords in wrong:
        with pytest.raises(InvalidValue, match=name):
            function(database, **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"since": datetime(2020, 1, 1, tzinfo=UTC)}])
async def test_csv_has_the_values_of_json_lines(trail: Trail, options: dict[str, Any]) -> None:
    written = await exported(trail.database, **options)
    events = [json.loads(line) for line in written if not line.startswith('{"seal"')]
    lines = await exported(trail.database, form="csv", **options)
    assert lines[0].strip().split(",") == [*CSV_COLUMNS]
    rows = [*csv.DictReader(io.StringIO("".join(lines), newline=""))]
    assert len(rows) == len(events) == 63
    for row, event in zip(rows, events, strict=True):
        assert {name for name, cell in row.items() if cell} == {*event}
        for name, value in event.items():
            assert (json.loads(row[name]) if name in JSON else row[name]) == (
                value if name in JSON else str(value)
            )
    assert {*FIELDS} <= {name for event in events for name in event}


@pytest.mark.slow
async def test_a_csv_can_begin_with_a_byte_order_mark(trail: Trail, tmp_path: Path) -> None:
    plain = await exported(trail.database, form="csv")
    marked = await exported(trail.database, form="csv", byte_order_mark=True)
    path = tmp_path / "events.csv"
    path.write_text("".join(marked), encoding="utf-8", newline="")
    assert path.read_bytes() == codecs.BOM_UTF8 + "".join(plain).encode()
    assert path.read_text(encoding="utf-8-sig").startswith("position,")
    with pytest.raises(InvalidValue, match="byte_order_mark requires the form csv"):
        audit.export(trail.database, byte_order_mark=True)


async def test_formulas_in_csv_are_escaped(signing: Database) -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", 'a "b", c', "a\r\nb", "1=1", "'x"]
    details = {"=1": '"', "price": 0.1, "digits": 12345678901234567890, "none": None, "s": "'\n,"}
    async with signing.session() as session:
        await crud.audit_logs.log_events(
            session,
            [factories.new_event(error_message=text, details=details) for text in texts],
        )
    lines = await exported(signing, form="csv")
    rows = [*csv.DictReader(io.StringIO("".join(lines), newline=""))]
    assert [row["error_message"] for row in rows] == [
        f"'{text}" if text[0] in "=+-@\t\r" else text for text in texts
    ]
    assert all(json.loads(row["details"]) == details for row in rows)


async def test_numbers_keep_all_digits(signing: Database, superuser: Connection) -> None:
    """PostgreSQL keeps numbers that no float has room for."""
    number = "0.1000000000000000000000000000000000000000000000001"
    async with signing.session() as session:
        await crud.audit_logs.log_events(session, [factories.new_event(details={"n": 1})])
    await superuser.execute("UPDATE audit_logs SET details = $1", f'{{"n": {number}}}')
    (line,) = await exported(signing)
    assert f'{{"n": {number}}}' in line
    _, line = await exported(signing, form="csv")
    (_, row) = csv.reader([",".join(CSV_COLUMNS), line])
    assert row[CSV_COLUMNS.index("details")] == f'{{"n": {number}}}'


# However many there are, and while more come.


@pytest.mark.slow
async def test_an_export_is_a_snapshot(trail: Trail, key: Ed25519PublicKey, tmp_path: Path) -> None:
    every: list[dict[str, Any]] = [{}, {"since": datetime(2020, 1, 1, tzinfo=UTC)}]
    for options in every:
        count = len(await exported(trail.database, **options))
        going_on = asyncio.Event()

        async def write(going_on: asyncio.Event = going_on) -> None:
            while not going_on.is_set():
                await fill(trail.database, trail.chance)
                await audit.seal(trail.database)

        coming = audit.export(trail.database, **options)
        lines = [await anext(coming)]
        await fill(trail.database, trail.chance)
        await audit.seal(trail.database)
        writer = asyncio.create_task(write())
        lines += [line async for line in coming]
        going_on.set()
        await writer
        assert len(lines) == count
        if not options:
            file = tmp_path / "trail.jsonl"
            file.write_text("".join(lines), encoding="utf-8")
            found = await audit.verify_export(file, keys=[key], checkpoint=trail.checkpoint)
            assert (found.findings, found.rows, found.unsealed) == ([], 60, 3)
    assert len(await exported(trail.database)) > count + 10


@pytest.mark.slow
async def test_memory_does_not_grow_with_the_events(
    signing: Database, superuser: Connection, tmp_path: Path
) -> None:
    """Not 10 MB of it, though more is written."""
    count = TAMPERINGS * 375  # 15,000, or 187,500 in a soak
    await superuser.execute(MANY, count)
    await audit.seal(signing)
    file = tmp_path / "trail.jsonl"
    key = await signing.signing_key()
    assert key is not None
    tracemalloc.start()
    try:
        with file.open("w", encoding="utf-8") as out:
            async for line in audit.export(signing):
                out.write(line)
        exporting = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        of_file = await audit.verify_export(file, keys=[key.public_key()])
        verifying = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        in_database = await audit.verify(signing)
        there = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(exporting, verifying, there)  # noqa: T201
    assert max(exporting, verifying, there) < 10 * 2**20 < file.stat().st_size
    for found in (of_file, in_database):
        assert (found.findings, found.rows) == ([], count)


def test_every_field_is_a_csv_column() -> None:
    assert {*CSV_COLUMNS} == {*AuditLog.model_fields}
