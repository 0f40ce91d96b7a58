"""Verification of exports without a database: every tampering with a file is found."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tests.support.trail import (
    SEALS,
    TAMPERINGS,
    Trail,
    assert_found,
    event_found,
    events_of,
    exported,
    fill,
    seals_of,
)
from tiger_db import AuditAction, Database, audit, crud
from tiger_db.audit import AuditFinding, FindingKind
from tiger_db.audit.seal_format import make_seal, seal_from_json, seal_to_json
from tiger_db.errors import ConfigurationError, InvalidValue, NotFound

Way: TypeAlias = Callable[
    [Trail, list[str]], AuditFinding
]  # changes the lines; what is to be found


@pytest.mark.slow
async def test_an_export_is_verified_without_a_database(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    file = tmp_path / "trail.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    told: list[tuple[int, int | None]] = []
    await trail.database.close()
    for checkpoint in (None, trail.checkpoint):
        found = await audit.verify_export(
            file,
            keys=[Ed25519PrivateKey.generate().public_key(), key],
            checkpoint=checkpoint,
            progress=lambda done, total: told.append((done, total)),
        )
        assert found.findings == []
        assert (found.sound, found.seals, found.rows, found.unsealed) == (True, SEALS, 60, 3)
    assert told[-1] == (file.stat().st_size,) * 2
    assert sorted(told[: len(told) // 2]) == told[: len(told) // 2]


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
    kind = FindingKind.INSERTED if near != position else FindingKind.DUPLICATE
    fields = json.loads(lines[at[near]]) | {"position": position, "id": str(event_id)}
    after = 1 if near != position else trail.chance.choice([0, 1])
    lines.insert(at[near] + after, json.dumps(fields, separators=(",", ":")) + "\n")
    return event_found(trail, kind, position, event_id if near != position else None)


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
@pytest.mark.slow
async def test_every_tampering_with_a_file_is_found_and_named(
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


@pytest.mark.slow
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


@pytest.mark.slow
async def test_crlf_line_ends_are_accepted(
    lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    file = tmp_path / "trail.jsonl"
    file.write_bytes("".join(lines).replace("\n", "\r\n").encode())
    assert (await audit.verify_export(file, keys=[key])).sound


@pytest.mark.slow
async def test_a_file_cut_within_a_line_is_found_or_refused(
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
            assert f"line {last + 1} of the export is neither" in str(error)  # noqa: PT017  # one or the other
        else:
            assert found.findings[0].kind in {FindingKind.CHANGED, FindingKind.TRUNCATED}
            assert found.findings[0].position == [*trail.ids][-1]


@pytest.mark.slow
async def test_a_rewritten_trail_does_not_match_the_checkpoint(
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
    assert (found.kind, found.seal) == (FindingKind.CHECKPOINT, 1)  # another origin


async def test_missing_keys_and_checkpoints_are_refused(signing: Database, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="the audit trail has no seal yet"):
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
async def test_a_file_that_is_not_an_export_is_refused(
    tmp_path: Path, line: int, what: bytes
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b'{"position":1,"id":"x"}\n' * (line - 1) + what)
    keys = [Ed25519PrivateKey.generate().public_key()]
    with pytest.raises(
        InvalidValue, match=f"line {line} of the export is neither an event nor a seal"
    ):
        await audit.verify_export(file, keys=keys)
