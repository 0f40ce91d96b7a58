"""A month is retired only by seals of the verified chain, not by seals that an attacker swapped in.

The attacker owns the database, and wants the sealer to sign a retirement that excuses the absence
of an event that must be kept.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.months import put
from tests.support.trail import (
    fetch_seals,
    insert_seal,
    log_seals,
    stored_events,
    with_signing_key,
)
from tiger_db import Database, Settings, audit
from tiger_db.audit import FindingKind
from tiger_db.audit.seal_format import Seal, digest_of, merkle_root, split_digests
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState

VICTIM = 5  # position of the event that shall vanish
OLD = datetime.now(UTC) - timedelta(days=800)
MOVE = "UPDATE audit_logs SET id = $1, created_at = $2 WHERE position = $3"
RESTORE = "UPDATE audit_seals SET statement = $2, signature = $3, digests = $4 WHERE number = $1"


@pytest.fixture(params=[True, False], ids=["folder", "no folder"])
async def database(
    clone_settings: Settings, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Database]:
    """Twelve sealed events in four seals."""
    folder = tmp_path if request.param else None
    changed = {"audit_checkpoints": folder, "audit_retention_months": 12}
    async with Database(with_signing_key(clone_settings, **changed)) as database:
        await log_seals(database, 3, 3, 3, 3)
        yield database


async def make_old(owner: Connection) -> None:
    """Move the event of this month to a month that is due for retirement."""
    await owner.execute("SELECT make_audit_partition($1)", OLD.replace(tzinfo=None))
    milliseconds = int(OLD.timestamp() * 1000)
    await owner.execute(MOVE, UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62), OLD, VICTIM)


async def forge(owner: Connection, seal: Seal, *, root: bool) -> None:
    """Put a seal in place of the seal of the event that covers the event as it is now."""
    events = await stored_events(owner, 4, 6)
    digests = b"".join(digest_of(content) for _, content in events)
    payload = seal.payload()
    if root:
        leaves = zip([4, 5, 6], split_digests(digests), strict=True)
        payload = replace(payload, root=merkle_root(leaves).hex())
    await owner.execute("DELETE FROM audit_seals WHERE number = 2")
    await insert_seal(owner, Ed25519PrivateKey.generate(), payload, digests)


@pytest.mark.slow
@pytest.mark.parametrize("root", [True, False], ids=["other root", "other digests"])
async def test_a_seal_that_is_swapped_in_for_a_moment_retires_nothing(
    database: Database, owner: Connection, root: bool
) -> None:
    ((_, true),) = await fetch_seals(owner, 1, 1)
    await make_old(owner)
    await forge(owner, true, root=root)
    if root:
        with pytest.raises(InvalidState, match="seal 2 or seal 3 was replaced"):
            await audit.maintain(database)
    else:
        (reason,) = (await audit.maintain(database)).kept.values()
        assert reason.startswith("the digests of seal 2 do not match its Merkle root")
    await owner.execute(RESTORE, 2, true.payload_json, true.signature, true.digests)
    await owner.execute("SET session_replication_role = origin")
    kept = await audit.maintain(database)
    assert (kept.retired, [*kept.kept.values()]) == (
        [],
        ["the event at position 5 differs from the sealed event: run `tiger-db verify-audit`"],
    )
    found = await audit.verify(database)
    assert found.retired == 0
    assert [(one.kind, one.position) for one in found.findings] == [(FindingKind.CHANGED, VICTIM)]


@pytest.mark.slow
async def test_a_retirement_that_is_swapped_in_for_a_moment_excuses_nothing(
    database: Database, owner: Connection
) -> None:
    """The month lacks an event that was deleted. The forged retirement lists its position."""
    await put(owner, 14)  # events at the positions 13 to 15
    await owner.execute("SELECT make_audit_months(0)")
    await log_seals(database, 1, 1)
    ((_, true),) = await fetch_seals(owner, 0, 1)
    await owner.execute("DELETE FROM audit_logs WHERE position = 14")
    await owner.execute("DELETE FROM audit_seals WHERE number = 1")
    forged = replace(true.payload(), upto=0, positions=((14, 14),), retired="2001-01")
    await insert_seal(owner, Ed25519PrivateKey.generate(), forged, b"")
    with pytest.raises(InvalidState, match="seal 1 or seal 2 was replaced"):
        await audit.maintain(database)


@pytest.mark.slow
async def test_an_old_seal_that_cannot_be_read_keeps_the_month(
    database: Database, owner: Connection
) -> None:
    await make_old(owner)
    await owner.execute("UPDATE audit_seals SET statement = 'x' WHERE number = 1")
    with pytest.raises(InvalidState, match="a seal cannot be read: run `tiger-db verify-audit`"):
        await audit.maintain(database)
