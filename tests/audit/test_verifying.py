"""Tampering by a superuser with sealed events or seals is found; the first finding names it.

Each tampering happens with triggers disabled, in a transaction that is rolled back. The first of
each way is committed too, for `audit.verify` to find.
"""

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import factories
from tests.support.content_in_sql import CONTENT
from tests.support.trail import (
    SEALS,
    TAMPERINGS,
    Trail,
    assert_found,
    event_found,
    fetch_seals,
    insert_seal,
    stored_events,
)
from tiger_db import AuditAction, AuditResult, AuditSeverity, Database, audit, crud
from tiger_db.audit import AuditFinding, FindingKind
from tiger_db.audit.event_content import CONTENT_COLUMNS
from tiger_db.audit.seal_format import (
    DIGEST_BYTES,
    NO_PREVIOUS_DIGEST,
    Seal,
    SealPayload,
    digest_of,
    make_seal,
    merkle_root,
    ranges_of,
)  # fmt: skip
from tiger_db.audit.sealer import Sealer
from tiger_db.audit.sealing import seal_next
from tiger_db.audit.storage import Connection, database_time

Way: TypeAlias = Callable[[Trail], Awaitable[AuditFinding]]  # returns what is to be found
COPY = """
INSERT INTO audit_logs SELECT (jsonb_populate_record(a, $2::jsonb)).* FROM audit_logs AS a
WHERE position = $1
"""
ENUMS: dict[str, list[str]] = {
    "action": [*AuditAction, "backup:run"], "result": [*AuditResult], "severity": [*AuditSeverity],
}  # fmt: skip
REQUIRED = {"id", "created_at", *ENUMS}
SAVE = "CREATE TABLE kept_logs AS TABLE audit_logs; CREATE TABLE kept_seals AS TABLE audit_seals"
RESTORE = """
TRUNCATE audit_logs, audit_seals;
INSERT INTO audit_logs SELECT * FROM kept_logs;
INSERT INTO audit_seals SELECT * FROM kept_seals
"""


def some_position(trail: Trail) -> int:
    return trail.chance.choice([*trail.ids])


# Changed.


def change(column: str) -> Way:
    async def tamper(trail: Trail) -> AuditFinding:
        position = some_position(trail)
        read = f"SELECT {column}::text FROM audit_logs WHERE position = $1"
        before: str | None = await trail.superuser.fetchval(read, position)
        after = before
        while after == before:
            kind = await trail.superuser.fetchval(
                f"SELECT pg_typeof({column})::text FROM audit_logs"
            )
            await trail.superuser.execute(
                f"UPDATE audit_logs SET {column} = $2::text::{kind} WHERE position = $1",
                position,
                another(column, kind, before, trail.chance),
            )
            after = await trail.superuser.fetchval(read, position)
        print(f"{column} in {position}: {before} -> {(after or 'NULL')[:99]}")  # noqa: T201
        event_id = UUID(after) if column == "id" else trail.ids[position]
        return event_found(trail, FindingKind.CHANGED, position, event_id)

    return tamper


def another(column: str, kind: str, value: str | None, chance: Random) -> str | None:  # noqa: PLR0911  # one for each type
    if column not in REQUIRED and value is not None and chance.random() < 0.2:
        return None
    match kind:
        case "uuid":
            return str(uuid4())
        case "timestamp with time zone":
            return moved_time(str(value), chance)
        case "bigint":
            return str(abs(int(value or 0) + chance.choice([1, -1, 10**9])))
        case "inet":
            return chance.choice(["192.0.2.8", "192.0.2.7/8", "::ffff:192.0.2.7", "2001:db8::8"])
        case "jsonb":
            other = another_json(value, chance)
            return other if other.startswith("{") else f'{{"other": {other}}}'
        case "text" if column not in ENUMS:
            return another_text(value, chance)
        case _:
            return chance.choice(ENUMS[column])


def moved_time(value: str, chance: Random) -> str:
    by = chance.choice([timedelta(microseconds=1), timedelta(seconds=1), timedelta(days=400)])
    return (datetime.fromisoformat(value) + chance.choice([1, -1]) * by).isoformat()


