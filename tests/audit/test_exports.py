"""What is exported can be verified by anyone, anywhere, and read by other programs."""

import asyncio
import csv
import io
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tests.support import factories
from tests.support.trail import FIELDS, SEALS, TAMPERINGS, Trail, assert_found, event_found, fill
from tiger_db import AuditAction, AuditLog, Database, audit, crud
from tiger_db.audit import AuditFinding, FindingKind
from tiger_db.audit.exporting import CSV_COLUMNS
from tiger_db.audit.seal_format import make_seal, seal_from_json, seal_to_json
from tiger_db.audit.storage import Connection
from tiger_db.errors import ConfigurationError, InvalidValue, NotFound

Way: TypeAlias = Callable[
    [Trail, list[str]], AuditFinding
]  # changes the lines; what is to be found
MANY = """
INSERT INTO audit_logs (id, action, result, severity, user_id, details)
SELECT gen_random_uuid(), 'data:query', 'success', 'low', 'user ' || n,
    jsonb_build_object('note', repeat('x', 600))
FROM generate_series(1, $1) AS n
"""
JSON = ("details", "old_values", "new_values", "tags")


@pytest.fixture
async def key(trail: Trail) -> Ed25519PublicKey:
    own = await trail.database.signing_key()
    assert own is not None
    return own.public_key()


@pytest.fixture
async def lines(trail: Trail) -> list[str]:
    return await exported(trail.database)


async def exported(database: Database, **options: Any) -> list[str]:
    return [line async for line in audit.export(database, **options)]


def events_of(lines: list[str]) -> dict[int, int]:
    """On which line each position is."""
    return {
        json.loads(line)["position"]: number
        for number, line in enumerate(lines)
        if not line.startswith('{"seal"')
    }


def seals_of(lines: list[str]) -> list[int]:
    """On which line each seal is."""
    return [number for number, line in enumerate(lines) if line.startswith('{"seal"')]


# Anyone can verify.


