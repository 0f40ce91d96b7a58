"""Verification of months that are in the archive, but whose files no retirement has signed."""

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import TypeAlias

from tiger_db.audit import storage
from tiger_db.audit.archive_files import (
    Archive,
    Row,
    event_row,
    extent_in,
    is_of_seals,
    origin_of,
    read_event_rows,
    read_seals,
    seal_bytes,
)
from tiger_db.audit.chain import AuditFinding, ChainVerifier, FindingKind
from tiger_db.audit.event_content import Event
from tiger_db.audit.months import bounds_of, fetch_ranges, first_id, sealed_root, seals_between
from tiger_db.audit.seal_format import MerkleTree, SealPayload, digest_of, subtract_ranges
from tiger_db.audit.storage import Connection
from tiger_db.errors import FileError, InvalidValue
from tiger_db.public import Progress, no_progress

_EVENTS_PER_REPORT = 10_000  # events between two calls of `progress`
Range: TypeAlias = tuple[int, int]  # First and last position.
# The last position that was sealed when a month was archived: at least that of the seal of the last
# archived event, whose position is $1, and those of the seals from before the end of the month, $2.
_SELECT_SEALED_THEN = """
SELECT max((statement::jsonb ->> text 'upto')::bigint) FROM audit_seals
WHERE NOT statement::jsonb ? text 'retired' AND (
    (statement::jsonb ->> text 'after')::bigint < $1
    OR statement::jsonb ->> text 'sealed_at' < $2)
"""


@dataclass(slots=True)
class ArchiveReport:
    """The result of a verification of the archive."""

    events: int = 0  # Number of retired events that the archive has unchanged.
    files: int = 0  # Number of unchanged files that retirements have signed.
    unretired: int = 0  # Number of sealed events in the archive that are not retired yet.
    findings: list[tuple[int, AuditFinding]] = field(default_factory=list)  # with sort keys
    warnings: list[AuditFinding] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)  # Names of files that may be deleted.
    progress: Progress = no_progress
    read: int = 0  # Number of events that were read so far.
    total: int = 0  # Number of events in the archive, according to seals and to names of files.

    def count_read(self) -> None:
        """Count an event that was read."""
        self.read += 1
        if self.read % _EVENTS_PER_REPORT == 0:
            self.progress(self.read, self.total)

    def find(self, name: str, problem: str, payload: SealPayload | None = None) -> None:
        """Add a finding about a file, which a retirement with the payload has signed."""
        key, seal = (payload.positions[0][0], payload.number) if payload else (2**63, None)
        finding = AuditFinding(FindingKind.ARCHIVE, f"{name}: {problem}", seal)
        self.findings.append((key, finding))

    def warn(self, message: str) -> None:
        self.warnings.append(AuditFinding(FindingKind.ARCHIVE, message))


