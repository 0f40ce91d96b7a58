"""The archive as part of the audit trail: reading of retired events, and verification of files."""

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from tiger_db.audit import storage
from tiger_db.audit.archive_files import (
    Archive,
    is_leftover,
    origin_of,
    parse_name,
    read_events,
)
from tiger_db.audit.chain import AuditFinding, FindingKind
from tiger_db.audit.event_content import Event
from tiger_db.audit.months import fetch_retirements, seals_between
from tiger_db.audit.seal_format import (
    MerkleTree,
    PositionRanges,
    Seal,
    SealPayload,
    digest_of,
)
from tiger_db.audit.storage import Connection
from tiger_db.errors import FileError, InvalidState, InvalidValue
from tiger_db.public import Progress

_BATCH_EVENTS = 1000


# Reading


async def read_archived_events(
    connection: Connection, archive: Archive
) -> AsyncGenerator[list[Event], None]:
    """Yield the events in files that retirements have signed, in batches in order of position.

    Raises:
        FileError: A file is missing or cannot be read.
        InvalidState: A file differs from the file that the retirement signed.
    """
    payloads = [seal.payload() for seal in await fetch_retirements(connection)]
    events = _merge(archive, payloads)
    while batch := await asyncio.to_thread(lambda: [*islice(events, _BATCH_EVENTS)]):
        yield batch


def _merge(archive: Archive, payloads: Iterable[SealPayload]) -> Iterator[Event]:
    """Yield the events of all months in order of position. Few files are open at a time."""
    waiting = sorted(
        (payload.positions[0][0], payload.number, payload)
        for payload in payloads
        if payload.archive
    )
    waiting.reverse()
    # The next event of each open month, with the number of the retirement as a second key.
    heads: list[tuple[int, int, str, Iterator[Event]]] = []
    while waiting or heads:
        while waiting and (not heads or waiting[-1][0] <= heads[0][0]):
            _, number, payload = waiting.pop()
            events = _read_month(archive, payload)
            for position, content in islice(events, 1):
                heapq.heappush(heads, (position, number, content, events))
        if not heads:
            continue
        position, number, content, events = heads[0]
        yield position, content
        following = next(events, None)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, (following[0], number, following[1], events))


def _read_month(archive: Archive, payload: SealPayload) -> Iterator[Event]:
    for name, _, digest in payload.archive or ():
        if _is_of_seals(name):
            continue
        with archive.read(name) as (copy, found):
            if found != digest:
                raise InvalidState(
                    f"the archive: {name} differs from the file that seal {payload.number} signed:"
                    " run `tiger-db verify-audit --archive`"
                )
            yield from read_events(copy)


async def merge_archived_events(
    trail: AsyncIterator[Seal | Event], batches: AsyncIterator[list[Event]]
) -> AsyncGenerator[Seal | Event, None]:
    """Insert the archived events into the trail, each after the seal that covers it."""
    archived = (event async for batch in batches for event in batch)
    following = await anext(archived, None)
    covered = 0
    async for item in trail:
        last = covered if isinstance(item, Seal) else item[0] - 1
        while following is not None and following[0] <= last:
            yield following
            following = await anext(archived, None)
        if isinstance(item, Seal):
            covered = max(covered, storage.extent_of(item)[0])
        yield item
    while following is not None:
        yield following
        following = await anext(archived, None)


# Verification


@dataclass(slots=True)
class ArchiveReport:
    """The result of a verification of the archive."""

    events: int = 0  # Number of retired events that the archive has unchanged.
    files: int = 0  # Number of unchanged files that retirements have signed.
    unretired: int = 0  # Number of sealed events in the archive that are not retired yet.
    findings: list[tuple[int, AuditFinding]] = field(default_factory=list)  # with sort keys
    leftovers: list[str] = field(default_factory=list)  # Names of files that may be deleted.


async def verify_archive(
    connection: Connection,
    archive: Archive,
    payloads: list[SealPayload],
    origin: str | None,
    progress: Progress,
) -> ArchiveReport:
    """Verify the files of the archive against the seals, in a snapshot of the database.

    `payloads` are those of verified retirements, and `origin` is the identity of the trail.
    """
    report = ArchiveReport()
    verifier = _ArchiveVerifier(archive, payloads, origin, report)
    await asyncio.to_thread(verifier.list_files)
    total = sum(payload.event_count for payload in payloads if payload.archive)
    for payload in payloads:
        if payload.archive is None:
            continue
        root = await asyncio.to_thread(verifier.verify_month, payload)
        if root is not None and await _sealed_root(connection, payload.positions) != payload.root:
            verifier.find(payload.archive[0][0], "the events differ from the seals", payload)
        report.events += payload.event_count if root is not None else 0
        progress(report.events, total)
    for name in verifier.unsigned:
        tree = await asyncio.to_thread(verifier.verify_unsigned, name)
        if tree is None:
            continue
        if await _sealed_root(connection, tree.positions) != tree.root:
            verifier.find(name, "no retirement has signed the file, and it differs from the seals")
        else:
            report.unretired += tree.count
    return report