async def test_an_export_is_verified_without_a_database(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    file = tmp_path / "trail.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    told: list[tuple[int, int]] = []
    await trail.database.close()
    for checkpoint in (None, trail.checkpoint):
        found = await audit.verify_export(
            file,
            keys=[Ed25519PrivateKey.generate().public_key(), key],
            checkpoint=checkpoint,
            advance=lambda done, total: told.append((done, total)),
        )
        assert found.findings == []
        assert (found.sound, found.seals, found.rows, found.unsealed) == (True, SEALS, 60, 3)
    assert told[-1] == (file.stat().st_size,) * 2
    assert sorted(told[: len(told) // 2]) == told[: len(told) // 2]


async def test_it_says_what_the_database_says(trail: Trail, lines: list[str]) -> None:
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


def change_line(trail: Trail, lines: list[str]) -> AuditFinding:
    position, number = trail.chance.choice([*events_of(lines).items()][:60])
    line = lines[number]
    digits = [*re.finditer(r"\d", line[line.index('"created_at"') :])]
    while line == lines[number]:
        if trail.chance.random() < 0.5:
            at = line.index('"created_at"') + trail.chance.choice(digits).start()
            line = line[:at] + trail.chance.choice("0123456789") + line[at + 1 :]
        else:
            text = trail.chance.choice(["}\n", '"result":', '"severity":'])
            line = line.replace(text, " " + text)
    lines[number] = line
    return event_found(trail, FindingKind.CHANGED, position)


def delete_lines(trail: Trail, lines: list[str]) -> AuditFinding:
    positions = trail.chance.sample([*trail.ids][:-1], trail.chance.randrange(1, 9))
    at = events_of(lines)
    for position in sorted(positions, reverse=True):
        del lines[at[position]]
    return event_found(trail, FindingKind.DELETED, min(positions))


def insert_line(trail: Trail, lines: list[str]) -> AuditFinding:
    """In a position that is taken, before or after who has it, or in one that is not."""
    position = trail.chance.choice([*trail.ids, *trail.gaps])
    at = events_of(lines)
    near = max(known for known in at if known <= position)
    event_id = uuid4()
    fields = json.loads(lines[at[near]]) | {"position": position, "id": str(event_id)}
    after = 1 if near != position else trail.chance.choice([0, 1])
    lines.insert(at[near] + after, json.dumps(fields, separators=(",", ":")) + "\n")
    return event_found(trail, FindingKind.INSERTED, position, event_id)


def move_line(trail: Trail, lines: list[str]) -> AuditFinding:
    """An event says that it has another position."""
    position = trail.chance.choice([*trail.ids])
    to = trail.chance.choice([*trail.gaps, *trail.ids, trail.end + 9, -1])
    if to == position:
        to = trail.end + 9
    at = events_of(lines)[position]
    line = lines.pop(at).replace(f'{{"position":{position},', f'{{"position":{to},')
    later = [number for known, number in events_of(lines).items() if known > to]
    lines.insert(min(later, default=len(lines)), line)
    return event_found(trail, FindingKind.MOVED, position, trail.ids[position])


def swap_positions(trail: Trail, lines: list[str]) -> AuditFinding:
    one, two = sorted(trail.chance.sample([*trail.ids], 2))
    at = events_of(lines)
    for here, there in ((one, two), (two, one)):
        lines[at[here]] = lines[at[here]].replace(f'n":{here},', f'n":{there},', 1)
    lines[at[one]], lines[at[two]] = lines[at[two]], lines[at[one]]
    return event_found(trail, FindingKind.MOVED, one, trail.ids[one])


def cut_events(trail: Trail, lines: list[str]) -> AuditFinding:
    """As far as the last seal, so that the file ends with some of its events, or none."""
    last = trail.payloads[-1]
    position = trail.chance.choice([position for position in trail.ids if position > last.after])
    del lines[events_of(lines)[position] :]
    return event_found(trail, FindingKind.TRUNCATED, position)


def cut_seals(trail: Trail, lines: list[str]) -> AuditFinding:
    number = trail.chance.randrange(SEALS)
    del lines[seals_of(lines)[number] :]
    return AuditFinding(FindingKind.TRUNCATED, "", number + 1)


def edit_seal(trail: Trail, lines: list[str]) -> AuditFinding:
    number = trail.chance.randrange(SEALS)
    at = seals_of(lines)[number]
    seal = seal_from_json(json.loads(lines[at])["seal"])
    payload = replace(seal.payload(), root="0" * 64)
    edited = trail.chance.choice(
        [
            replace(seal, payload_json=payload.to_json()),
            replace(seal, signature=seal.signature[::-1]),
            replace(seal, digests=seal.digests[::-1]),
            make_seal(Ed25519PrivateKey.generate(), seal.payload(), seal.digests),
        ]
    )
    lines[at] = json.dumps({"seal": seal_to_json(edited)}) + "\n"
    return AuditFinding(FindingKind.FORGED, "", number + 1)


def delete_seal(trail: Trail, lines: list[str]) -> AuditFinding:
    number = trail.chance.randrange(SEALS - 1)
    del lines[seals_of(lines)[number]]
    return AuditFinding(FindingKind.FORGED, "", number + 1)


WAYS: dict[FindingKind, list[Way]] = {
    FindingKind.CHANGED: [change_line],
    FindingKind.DELETED: [delete_lines],
    FindingKind.INSERTED: [insert_line],
    FindingKind.MOVED: [move_line, swap_positions],
    FindingKind.TRUNCATED: [cut_events, cut_seals],
    FindingKind.FORGED: [edit_seal, delete_seal],
}


@pytest.mark.parametrize("kind", WAYS)
async def test_every_tampering_with_the_file_is_foundand_named(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path, kind: FindingKind
) -> None:
    file = tmp_path / "trail.jsonl"
    for number in range(TAMPERINGS):
        way = WAYS[kind][number % len(WAYS[kind])]
        tampered = [*lines]
        expected = way(trail, tampered)
        file.write_text("".join(tampered), encoding="utf-8")
        found = await audit.verify_export(file, keys=[key], checkpoint=trail.checkpoint)
        if kind == FindingKind.CHANGED:
            expected = replace(expected, event_id=found.findings[0].event_id)
        assert_found(found, expected, f"{number}: {way.__qualname__}")
        if way is cut_seals and expected.seal != 1:  # which leaves a trail as it once was
            assert (await audit.verify_export(file, keys=[key])).sound


async def test_a_file_without_seals_proves_nothing(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    file = tmp_path / "trail.jsonl"
    for left in ([], [lines[at] for at in events_of(lines).values()]):
        file.write_text("".join(left), encoding="utf-8")
        with pytest.raises(InvalidValue, match="holds no seal"):
            await audit.verify_export(file, keys=[key])
        found = await audit.verify_export(file, keys=[key], checkpoint=trail.checkpoint)
        assert found.findings[-1].kind == FindingKind.TRUNCATED


async def test_a_file_with_the_line_ends_of_windows(
    lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    file = tmp_path / "trail.jsonl"
    file.write_bytes("".join(lines).replace("\n", "\r\n").encode())
    assert (await audit.verify_export(file, keys=[key])).sound


@pytest.mark.slow
async def test_a_file_that_ends_within_a_line(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    file = tmp_path / "trail.jsonl"
    last = [*events_of(lines).values()][59]
    text = "".join(lines[: last + 1])
    file.write_text(text.removesuffix("\n"), encoding="utf-8")
    assert (await audit.verify_export(file, keys=[key], checkpoint=trail.checkpoint)).sound
    for missing in range(2, len(lines[last])):
        file.write_text(text[:-missing], encoding="utf-8")
        try:
            found = await audit.verify_export(file, keys=[key])
        except InvalidValue as error:
            assert f"line {last + 1} is neither" in str(error)  # noqa: PT017  # one or the other
        else:
            assert found.findings[0].kind in {FindingKind.CHANGED, FindingKind.TRUNCATED}
            assert found.findings[0].position == [*trail.ids][-1]


async def test_a_trail_that_was_rewritten_shows_at_the_checkpoint(
    trail: Trail, key: Ed25519PublicKey, tmp_path: Path
) -> None:
    """Whoever has the key can make a sound trail of anything, but not the one that was seen."""
    await trail.superuser.execute(
        "DELETE FROM audit_seals; UPDATE audit_logs SET user_id = 'eve' WHERE position = 1"
    )
    await audit.seal(trail.database)
    async with trail.database.session() as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    await audit.seal(trail.database)
    for _ in range(SEALS):
        await fill(trail.database, trail.chance)
        await audit.seal(trail.database)
    file = tmp_path / "trail.jsonl"
    file.write_text("".join(await exported(trail.database)), encoding="utf-8")
    assert (await audit.verify_export(file, keys=[key])).sound
    (found,) = (await audit.verify_export(file, keys=[key], checkpoint=trail.checkpoint)).findings
    assert (found.kind, found.seal) == (FindingKind.CHECKPOINT, SEALS)


async def test_keys_and_checkpoints_that_are_not_there(signing: Database, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing is sealed yet"):
        await audit.export_checkpoint(signing)
    with pytest.raises(ConfigurationError, match="public key"):
        await audit.verify_export(tmp_path / "none", keys=[])
    with pytest.raises(FileNotFoundError):
        await audit.verify_export(
            tmp_path / "none", keys=[Ed25519PrivateKey.generate().public_key()]
        )
    for text in ("", "{}", "[]", "null", '{"statement": "{}", "signature": ""}', "[" * 100_000):
        with pytest.raises(InvalidValue, match="not a checkpoint"):
            audit.read_checkpoint(text)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (2, b"\n"),
        (1, b"position,id\n"),
        (2, b'{"id": 1}\n'),
        (2, b'{"position":"1","id":"x"}\n'),
        (2, b'{"position":99999999999999999999,"id":"x"}\n'),
        (3, b"\xff\xfe\x00"),
        (2, b'{"seal":1}\n'),
        (2, b'{"seal":{"statement":"{}","signature":""}}\n'),
        (2, b'{"seal":' + b"[" * 100_000 + b"\n"),
        (2, b'{"seal":{"statement":{},"signature":""}}\n'),
        (2, b'{"seal":{"statement":"{}","signature":"?"}}\n'),
    ],
)
async def test_a_file_that_is_no_export(tmp_path: Path, line: int, what: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(b'{"position":1,"id":"x"}\n' * (line - 1) + what)
    keys = [Ed25519PrivateKey.generate().public_key()]
    with pytest.raises(InvalidValue, match=f"line {line} is neither an event nor a seal"):
        await audit.verify_export(file, keys=keys)


# Other programs can read it.


async def test_some_events(trail: Trail) -> None:
    """Those that the criteria say, oldest first, without seals."""
    told: list[int] = []
    everything = [json.loads(line) for line in await exported(trail.database)]
    for options, wanted in (
        ({"user_id": "王伟"}, lambda event: event.get("user_id") == "王伟"),
        ({"ip": "192.0.2.0/24"}, lambda event: event.get("ip_address") == "192.0.2.7"),
        ({"resource": "order"}, lambda event: event.get("resource_type") == "order"),
        ({"details": {"symbol": "AAPL"}}, lambda event: "details" in event),
        ({"since": datetime.now(UTC) - timedelta(days=1)}, lambda event: "id" in event),
        ({"until": datetime.now(UTC) - timedelta(days=1)}, lambda _: False),
    ):
        lines = await exported(trail.database, advance=told.append, **options)
        expected = [event for event in everything if wanted(event)]
        assert [json.loads(line) for line in lines] == sorted(expected, key=lambda e: str(e["id"]))
        assert sum(told) == len(expected)
        told.clear()
    with pytest.raises(InvalidValue, match="since"):
        await exported(trail.database, since=datetime(2026, 1, 1))  # noqa: DTZ001  # which is wrong


@pytest.mark.parametrize("options", [{}, {"since": datetime(2020, 1, 1, tzinfo=UTC)}])
async def test_a_spreadsheet(trail: Trail, options: dict[str, Any]) -> None:
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


async def test_what_a_spreadsheet_could_take_for_something_else(signing: Database) -> None:
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


async def test_digits_are_not_lost(signing: Database, superuser: Connection) -> None:
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


async def test_an_export_is_of_one_moment(
    trail: Trail, key: Ed25519PublicKey, tmp_path: Path
) -> None:
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
    """Not 20 MB of it, though more is written."""
    count = TAMPERINGS * 750  # 30,000, or 375,000 in a soak
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
    assert max(exporting, verifying, there) < 20 * 2**20 < file.stat().st_size
    for found in (of_file, in_database):
        assert (found.findings, found.rows) == ([], count)


def test_every_member_is_a_heading() -> None:
    assert {*CSV_COLUMNS} == {*AuditLog.model_fields}
