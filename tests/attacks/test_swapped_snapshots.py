"""A database that its owner changes for a moment, so that a changed archive looks unchanged.

The files of a month that is not retired are compared in a newer snapshot than the trail.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.archives import (
    database,
    events,
    folder,
    other,
    put_old_months,
    replace_column,
    rewrite,
)
from tests.support.months import month
from tests.support.trail import fetch_seals, insert_seal, log_seals, stored_events
from tiger_db import Database, audit
from tiger_db.audit import FindingKind
from tiger_db.audit.archive_verifying import _ArchiveVerifier
from tiger_db.audit.seal_format import digest_of, merkle_root, split_digests
from tiger_db.audit.storage import Connection

__all__ = ["database", "folder", "other"]  # fixtures
pytestmark = pytest.mark.slow
Run = Callable[[Callable[[], Awaitable[object]]], Awaitable[list[tuple[FindingKind, str]]]]


@pytest.fixture
def verify_while(database: Database, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that verifies the archive, with a change between the snapshots."""
    list_files = _ArchiveVerifier.list_files

    async def run(change: Callable[[], Awaitable[object]]) -> list[tuple[FindingKind, str]]:
        loop = asyncio.get_running_loop()

        async def awaited() -> None:
            await change()

        def list_files_and_change(verifier: _ArchiveVerifier) -> None:
            list_files(verifier)
            asyncio.run_coroutine_threadsafe(awaited(), loop).result()

        # The database is changed exactly between the two snapshots.
        monkeypatch.setattr(_ArchiveVerifier, "list_files", list_files_and_change)
        found = await audit.verify(database, archive=True)
        return [(one.kind, one.message) for one in found.findings]

    return run


def changed(content: str) -> str:
    return content.replace("data:query", "data:qu3ry")


def change_file(folder: Path) -> None:
    def change(table: Any) -> Any:
        table = replace_column(table, "action", ["data:qu3ry"] * 3)
        rows = [changed(content) for content in table["content"].to_pylist()]
        return replace_column(table, "content", rows)

    rewrite(events(folder, 14), change)


@pytest.mark.parametrize("later", [0, 1], ids=["newest seal", "older seal"])
@pytest.mark.parametrize("root", [True, False], ids=["other root", "other digests"])
async def test_a_seal_of_a_changed_file_is_found(
    database: Database,
    other: Connection,
    folder: Path,
    verify_while: Run,
    *,
    root: bool,
    later: int,
) -> None:
    await put_old_months(database, other)
    await audit.archive(database, month(14))
    await log_seals(database, *[1] * later)
    change_file(folder)
    ((_, true),) = await fetch_seals(other, 0, 1)
    contents = [content for _, content in await stored_events(other, 1, 6)]
    digests = b"".join(map(digest_of, [*map(changed, contents[:3]), *contents[3:]]))
    payload = true.payload()
    if root:
        leaves = zip(range(1, 7), split_digests(digests), strict=True)
        payload = replace(payload, root=merkle_root(leaves).hex())

    async def swap() -> None:
        await other.execute("DELETE FROM audit_seals WHERE number = 1")
        await insert_seal(other, Ed25519PrivateKey.generate(), payload, digests)

    ((kind, message),) = await verify_while(swap)
    assert kind is FindingKind.FORGED
    assert message.startswith("the seals were changed while the archive was verified: seal 1")


async def test_seals_that_are_missing_for_a_moment_are_found(
    database: Database, other: Connection, verify_while: Run
) -> None:
    await put_old_months(database, other)
    await audit.archive(database, month(14))
    await log_seals(database, 1)
    found = await verify_while(lambda: other.execute("DELETE FROM audit_seals WHERE number = 2"))
    message = "the seals were changed while the archive was verified: seal 2 is missing"
    assert found == [(FindingKind.FORGED, message)]


async def test_an_event_that_is_missing_for_a_moment_excuses_no_file(
    database: Database, other: Connection, folder: Path, verify_while: Run
) -> None:
    import pyarrow as pa  # noqa: PLC0415  # an extra

    await put_old_months(database, other)
    await audit.archive(database, month(14))
    path = events(folder, 14)
    rewrite(path, lambda table: table.take(pa.array([0, 2])))
    found = await verify_while(lambda: other.execute("DELETE FROM audit_logs WHERE position = 2"))
    message = f"{path.relative_to(folder)}: the event at position 2 is missing"
    assert found == [(FindingKind.ARCHIVE, message)]
