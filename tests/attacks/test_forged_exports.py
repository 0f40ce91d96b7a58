"""Exports of the whole trail that somebody has changed after `export` wrote them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.independent_verifier import run
from tests.support.trail import events_of, exported, log_seals, with_signing_key
from tiger_db import Database, Settings, audit
from tiger_db.audit import FindingKind
from tiger_db.errors import InvalidValue
from tiger_db.signing import public_text

pytestmark = pytest.mark.slow


@pytest.fixture
async def database(clone_settings: Settings) -> AsyncIterator[Database]:
    """Six sealed events in two seals."""
    async with Database(with_signing_key(clone_settings)) as database:
        await log_seals(database, 3, 3)
        yield database


@pytest.mark.parametrize("position", [2, 5])
async def test_an_event_before_its_seal_is_found(
    database: Database, tmp_path: Path, position: int
) -> None:
    """A reader of the file finds two events at the position, of which one was never sealed."""
    key = await database.signing_key()
    assert key is not None
    lines = await exported(database)
    forged = lines[events_of(lines)[position]].replace('"result":"', '"result":"not ')
    lines.insert(0, forged)
    answer = run(lines, public_text(key.public_key()), tmp_path)
    assert answer == "refused: seal 1 breaks the chain"
    found = await audit.verify_export(tmp_path / "trail.jsonl", keys=[key.public_key()])
    assert [(one.kind, one.seal, one.position) for one in found.findings] == [
        (FindingKind.INSERTED, 1 if position <= 3 else 2, position)
    ]


@pytest.mark.parametrize("digits", ["02", "\u0662", "2_", "+2", " 2"])
async def test_a_position_in_another_form_is_refused(
    database: Database, tmp_path: Path, digits: str
) -> None:
    key = await database.signing_key()
    assert key is not None
    text = "".join(await exported(database))
    path = tmp_path / "trail.jsonl"
    path.write_text(text.replace('{"position":2,', f'{{"position":{digits},'))
    with pytest.raises(InvalidValue, match="is neither an event nor a seal"):
        await audit.verify_export(path, keys=[key.public_key()])