def another_json(value: str | None, chance: Random) -> str:
    """With another digit in a number, or with digits that a float has no room for."""
    numbers = [*re.finditer(r"(?<=: )\d+(\.\d+)?", value or "")]
    if value is None or not numbers or chance.random() < 0.2:
        nested = "[" * 3000 + "]" * 3000
        return chance.choice(["null", "{}", nested, '{"n": 1}', '{"n": 1.0}', '{"n": "1"}'])
    number = chance.choice(numbers)
    digits = number[0]
    if chance.random() < 0.5:
        last = chance.choice("123456789".replace(digits[-1], ""))
        digits = digits[:-1] + last
    else:
        digits += chance.choice(["0", "0" * 20 + "1"]) if "." in digits else ".0"
    return value[: number.start()] + digits + value[number.end() :]


def another_text(value: str | None, chance: Random) -> str:
    value = value or ""
    return chance.choice([value + " ", value[:-1], value.swapcase(), value + "'\"\\\n", "ü"])


# Deleted, inserted later, moved.


async def delete(trail: Trail, first: int, positions: list[int]) -> AuditFinding:
    await trail.superuser.execute("DELETE FROM audit_logs WHERE position = ANY($1)", positions)
    return event_found(trail, FindingKind.DELETED, first)


async def delete_one(trail: Trail) -> AuditFinding:
    position = trail.chance.choice([*trail.ids][:-1])
    return await delete(trail, position, [position])


async def delete_many(trail: Trail) -> AuditFinding:
    positions = trail.chance.sample([*trail.ids][:-1], trail.chance.randrange(2, 20))
    return await delete(trail, min(positions), positions)


async def delete_all_of_a_seal(trail: Trail) -> AuditFinding:
    number = trail.chance.randrange(1, SEALS)
    positions = [position for position in trail.ids if trail.seal_of(position) == number]
    return await delete(trail, positions[0], positions)


async def insert(trail: Trail, position: int | None, **values: Any) -> UUID:
    """A copy of some event with another id, which makes it come before or after others."""
    event_id = trail.chance.choice([uuid4(), UUID(int=trail.chance.getrandbits(64))])
    if position is None:
        position = await trail.superuser.fetchval("SELECT nextval('audit_logs_position_seq')")
    changes = {"id": str(event_id), "position": position} | values
    await trail.superuser.execute(COPY, some_position(trail), json.dumps(changes))
    return event_id


async def insert_beside(trail: Trail) -> AuditFinding:
    position = some_position(trail)
    await insert(trail, position)
    return event_found(trail, FindingKind.DUPLICATE, position)


async def insert_twins(trail: Trail) -> AuditFinding:
    """In a position that is not sealed, before the honest event that gets the position."""
    position = await trail.superuser.fetchval("SELECT max(position) FROM audit_logs")
    await insert(trail, position)
    return event_found(trail, FindingKind.DUPLICATE, position)


async def insert_in_gap(trail: Trail) -> AuditFinding:
    position = trail.chance.choice(trail.gaps)
    return event_found(trail, FindingKind.INSERTED, position, await insert(trail, position))


async def insert_before_all(trail: Trail) -> AuditFinding:
    position = trail.chance.choice([0, -1, -(2**63) + 1, -(2**63)])
    return event_found(trail, FindingKind.INSERTED, position, await insert(trail, position))


async def insert_with_old_time(trail: Trail) -> tuple[int, UUID]:
    """In a position that is not sealed, but dated before the newest seal."""
    payload = trail.chance.choice(trail.payloads)
    assert payload.closed_at is not None
    # 5 seconds are what a clock may differ, and times are compared to the second.
    earlier = timedelta(seconds=6 + trail.chance.choice([0, 1, 10**6]))
    dated = datetime.fromisoformat(payload.closed_at) - earlier
    event_id = await insert(trail, None, created_at=dated.isoformat())
    return await trail.superuser.fetchval(
        "SELECT position FROM audit_logs WHERE id = $1", event_id
    ), event_id


@pytest.mark.slow
@pytest.mark.parametrize("is_sealed", [False, True])
async def test_a_clock_that_went_back_is_a_warning(trail: Trail, is_sealed: bool) -> None:
    """Position and order of seals are the proof, and the writer is not accused."""
    for _ in range(10):
        transaction = trail.superuser.transaction()
        await transaction.start()
        position, event_id = await insert_with_old_time(trail)
        if is_sealed:
            await seal_up_to(trail, position, await database_time(trail.superuser))
        found = await trail.check(trail.checkpoint)
        await transaction.rollback()
        assert found.sound
        (warning,) = found.warnings
        expected = (FindingKind.CLOCK, SEALS + 1, position, str(event_id))
        assert (warning.kind, warning.seal, warning.position, warning.event_id) == expected
        assert "a clock went back, or somebody set the time of the event" in warning.message
    assert (await trail.check(trail.checkpoint)).warnings == []