class UnretiredMonth:
    """The files of a month that no retirement has signed, compared with the database.

    The files must have the events of the month, and the seals, as `archive` writes them. Events
    that were written after the month was archived may be missing. All files of the month may be
    missing, because nothing has signed their names.
    """

    def __init__(
        self,
        archive: Archive,
        chain: ChainVerifier,
        report: ArchiveReport,
        *,
        month: str,
        names: list[str],
    ) -> None:
        self._archive, self._chain, self._report = archive, chain, report
        self._month, self._names = month, names
        self._events: dict[str, Range] = {}  # Positions in the names of the files of events.
        self._seals: dict[str, Range] = {}  # Positions in the names of the files of seals.
        # Positions of the events in the files. A file with a finding has those in its name.
        self._covered: list[Range] = []

    async def verify(
        self, verified: Connection, newer: Connection, payloads: list[SealPayload]
    ) -> None:
        """Add findings and warnings to the report.

        The seals of both snapshots are verified, and the events of the older snapshot `verified`.
        `payloads` are those of all retirements.
        """
        try:
            self._start, self._end = bounds_of(self._month)
        except ValueError:
            for name in self._names:
                self._report.find(name, "the folder is not that of a month")
            return
        self._sort_names(payloads)
        await self._verify_events(newer)
        if (self._events or self._seals) and not await asyncio.to_thread(self._is_incomplete):
            # No event leaves between the snapshots, unless somebody deletes it.
            runs = [
                run for snapshot in (verified, newer)
                for run in await fetch_ranges(snapshot, self._month)
            ]  # fmt: skip
            await self._verify_completeness(newer, _union(runs), payloads)

    def _sort_names(self, payloads: list[SealPayload]) -> None:
        # The positions of other months can lie between those of this month.
        signed = [
            run for payload in payloads if payload.archive and payload.retired == self._month
            for run in payload.positions
        ]  # fmt: skip
        for name in self._names:
            extent = extent_in(name)
            if extent is None:
                self._report.find(name, "the name is not that of an archived file")
            elif any(low <= extent[1] and extent[0] <= high for low, high in signed):
                self._report.find(name, "no retirement has signed the file")
            else:
                (self._seals if is_of_seals(name) else self._events)[name] = extent

    async def _verify_events(self, connection: Connection) -> None:
        wrong = list[Range]()
        for name, extent in sorted(self._events.items(), key=lambda item: item[1]):
            tree = await asyncio.to_thread(self._read_events, name)
            if tree is None:
                wrong.append(extent)
            elif await sealed_root(connection, tree.positions) != tree.root:
                self._find_difference(name, extent, "the events differ from the seals")
                wrong.append(extent)
            elif self._covered and extent[0] <= self._covered[-1][1]:
                self._report.find(name, "another file has the same events")
                wrong.append(extent)
            else:
                self._report.unretired += tree.count
                self._covered += tree.positions
        self._covered = _union([*self._covered, *wrong])

    def _read_events(self, name: str) -> MerkleTree | None:
        """Return the events of a file, or None if there is a finding or the file has gone."""
        tree = MerkleTree()
        try:
            problem = self._read_rows(name, tree)
        except InvalidValue as error:
            problem = str(error)
        except FileError as error:  # `archive` can have renamed the file since it was listed
            self._archive.check_missing(name, error)
            return None
        else:
            if problem is None and (tree.positions[0][0], tree.positions[-1][1]) != extent_in(name):
                problem = "the name does not match the positions of the events"
        if problem is not None:
            self._report.find(name, problem)
        return tree if problem is None and tree.count else None

    def _read_rows(self, name: str, tree: MerkleTree) -> str | None:
        """Add the events of a file to a tree, or return what is wrong with the file."""
        low, high = (str(first_id(at)) for at in (self._start, self._end))
        with self._archive.read(name) as (copy, _):
            if origin_of(copy) not in ("", self._chain.origin):
                return "the file belongs to another audit trail"
            for row in read_event_rows(copy):
                position, event_id, content = row[0], row[1], row[-1]
                assert isinstance(position, int)
                assert isinstance(content, str)
                if not (isinstance(event_id, str) and low <= event_id < high):
                    return f"the event at position {position} is not one of the month"
                if row != _columns_of((position, content)):
                    return f"the columns of the event at position {position} differ from `content`"
                tree.add(position, digest_of(content))
                self._report.count_read()
        return None if tree.count else "the file has no events"

    def _is_incomplete(self) -> bool:
        """Return whether the month was not written to its end, or was written again since.

        The file of seals gets its name after all other files of the month.
        """
        if self._seals and {*self._names} <= {*self._archive.names(self._month)}:
            return False
        self._warn("the month was not written to its end")
        return True

    async def _verify_completeness(
        self, connection: Connection, runs: list[Range], payloads: list[SealPayload]
    ) -> None:
        last = max(last for _, last in (*self._events.values(), *self._seals.values()))
        sealed = await connection.fetchval(_SELECT_SEALED_THEN, last, f"{self._end:%Y-%m}") or 0
        for payload in payloads:  # months that were retired without an archive
            if payload.retired == self._month and payload.archive is None:
                runs += payload.positions if payload.positions[0][0] <= last else ()
        expected = [(low, min(high, sealed), 0) for low, high in sorted(runs) if low <= sealed]
        missing, _ = subtract_ranges(expected, tuple(self._covered))
        self._find_missing(missing)
        if any(high > sealed for _, high in runs):
            self._warn("events of the month were written after it was archived")
        extents = {(found[0][0], found[-1][1]) for found in (expected, self._covered) if found}
        for name, extent in self._seals.items():
            if extent not in extents:
                self._report.find(name, "the archive does not have the events of the seals")
                continue
            digest = await asyncio.to_thread(self._read_seals, name)
            if digest is not None and digest not in await _chain_digests(connection, *extent):
                problem = "the seals differ from those in the database"
                self._find_difference(name, extent, problem)

    def _find_missing(self, missing: list[tuple[int, int, int]]) -> None:
        """Add a finding for each file that lacks events."""
        counts = dict[str, Range]()  # First missing position, and number of events, by file.
        for low, high, _ in missing:
            files = [name for name, extent in self._events.items() if extent[0] <= low <= extent[1]]
            name = [*files, *self._seals][0]
            first, count = counts.get(name, (low, 0))
            counts[name] = first, count + high - low + 1
        for name, (first, count) in counts.items():
            problem = f"the event at position {first} is missing"
            if count > 1:
                problem = f"{count:,} events are missing, the first at position {first}"
            self._report.find(name, problem)

    def _read_seals(self, name: str) -> bytes | None:
        """Return the digest of the seals in a file, or None if there is a finding."""
        digest = hashlib.sha256()
        try:
            with self._archive.read(name) as (copy, _):
                if origin_of(copy) not in ("", self._chain.origin):
                    self._report.find(name, "the file belongs to another audit trail")
                    return None
                for seal in read_seals(copy):
                    digest.update(seal_bytes(seal))
        except InvalidValue as error:
            self._report.find(name, str(error))
            return None
        except FileError as error:  # `archive` can have renamed the file since it was listed
            self._archive.check_missing(name, error)
            return None
        return digest.digest()

    def _find_difference(self, name: str, extent: Range, problem: str) -> None:
        """Add a finding about a file, or a warning if a recorded restore explains the problem."""
        for lost in self._chain.lost:
            if extent[0] <= lost.upto and lost.after <= extent[1]:
                reason = f"the restore that seal {lost.seal} records can be the reason"
                self._warn(f"{problem}, and {reason}", name)
                return
        self._report.find(name, problem)

    def _warn(self, message: str, name: str | None = None) -> None:
        command = f"tiger-db archive-audit --month {self._month}"
        self._report.warn(f"{name or f'month={self._month}'}: {message}: run `{command}`")


def _columns_of(event: Event) -> Row | None:
    """Return the columns of an event, or None if its content is not the content of an event."""
    try:
        return event_row(event)
    except ValueError:
        return None


def _union(ranges: list[Range]) -> list[Range]:
    """Return the positions of all ranges, as ascending ranges without common positions."""
    union = list[Range]()
    for first, last in sorted(ranges):
        if union and first <= union[-1][1]:
            union[-1] = union[-1][0], max(last, union[-1][1])
        else:
            union.append((first, last))
    return union


async def _chain_digests(connection: Connection, first: int, last: int) -> set[bytes]:
    """Return the digests of the seals in a file of seals, for all times when it can be written.

    A file has the seals that precede and follow those of the events. If it was written early, it
    lacks the following seals.
    """
    digest, digests, upto = hashlib.sha256(), set[bytes](), 0
    async for seal in seals_between(connection, first, last, whole_chain=True):
        digest.update(seal_bytes(seal))
        upto = max(upto, storage.extent_of(seal)[0])
        if upto >= last:
            digests.add(digest.digest())
    return digests
