"""The verifier in examples/, which does not use tiger_db, agrees with tiger_db about exports."""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tests.support.independent_verifier import PROGRAM, run
from tests.support.trail import SEALS, Trail, events_of, exported, seals_of
from tiger_db import audit
from tiger_db.audit.seal_format import seal_from_json, seal_to_json
from tiger_db.signing import public_text

Change = Callable[[list[str]], None]


def test_the_program_is_short_and_needs_only_cryptography() -> None:
    source = PROGRAM.read_text("utf-8")
    assert len([line for line in source.splitlines() if line.strip()]) <= 60
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"cryptography"}


@pytest.mark.slow
async def test_a_sound_export_is_sound(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    checkpoint = await audit.export_checkpoint(trail.database)
    expected = f"sound: {SEALS} seals, 63 events, 3 of them not sealed yet"
    assert run(lines, public_text(key), tmp_path) == expected
    assert run(lines, public_text(key), tmp_path, checkpoint) == expected


@pytest.mark.slow
async def test_a_changed_signing_key_is_followed(
    trail: Trail, key: Ed25519PublicKey, tmp_path: Path
) -> None:
    new = Ed25519PrivateKey.generate()
    await audit.change_signing_key(trail.database, new)
    lines = await exported(trail.database)
    assert run(lines, public_text(key), tmp_path).startswith(f"sound: {SEALS + 2} seals")
    assert run(lines, public_text(new.public_key()), tmp_path).startswith("refused: ")


def change_an_event(lines: list[str]) -> None:
    at = events_of(lines)[1]
    lines[at] = lines[at].replace('"result":', '"result": ')


def delete_an_event(lines: list[str]) -> None:
    del lines[events_of(lines)[2]]


def repeat_an_event(lines: list[str]) -> None:
    at = events_of(lines)[2]
    lines.insert(at, lines[at])


def delete_a_seal(lines: list[str]) -> None:
    del lines[seals_of(lines)[1]]


def cut_the_end(lines: list[str]) -> None:
    del lines[seals_of(lines)[-1] :]


def swap_digests(lines: list[str]) -> None:
    at = seals_of(lines)[0]
    seal = seal_to_json(seal_from_json(json.loads(lines[at])["seal"]))
    seal["digests"] = seal_to_json(seal_from_json(json.loads(lines[seals_of(lines)[1]])["seal"]))[
        "digests"
    ]
    lines[at] = json.dumps({"seal": seal}) + "\n"


def forge_a_statement(lines: list[str]) -> None:
    at = seals_of(lines)[2]
    lines[at] = lines[at].replace('\\"upto\\":', '\\"upto\\":1')


CHANGES = {
    change_an_event: "was changed or inserted",
    delete_an_event: "events are missing at the positions [2]",
    repeat_an_event: "was changed or inserted",
    delete_a_seal: "seal 2 breaks the chain",
    cut_the_end: "seals are missing",
    swap_digests: "seal 1: wrong Merkle root",
    forge_a_statement: "InvalidSignature",
}


@pytest.mark.slow
async def test_each_change_is_refused(
    trail: Trail, lines: list[str], key: Ed25519PublicKey, tmp_path: Path
) -> None:
    checkpoint = await audit.export_checkpoint(trail.database)
    for change, reason in CHANGES.items():
        changed = [*lines]
        change(changed)
        said = run(changed, public_text(key), tmp_path, checkpoint)
        assert said.startswith("refused: "), change
        assert reason in said, change