async def seal_up_to(trail: Trail, position: int, closed_at: str | None) -> None:
    key = await trail.database.signing_key()
    assert key is not None
    sealer = await Sealer.open(trail.superuser, key)
    assert await seal_next(sealer, position, closed_at)


async def move(trail: Trail, position: int, to: int) -> AuditFinding:
    await trail.superuser.execute(
        "UPDATE audit_logs SET position = $2 WHERE position = $1", position, to
    )
    return event_found(trail, FindingKind.MOVED, position, trail.ids[position])


async def move_to_gap(trail: Trail) -> AuditFinding:
    return await move(trail, some_position(trail), trail.chance.choice(trail.gaps))


async def move_beside(trail: Trail) -> AuditFinding:
    position, to = trail.chance.sample([*trail.ids], 2)
    return await move(trail, position, to)


async def move_to_the_end(trail: Trail) -> AuditFinding:
    to = await trail.superuser.fetchval("SELECT nextval('audit_logs_position_seq')")
    return await move(trail, some_position(trail), to)


async def move_before_all(trail: Trail) -> AuditFinding:
    return await move(trail, some_position(trail), -trail.chance.randrange(10))


async def swap(trail: Trail) -> AuditFinding:
    one, two = sorted(trail.chance.sample([*trail.ids], 2))
    await trail.superuser.execute(
        "UPDATE audit_logs SET position = $1 + $2 - position WHERE position IN ($1, $2)", one, two
    )
    return event_found(trail, FindingKind.MOVED, one, trail.ids[one])


# Truncated.


async def delete_last_events(trail: Trail) -> AuditFinding:
    first = some_position(trail)
    await trail.superuser.execute("DELETE FROM audit_logs WHERE position >= $1", first)
    return event_found(trail, FindingKind.TRUNCATED, first)


async def delete_last_seals(trail: Trail) -> AuditFinding:
    """Their events stay, as if they had not been sealed yet."""
    number = trail.chance.randrange(1, SEALS + 1)
    await trail.superuser.execute("DELETE FROM audit_seals WHERE number >= $1", number)
    return AuditFinding(FindingKind.TRUNCATED, "", number)


async def delete_last_seals_and_events(trail: Trail) -> AuditFinding:
    found = await delete_last_seals(trail)
    assert found.seal is not None
    after = trail.payloads[found.seal - 1].after
    await trail.superuser.execute("DELETE FROM audit_logs WHERE position > $1", after)
    # What is left is a sound trail, as it was once: only what was kept elsewhere shows it.
    assert (await trail.check(None)).sound
    return found


# Forged.


async def kept(trail: Trail, number: int) -> Seal:
    ((_, found),) = await fetch_seals(trail.superuser, number - 1, 1)
    return found


async def forge(trail: Trail, number: int, seal: Seal) -> AuditFinding:
    await trail.superuser.execute(
        "UPDATE audit_seals SET statement = $2, signature = $3, digests = $4 WHERE number = $1",
        number,
        seal.payload_json,
        seal.signature,
        seal.digests,
    )
    return AuditFinding(FindingKind.FORGED, "", number)


def some_seal(trail: Trail) -> int:
    return trail.chance.randrange(1, SEALS + 1)


VALUES: tuple[Any, ...] = (
    0, 1, 2, SEALS + 1, -1, 10**30, 2**63 - 1, 0.5, "", "2", [], [[1, 2]], [[2, 1]], [[1, 10**18]],
    [[10**30, 10**30]], [[-(2**63), 0]], [1], None, True, {},
)  # fmt: skip


async def edit_statement(trail: Trail) -> AuditFinding:
    """A member gets another value, now and then of another type."""
    number = some_seal(trail)
    seal = await kept(trail, number)
    fields = json.loads(seal.payload_json)
    name = trail.chance.choice([*fields])
    text = seal.payload_json
    while text == seal.payload_json:
        fields[name] = trail.chance.choice(VALUES)
        text = json.dumps(fields, separators=(",", ":"))
    print(f"{name}: {fields[name]}")  # noqa: T201
    return await forge(trail, number, replace(seal, payload_json=text))


