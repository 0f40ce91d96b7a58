"""Verification of the files of the archive against the retirements that have signed them."""

import asyncio
from contextlib import suppress

from tiger_db.audit import storage
from tiger_db.audit.archive_files import (
    Archive,
    extent_in,
    is_leftover,
    is_of_seals,
    origin_of,
    parse_name,
    read_events,
)
from tiger_db.audit.archive_unretired import ArchiveReport, UnretiredMonth
from tiger_db.audit.chain import (
    AuditFinding,
    ChainVerifier,
    FindingKind,
    describe_missing_seals,
)
from tiger_db.audit.months import sealed_root
from tiger_db.audit.seal_format import MerkleTree, Seal, SealPayload, digest_of
from tiger_db.audit.storage import Connection
from tiger_db.database import Database
from tiger_db.errors import FileError, InvalidValue
from tiger_db.public import Progress

_PREFETCHED_SEALS = 50


async def verify_archive(
    database: Database,
    connection: Connection,
    archive: Archive,
    chain: ChainVerifier,
    *,
    payloads: list[SealPayload],
    progress: Progress,
) -> ArchiveReport:
    """Verify the files of the archive, in a snapshot whose seals `chain` has verified.

    `payloads` are those of the retirements. `progress` is called with the number of events that
    were read from the archive, and with the number of events in it, as far as seals and names of
    files tell.
    """
    report = ArchiveReport(progress=progress)
    verifier = _ArchiveVerifier(archive, payloads, chain, report)
    await asyncio.to_thread(verifier.list_files)
    report.total = verifier.count_events(payloads)
    for payload in payloads:
        if payload.archive is None:
            continue
        root = await asyncio.to_thread(verifier.verify_month, payload)
        if root is not None and await sealed_root(connection, payload.positions) != payload.root:
            report.find(payload.archive[0][0], "the events differ from the seals", payload)
        report.events += payload.event_count if root is not None else 0
    if verifier.unsigned:
        # Events can have been sealed and archived since the first snapshot. No month was retired,
        # because the first snapshot holds a lock on `audit_logs`.
        async with storage.open_snapshot(database) as newer:
            if not await _verify_newer_seals(newer, chain, report):
                return report
            for month, names in verifier.unsigned.items():
                unretired = UnretiredMonth(archive, chain, report, month=month, names=names)
                await unretired.verify(connection, newer, payloads)
    progress(report.total, report.total)
    return report


async def _verify_newer_seals(
    connection: Connection, chain: ChainVerifier, report: ArchiveReport
) -> bool:
    """Return whether the files can be compared with the seals of a newer snapshot.

    If the chain was sound, the seals must continue it. Otherwise, they must be readable.
    """
    problems = list[str]()
    again = chain.restart(lambda _, finding: problems.append(finding.message))
    async for row in connection.cursor(storage.SELECT_SEALS, prefetch=_PREFETCHED_SEALS):
        seal = Seal(*row)
        again.add(seal)
        # The payload has the digest of the payload before, and so proves all payloads before.
        if again.number == chain.number and again.payload_digest != chain.payload_digest:
            problems.append(f"seal {chain.number} was replaced")
    again.check_trust()
    if again.number < chain.number:
        problems.append(describe_missing_seals(again.number + 1, chain.number))
    if problems and chain.is_sound:
        message = f"the seals were changed while the archive was verified: {problems[0]}"
        report.findings.append((2**63, AuditFinding(FindingKind.FORGED, message)))
        return False
    # The findings about a chain that was broken before are not repeated.
    return not again.has_unreadable_seal


def describe_archive(archive: Archive, report: ArchiveReport) -> str:
    """Describe a verified archive in one line."""
    parts = [f"{report.files:,} signed files, {report.events:,} retired events"]
    if report.unretired:
        parts.append(f"{report.unretired:,} events that are not retired yet")
    if report.leftovers:
        parts.append(f"files to delete: {', '.join(report.leftovers[:3])}")
    return f"{archive.location}: {'; '.join(parts)}"


class _ArchiveVerifier:
    """The files of an archive, compared with the files that retirements have signed."""

    def __init__(
        self,
        archive: Archive,
        payloads: list[SealPayload],
        chain: ChainVerifier,
        report: ArchiveReport,
    ) -> None:
        self._archive, self._chain, self._report = archive, chain, report
        signed = [file for payload in payloads for file in payload.archive or ()]
        self._signed = {name for name, _, _ in signed}
        self._name_of = {digest: name for name, _, digest in signed}
        self._present: set[str] = set()
        # Names of the files that no retirement has signed, by month.
        self.unsigned: dict[str, list[str]] = {}

    def list_files(self) -> None:
        self._present = {*self._archive.names()}
        for name in sorted(self._present - self._signed):
            if is_leftover(name):
                self._report.leftovers.append(name)
            elif (parsed := parse_name(name)) is not None:
                self.unsigned.setdefault(parsed[0], []).append(name)
            elif _is_in_month(name) or self._archive.is_parquet(name):
                self._report.find(name, "the file does not belong to the archive")
        for name, problem in self._archive.unread_entries().items():
            if not name.rpartition("/")[2].startswith("."):
                self._report.find(name, problem)

    def count_events(self, payloads: list[SealPayload]) -> int:
        """Return the number of events in the archive, according to seals and to names of files."""
        signed = sum(payload.event_count for payload in payloads if payload.archive)
        extents = [
            extent_in(name)
            for names in self.unsigned.values()
            for name in names
            if not is_of_seals(name)
        ]
        return signed + sum(extent[1] - extent[0] + 1 for extent in extents if extent)

    def verify_month(self, payload: SealPayload) -> str | None:
        """Return the Merkle root of a retired month, or None if there is a finding."""
        tree, valid = MerkleTree(), True
        for name, rows, digest in payload.archive or ():
            problem: str | None = "the file is missing"
            if name in self._present:
                try:
                    problem = self._verify_file(name, rows, digest, tree)
                except InvalidValue as error:
                    problem = str(error)
                except FileError as error:
                    self._archive.check_missing(name, error)
            if problem is not None:
                self._report.find(name, problem, payload)
                valid = False
            else:
                self._report.files += 1
        if not valid:
            return None
        if (tree.root, tree.positions) != (payload.root, payload.positions):
            name = (payload.archive or (("", 0, ""),))[0][0]
            self._report.find(
                name, "the files of the month do not have the retired events", payload
            )
            return None
        return tree.root

    def _verify_file(self, name: str, rows: int, digest: str, tree: MerkleTree) -> str | None:
        with self._archive.read(name) as (copy, found):
            if found != digest:
                other = self._name_of.get(found)
                if other is not None:
                    return f"the file has the content of {other}"
                with suppress(InvalidValue):
                    if origin_of(copy) not in (None, "", self._chain.origin):
                        return "the file belongs to another audit trail"
                return "the file was changed"
            count = tree.count
            for position, content in read_events(copy) if not is_of_seals(name) else ():
                tree.add(position, digest_of(content))
                self._report.count_read()
            if not is_of_seals(name) and tree.count - count != rows:
                return "the number of rows differs from the signed number"
        return None


def _is_in_month(name: str) -> bool:
    """Return whether engines that read the folder of a month read the file."""
    return name.startswith("month=") and not name.rpartition("/")[2].startswith(".")