def describe_archive(archive: Archive, report: ArchiveReport) -> str:
    """Describe a verified archive in one line."""
    parts = [f"{report.files:,} signed files, {report.events:,} retired events"]
    if report.unretired:
        parts.append(f"{report.unretired:,} events that are not retired yet")
    if report.leftovers:
        parts.append(f"files to delete: {', '.join(report.leftovers[:3])}")
    return f"{archive.location}: {'; '.join(parts)}"


async def _sealed_root(connection: Connection, positions: PositionRanges) -> str:
    """Return the root of the Merkle tree of the events at the positions, according to the seals."""
    tree, at = MerkleTree(), 0
    async for seal in seals_between(connection, positions[0][0], positions[-1][1]):
        for position, digest in seal.event_digests(seal.payload()):
            while at < len(positions) and positions[at][1] < position:
                at += 1
            if at < len(positions) and positions[at][0] <= position:
                tree.add(position, digest)
    return tree.root


class _ArchiveVerifier:
    """The files of an archive, compared with the files that retirements have signed."""

    def __init__(
        self,
        archive: Archive,
        payloads: list[SealPayload],
        origin: str | None,
        report: ArchiveReport,
    ) -> None:
        self._archive, self._payloads, self._origin = archive, payloads, origin
        self._report = report
        signed = [file for payload in payloads for file in payload.archive or ()]
        self._signed = {name for name, _, _ in signed}
        self._name_of = {digest: name for name, _, digest in signed}
        self._present: set[str] = set()
        self.unsigned: list[str] = []  # Names of the files that no retirement has signed.

    def find(self, name: str, problem: str, payload: SealPayload | None = None) -> None:
        """Add a finding about a file."""
        key, seal = (payload.positions[0][0], payload.number) if payload else (2**63, None)
        finding = AuditFinding(FindingKind.ARCHIVE, f"{name}: {problem}", seal)
        self._report.findings.append((key, finding))

    def list_files(self) -> None:
        self._present = {*self._archive.names()}
        for name in sorted(self._present - self._signed):
            if is_leftover(name):
                self._report.leftovers.append(name)
            elif parse_name(name) is not None:
                self.unsigned.append(name)
            elif self._archive.is_parquet(name):
                self.find(name, "the file does not belong to the archive")

    def verify_month(self, payload: SealPayload) -> str | None:
        """Return the Merkle root of a retired month, or None if there is a finding."""
        tree, valid = MerkleTree(), True
        for name, rows, digest in payload.archive or ():
            problem: str | None = "the file is missing"
            if name in self._present:
                try:
                    problem = self._verify_file(name, rows, digest, tree)
                except (FileError, InvalidValue) as error:
                    problem = str(error)
            if problem is not None:
                self.find(name, problem, payload)
                valid = False
            else:
                self._report.files += 1
        if not valid:
            return None
        if (tree.root, tree.positions) != (payload.root, payload.positions):
            name = (payload.archive or (("", 0, ""),))[0][0]
            self.find(name, "the files of the month do not have the retired events", payload)
            return None
        return tree.root

    def _verify_file(self, name: str, rows: int, digest: str, tree: MerkleTree) -> str | None:
        with self._archive.read(name) as (copy, found):
            if found != digest:
                other = self._name_of.get(found)
                if other is not None:
                    return f"the file has the content of {other}"
                with suppress(InvalidValue):
                    if origin_of(copy) not in (None, "", self._origin):
                        return "the file belongs to another audit trail"
                return "the file was changed"
            count = tree.count
            for position, content in read_events(copy) if not _is_of_seals(name) else ():
                tree.add(position, digest_of(content))
            if not _is_of_seals(name) and tree.count - count != rows:
                return "the number of rows differs from the signed number"
        return None

    def verify_unsigned(self, name: str) -> MerkleTree | None:
        """Return the events of a file of a month that is not retired yet, or None.

        A file whose events are retired is a finding, because no retirement has signed the file.
        """
        tree = MerkleTree()
        try:
            with self._archive.read(name) as (copy, _):
                if origin_of(copy) not in ("", self._origin):
                    self.find(name, "the file belongs to another audit trail")
                    return None
                if _is_of_seals(name):
                    return None
                for position, content in read_events(copy):
                    tree.add(position, digest_of(content))
        except (FileError, InvalidValue) as error:
            self.find(name, str(error))
            return None
        if not tree.count or any(
            low <= last and first <= high
            for payload in self._payloads
            for low, high in payload.positions
            for first, last in tree.positions
        ):
            self.find(name, "no retirement has signed the file")
            return None
        return tree


def _is_of_seals(name: str) -> bool:
    return "/_seals-" in name