async def spoil_statement(trail: Trail) -> AuditFinding:
    number = some_seal(trail)
    seal = await kept(trail, number)
    at = trail.chance.randrange(len(seal.payload_json))
    other = trail.chance.choice([*{"0", "x", '"', "[", " ", ""} - {seal.payload_json[at]}])
    text = trail.chance.choice(
        ["", "{}", "[]", seal.payload_json[:at] + other + seal.payload_json[at + 1 :]]
    )
    print(text)  # noqa: T201
    return await forge(trail, number, replace(seal, payload_json=text))


def spoilt(data: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(data))
    other = bytes([data[at] ^ 1 << chance.randrange(8)])
    return chance.choice([data[:at] + other + data[at + 1 :], data[:at], data + other, b""])


async def edit_signature(trail: Trail) -> AuditFinding:
    number = some_seal(trail)
    seal = await kept(trail, number)
    signature = spoilt(seal.signature, trail.chance)
    return await forge(trail, number, replace(seal, signature=signature))


async def edit_digests(trail: Trail) -> AuditFinding:
    number = some_seal(trail)
    seal = await kept(trail, number)
    digests = trail.chance.choice(
        [
            spoilt(seal.digests, trail.chance),
            seal.digests[DIGEST_BYTES:] + seal.digests[:DIGEST_BYTES],
        ]
    )
    return await forge(trail, number, replace(seal, digests=digests))


async def extend_digests(trail: Trail) -> AuditFinding:
    number = some_seal(trail)
    seal = await kept(trail, number)
    more = trail.chance.randbytes(trail.chance.choice([1, DIGEST_BYTES]))
    return await forge(trail, number, replace(seal, digests=seal.digests + more))


async def sign_again(trail: Trail) -> AuditFinding:
    number = some_seal(trail)
    seal = await kept(trail, number)
    signature = Ed25519PrivateKey.generate().sign(seal.payload_json.encode())
    return await forge(trail, number, replace(seal, signature=signature))


async def delete_seal(trail: Trail) -> AuditFinding:
    number = trail.chance.randrange(1, SEALS)
    await trail.superuser.execute("DELETE FROM audit_seals WHERE number = $1", number)
    return AuditFinding(FindingKind.FORGED, "", number)


async def delete_seal_and_events(trail: Trail) -> AuditFinding:
    found = await delete_seal(trail)
    positions = [position for position in trail.ids if trail.seal_of(position) == found.seal]
    await trail.superuser.execute("DELETE FROM audit_logs WHERE position = ANY($1)", positions)
    return found


async def swap_seals(trail: Trail) -> AuditFinding:
    one, two = sorted(trail.chance.sample(range(1, SEALS + 1), 2))
    seals = [await kept(trail, number) for number in (one, two)]
    await forge(trail, two, seals[0])
    return await forge(trail, one, seals[1])


async def repeat_seal(trail: Trail) -> AuditFinding:
    await trail.superuser.execute(
        "INSERT INTO audit_seals SELECT $2, statement, signature, digests FROM audit_seals"
        " WHERE number = $1",
        some_seal(trail),
        SEALS + 1,
    )
    return AuditFinding(FindingKind.FORGED, "", SEALS + 1)


async def forge_all(trail: Trail) -> AuditFinding:
    """Events are rewritten, and a seal is made for them as the true one was, but for its key."""
    return await forge_with(trail, Ed25519PrivateKey.generate(), some_position(trail))


async def forge_with_the_key(trail: Trail) -> AuditFinding:
    """The same with the true key: the next seal was made after another one."""
    key = await trail.database.signing_key()
    assert key is not None
    position = trail.chance.choice(
        [position for position in trail.ids if trail.seal_of(position) < SEALS]
    )
    found = await forge_with(trail, key, position)
    assert found.seal is not None
    return replace(found, seal=found.seal + 1)


async def forge_with(trail: Trail, key: Ed25519PrivateKey, position: int) -> AuditFinding:
    await trail.superuser.execute(
        "UPDATE audit_logs SET user_id = concat(user_id, 'eve') WHERE position = $1", position
    )
    payload = trail.payloads[trail.seal_of(position) - 1]
    events = await stored_events(trail.superuser, payload.after + 1, payload.upto)
    leaves = [(position, digest_of(content)) for position, content in events]
    payload = replace(payload, root=merkle_root(leaves).hex())
    seal = make_seal(key, payload, b"".join(digest for _, digest in leaves))
    return await forge(trail, payload.number, seal)


# Rewritten by who has the key.


async def rewrite(trail: Trail) -> AuditFinding:
    """An event is changed, and all seals from there on are made again, as if it had been so."""
    position = some_position(trail)
    await trail.superuser.execute(
        "UPDATE audit_logs SET user_id = concat(user_id, 'eve') WHERE position = $1", position
    )
    first = trail.seal_of(position)
    await trail.superuser.execute("DELETE FROM audit_seals WHERE number >= $1", first)
    for payload in trail.payloads[first - 1 :]:
        await seal_up_to(trail, payload.upto, payload.closed_at)
    # It is as sound as any: the key made it. Only what was kept elsewhere shows it.
    assert (await trail.check(None)).sound
    # If all seals are made again, the trail has another origin from the first seal on.
    return AuditFinding(FindingKind.CHECKPOINT, "", SEALS if first > 1 else 1)


async def rewrite_with_the_same_times(trail: Trail) -> AuditFinding:
    """The whole trail, such that nothing differs but what was changed."""
    key = await trail.database.signing_key()
    assert key is not None
    await trail.superuser.execute(
        "DELETE FROM audit_logs WHERE position = $1", trail.chance.choice([*trail.ids])
    )
    await trail.superuser.execute("DELETE FROM audit_seals")
    previous = NO_PREVIOUS_DIGEST
    for payload in trail.payloads:
        events = await stored_events(trail.superuser, payload.after + 1, payload.upto)
        leaves = [(position, digest_of(content)) for position, content in events]
        again: SealPayload = replace(
            payload,
            previous=previous,
            positions=ranges_of(position for position, _ in leaves),
            root=merkle_root(leaves).hex(),
        )
        digests = b"".join(digest for _, digest in leaves)
        await insert_seal(trail.superuser, key, again, digests)
        previous = make_seal(key, again, digests).payload_digest
    assert (await trail.check(None)).sound
    return AuditFinding(FindingKind.CHECKPOINT, "", SEALS)


WAYS: dict[FindingKind, list[Way]] = {
    FindingKind.CHANGED: [change(column) for column in CONTENT_COLUMNS],
    FindingKind.DELETED: [delete_one, delete_many, delete_all_of_a_seal],
    FindingKind.INSERTED: [insert_in_gap, insert_before_all],
    FindingKind.DUPLICATE: [insert_beside, insert_twins],
    FindingKind.MOVED: [move_to_gap, move_beside, move_to_the_end, move_before_all, swap],
    FindingKind.TRUNCATED: [delete_last_events, delete_last_seals, delete_last_seals_and_events],
    FindingKind.FORGED: [
        edit_statement,
        spoil_statement,
        edit_signature,
        edit_digests,
        extend_digests,
        sign_again,
        delete_seal,
        delete_seal_and_events,
        swap_seals,
        repeat_seal,
        forge_all,
        forge_with_the_key,
    ],
    FindingKind.CHECKPOINT: [rewrite, rewrite_with_the_same_times],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WAYS)
async def test_every_tampering_is_found_and_named(trail: Trail, kind: FindingKind) -> None:
    ways = WAYS[kind]
    needs_checkpoint = kind in {FindingKind.TRUNCATED, FindingKind.CHECKPOINT}
    for number in range(TAMPERINGS):
        way = ways[number % len(ways)]
        checkpoint = trail.checkpoint if needs_checkpoint or trail.chance.random() < 0.5 else None
        transaction = trail.superuser.transaction()
        await transaction.start()
        try:
            expected = await way(trail)
            verification = await trail.check(checkpoint)
        finally:
            await transaction.rollback()
        assert_found(verification, expected, f"{number}: {way.__qualname__}")
    sound = await trail.check(trail.checkpoint)
    assert (sound.findings, sound.rows, sound.seals, sound.unsealed) == ([], 60, SEALS, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WAYS)
async def test_verify_finds_committed_tampering(trail: Trail, kind: FindingKind) -> None:
    await trail.superuser.execute(SAVE)
    ways = WAYS[kind] if kind != FindingKind.CHANGED else trail.chance.sample(WAYS[kind], 3)
    for way in ways:
        async with trail.superuser.transaction():
            expected = await way(trail)
        verification = await audit.verify(trail.database, checkpoint=trail.checkpoint)
        assert_found(verification, expected, way.__qualname__)
        await trail.superuser.execute(RESTORE)
    assert (await audit.verify(trail.database, checkpoint=trail.checkpoint)).sound


@pytest.mark.slow
async def test_any_forged_payload_is_a_finding(trail: Trail) -> None:
    """None of it makes verification fail in another way than by a finding."""
    for number in (1, SEALS):
        seal = await kept(trail, number)
        fields = json.loads(seal.payload_json)
        for name in [*fields, "retired", "next_key"]:
            for value in VALUES:
                text = json.dumps(fields | {name: value}, separators=(",", ":"))
                if text == seal.payload_json:
                    continue
                transaction = trail.superuser.transaction()
                await transaction.start()
                expected = await forge(trail, number, replace(seal, payload_json=text))
                verification = await trail.check(None)
                await transaction.rollback()
                assert_found(verification, expected, f"{name}: {value}")


@pytest.mark.slow
async def test_a_checkpoint_signed_with_another_key_is_a_finding(trail: Trail) -> None:
    forged = make_seal(Ed25519PrivateKey.generate(), trail.payloads[-1], b"")
    (found,) = (await audit.verify(trail.database, checkpoint=forged)).findings
    assert found.kind == FindingKind.CHECKPOINT


@pytest.mark.slow
async def test_a_checkpoint_does_not_cover_later_seals(trail: Trail) -> None:
    """An old checkpoint stands for what was sealed before it."""
    earlier = await kept(trail, 3)
    async with trail.superuser.transaction():
        await trail.superuser.execute("DELETE FROM audit_seals WHERE number > 3")
        position = trail.payloads[3].after + 1
        await trail.superuser.execute("DELETE FROM audit_logs WHERE position = $1", position)
        await seal_up_to(trail, trail.end, trail.payloads[-1].closed_at)
    assert (await trail.check(earlier)).sound
    (found,) = (await trail.check(trail.checkpoint)).findings
    assert (found.kind, found.seal) == (FindingKind.CHECKPOINT, SEALS)


# Functions, operators and casts of the schema print the event as it was.

_LOW = "RETURNS json LANGUAGE sql RETURN '\"low\"'::json"
CAPTURES = {
    "a function with exactly the arguments": (
        (
            f"CREATE FUNCTION concat({', '.join(['text'] * (len(CONTENT_COLUMNS) + 1))})"
            " RETURNS text LANGUAGE sql RETURN %s"
        ),
        "user_id = 'eve'",
    ),
    "a function with exactly the type": (
        f"CREATE FUNCTION seal_to_json(audit_severity) {_LOW}",
        "severity = 'critical'",
    ),
    "a cast that to_json uses": (
        (
            f"CREATE FUNCTION low(audit_severity) {_LOW};"
            "CREATE CAST (audit_severity AS json) WITH FUNCTION low(audit_severity)"
        ),
        "severity = 'critical'",
    ),
    "a cast to text": (
        (
            "CREATE FUNCTION low(audit_severity) RETURNS text LANGUAGE sql RETURN 'low';"
            "CREATE CAST (audit_severity AS text) WITH FUNCTION low(audit_severity) AS IMPLICIT"
        ),
        "severity = 'critical'",
    ),
    "an operator of positions": (
        (
            "CREATE FUNCTION kept(bigint, bigint) RETURNS boolean LANGUAGE sql"
            " RETURN false; CREATE OPERATOR >= (LEFTARG = bigint, RIGHTARG = bigint,"
            " FUNCTION = kept)"
        ),
        "severity = 'critical'",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("capture", CAPTURES)
async def test_objects_of_the_schema_cannot_change_what_is_verified(
    signing: Database, superuser: Connection, capture: str
) -> None:
    async with signing.session() as session:
        event = factories.new_event(severity=AuditSeverity.LOW)
        await crud.audit_logs.log_events(session, [event])
    await audit.seal(signing)
    content = await superuser.fetchval(f"SELECT quote_literal({CONTENT}) FROM audit_logs")
    create, change = CAPTURES[capture]
    await superuser.execute(create.replace("%s", content))
    assert (await audit.verify(signing)).sound
    await superuser.execute(f"UPDATE audit_logs SET {change}")
    (found,) = (await audit.verify(signing)).findings
    assert found.kind == FindingKind.CHANGED
