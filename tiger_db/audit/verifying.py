"""Verification of the audit trail against the seals, in the database or in an export."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiger_db.audit import storage
from tiger_db.audit.archive_unretired import ArchiveReport
from tiger_db.audit.archive_verifying import describe_archive, verify_archive
from tiger_db.audit.archiving import open_configured
from tiger_db.audit.chain import AuditFinding, ChainVerifier, FindingKind
from tiger_db.audit.checkpoints import newest_checkpoint
from tiger_db.audit.event_content import Event, event_id_in
from tiger_db.audit.exporting import read_export
from tiger_db.audit.seal_format import (
    Seal,
    SealPayload,
    digest_of,
    positions_in,
    subtract_ranges,
)
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, InvalidValue
from tiger_db.public import Progress, no_progress, public

_REPORTED_FINDINGS = 1000
# Maximum number of events kept in memory that differ from a seal, and of digests of missing events.
_REMEMBERED_EVENTS = 100_000
# `verify` tolerates that the database's clock was set back by at most `_CLOCK_TOLERANCE`.
_CLOCK_TOLERANCE = timedelta(seconds=5)
# `_CREATED_AT` selects `created_at` without fractions of a second from the content of an event.
_CREATED_AT = slice(59, 78)


@dataclass(slots=True)
class Verification:
    """The result of a verification of the audit trail."""

    seals: int = 0  # Number of seals that the verification read.
    rows: int = 0  # Number of sealed events that are unchanged.
    retired: int = 0  # Number of events in retired months.
    archived: int = 0  # Number of these events that the archive has unchanged.
    unsealed: int = 0  # Number of events that no seal covers.
    count: int = 0  # Number of all findings, which can be more than 1,000.
    # `findings` has the first 1,000 findings, in the order of positions.
    findings: list[AuditFinding] = field(default_factory=list)
    # `warnings` has at most 1,000 facts that prove no tampering, such as clocks that went back.
    warnings: list[AuditFinding] = field(default_factory=list)
    # `basis` has one line about each fact that the result rests on.
    basis: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return self.count == 0


@public
async def verify(
    database: Database,
    *,
    keys: Sequence[Ed25519PublicKey] = (),
    checkpoint: Seal | None = None,
    archive: bool = False,
    progress: Progress = no_progress,
) -> Verification:
    """Verify all seals and events in one snapshot of the database.

    If `archive` is true, `verify` also verifies the files in `AUDIT_ARCHIVE`: the files that
    retirements have signed must be there unchanged, and must have exactly the retired events, as
    they were sealed. The files of a month that is not retired yet must be as `archive` writes them.
    All other files are findings. After the database, `verify` calls `progress` with the number of
    events that were read from the archive, and with the number of events in the archive.

    The signing keys of the seals must follow from one of the `keys`, by default from
    `AUDIT_SIGNING_KEY`. `verify` compares the seals with the given checkpoint, which must have been
    exported earlier, and with the newest checkpoint in the folder `AUDIT_CHECKPOINTS`. With a
    checkpoint, `verify` detects that the newest seals and events were removed, or that all seals
    were replaced. Triggers, row security and rules of the audit trail that differ from the declared
    schema are findings. The memory use of `verify` does not depend on the number of events.
    `verify` calls `progress` with the last verified position, and with the last position of the
    audit trail.

    Raises:
        ConfigurationError: The list `keys` is empty, and `AUDIT_SIGNING_KEY` is not set, or
            `archive` is true, and `AUDIT_ARCHIVE` is not set or pyarrow is not installed.
        FileError, InvalidState: The newest checkpoint in the folder, or the archive, cannot be
            read.
    """
    files = await open_configured(database) if archive else None
    if not keys:
        own = await database.signing_key()
        keys = [own.public_key()] if own is not None else []
    evidence = await asyncio.to_thread(_Evidence, database.settings.audit_checkpoints, checkpoint)
    verifier = TrailVerifier(keys, evidence.checkpoints)
    weakened, definers = await storage.find_weakened_protection(database)
    verifier.add_weakened_protection(weakened, definers)
    async with storage.open_snapshot(database) as connection:
        total = await connection.fetchval("SELECT max(position) FROM audit_logs") or 0
        verifier.database_time = await storage.database_time(connection)
        async with aclosing(storage.read_trail(connection)) as trail:
            async for items in trail:
                for item in items:
                    verifier.add(item)
                progress(verifier.position, total)
        progress(total, total)
        archived = None
        # PostgreSQL cannot select seals by their content if one of them has other content.
        if files is not None and not verifier.chain.has_unreadable_seal:
            archived = await verify_archive(
                database,
                connection,
                files,
                verifier.chain,
                payloads=verifier.retirements,
                progress=progress,
            )
    if archived is not None:
        verifier.add_archive(archived)
    report = evidence.explain(verifier)
    if files is not None:
        result = "not verified, because a seal cannot be read"
        if archived is not None:
            result = describe_archive(files, archived)
        report.basis.append(f"archive: {result}")
    elif verifier.unread:
        report.basis.append(f"archive: {verifier.unread:,} events not verified, see --archive")
    return report


@public
async def verify_export(
    path: Path,
    *,
    keys: Sequence[Ed25519PublicKey],
    checkpoint: Seal | None = None,
    folder: Path | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Verify an export of the whole audit trail in JSON Lines, without a database.

    The seals are compared with the given checkpoint, and with the newest checkpoint in the folder.
    `verify_export` calls `progress` with the number of verified bytes, and with the number of all
    bytes of the file.

    Raises:
        ConfigurationError: The list `keys` is empty.
        InvalidValue: The file is not an export in JSON Lines, or the export has no seal and no
            checkpoint is given.
        OSError: The file of the export cannot be read.
        FileError, InvalidState: The newest checkpoint in the folder cannot be read.
    """

    def run() -> Verification:
        evidence = _Evidence(folder, checkpoint)
        verifier = TrailVerifier(keys, evidence.checkpoints, has_archive=True)
        total = path.stat().st_size
        done = 0
        for item, size in read_export(path):
            done += size
            verifier.add(item)
            if isinstance(item, Seal):
                progress(done, total)
        progress(total, total)
        report = evidence.explain(verifier)
        if verifier.unread:
            report.basis.append(
                f"archive: {verifier.unread:,} events are not in the export,"
                " see export-events --archive"
            )
        if report.seals == 0 and not evidence.checkpoints:
            raise InvalidValue(f"{path} holds no seal: export the audit trail without filters")
        return report

    return await asyncio.to_thread(run)


class _Evidence:
    """The checkpoints that a verification compares with the seals."""

    def __init__(self, folder: Path | None, given: Seal | None) -> None:
        self._folder, self._given = folder, given
        self._newest = newest_checkpoint(folder) if folder is not None else None
        self.checkpoints = [seal for seal in (self._newest, given) if seal is not None]

    def explain(self, verifier: "TrailVerifier") -> Verification:
        """Finish a verification, and describe what its result rests on."""
        report, chain = verifier.finish(), verifier.chain
        problems = {finding.kind for finding in report.findings}
        state = "broken" if FindingKind.FORGED in problems else "unbroken"
        folder = "not set, see AUDIT_CHECKPOINTS"
        if self._folder is not None:
            folder = f"{self._folder}: {_describe(self._newest, chain)}"
        count = f"{report.seals:,} {'seal' if report.seals == 1 else 'seals'}"
        report.basis = [
            f"chain: {count}, {state}; origin: {chain.origin or 'none'}",
            f"signatures: {', '.join(chain.signers) or 'none'}",
            f"checkpoint folder: {folder}",
            f"checkpoint given: {_describe(self._given, chain)}",
        ]
        return report


def _describe(checkpoint: Seal | None, chain: ChainVerifier) -> str:
    if checkpoint is None:
        return "none"
    number = checkpoint.payload().number
    if (lost := chain.find_loss(checkpoint)) is not None:
        return f"seal {number} was lost by a restore, which seal {lost.seal} records"
    return f"seal {number} is {'' if checkpoint in chain.matched else 'not '}in the chain"


@dataclass(slots=True)
class _Mismatch:
    """An event that differs from the sealed event at its position, or that no seal covers."""

    seal: int  # number of the seal that covers the position, or 0 for an unsealed event
    expected: bytes | None = None
    found: bytes | None = None
    event_id: str | None = None
    twin: str | None = None  # Id of another event at the same position.


class TrailVerifier:
    """A verification of seals and events that the caller adds one after another.

    Add the seals in the order of their rows. After each seal, add the events that the seal covers,
    in the order of positions. Set `database_time` before the first seal is added. If
    `database_time` is earlier than the newest seal, the times of unsealed events are not checked.
    With `has_archive`, the events of retired months may be there if they were archived.

    Raises:
        ConfigurationError: The list `keys` is empty.
    """

    def __init__(
        self,
        keys: Sequence[Ed25519PublicKey],
        checkpoints: Iterable[Seal] = (),
        *,
        has_archive: bool = False,
    ) -> None:
        if not keys:
            raise ConfigurationError(
                "there is no key to verify seals with: give a public key (`--public-key`), which"
                " `tiger-db print-audit-public-key` prints, or set AUDIT_SIGNING_KEY"
            )
        self.database_time = "9"  # the text "9" sorts after every time in ISO 8601
        self._report = Verification()
        self._has_archive = has_archive
        self.retirements: list[SealPayload] = []
        self.unread = 0  # Number of retired events that are in an archive only.
        self._findings: list[tuple[int, AuditFinding]] = []  # findings with their sort keys
        self.chain = ChainVerifier(keys, self._find, checkpoints=checkpoints)
        # Events of the last added seal were created at `_created_after` or later. Events that the
        # next seals cover were created at `_next_created_after` or later. If one of these two
        # attributes is an empty text, the creation times of its events are not checked.
        self._created_after = ""
        self._next_created_after = ""
        # The following attributes describe events, with positions as keys.
        self._expected: dict[int, bytes] = {}  # Digests of sealed events that are not added yet.
        self.position, self._last_content = 0, ""  # Position and content of the last added event.
        self._last_found = 0  # Highest position at which a sealed event was added.
        # Lowest position at which an event was added before any seal that covers it, and its id.
        self._first_unsealed: tuple[int, str | None] | None = None
        # Each run has the first position, the last position and the seal of missing events.
        self._missing: list[tuple[int, int, int]] = []
        self._missing_digests: OrderedDict[int, bytes] = OrderedDict()  # the newest digests
        self._mismatches: dict[int, _Mismatch] = {}
        self._unexpected: list[tuple[int, _Mismatch]] = []

    def add(self, item: Seal | Event) -> None:
        if isinstance(item, Seal):
            self._add_seal(item)
        else:
            self._add_event(*item)

    def add_weakened_protection(self, findings: Iterable[str], warnings: Iterable[str]) -> None:
        """Add findings about the protection of the audit trail, which are listed last."""
        for description in findings:
            self._find(2**63, AuditFinding(FindingKind.PROTECTION, description))
        for description in warnings:
            self._report.warnings.append(AuditFinding(FindingKind.PROTECTION, description))

    def add_archive(self, archived: ArchiveReport) -> None:
        """Add the findings about the files of the archive."""
        self._report.archived = archived.events
        self._report.warnings += archived.warnings
        for position, finding in archived.findings:
            self._find(position, finding)

    def _add_seal(self, seal: Seal) -> None:
        self._close_seal()
        self._created_after = self._next_created_after
        self._report.seals += 1
        covered = self.chain.upto
        payload = self.chain.add(seal)
        if payload is None:
            return
        self._find_early_event()
        if payload.retired is None:
            # A forged seal can cover positions that earlier seals covered.
            self._expected = {at: it for at, it in seal.event_digests(payload) if at > covered}
        elif self.chain.accepts_last_seal:
            self._retire(payload)
        # If the database's clock was set back, the creation times of events prove nothing.
        if payload.sealed_at[:19] < self._created_after:
            self._created_after = ""
        self._next_created_after = _lower_bound(payload.closed_at) or self._created_after

    def _find_early_event(self) -> None:
        """Report an event that precedes the seal that covers it. Only a forged export has one."""
        position, event_id = self._first_unsealed or (self.chain.upto + 1, None)
        if self.chain.missing_upto < position <= self.chain.upto:
            message = f"the event at position {position} precedes the seal that covers the position"
            event = _Mismatch(self.chain.number, event_id=event_id)
            self._find_event(position, FindingKind.INSERTED, message, event)
            self._first_unsealed = None

    def _retire(self, payload: SealPayload) -> None:
        """Accept that the events of a retired month are missing. Report those that are there."""
        self._report.retired += payload.event_count
        self.retirements.append(payload)
        self._missing, gone = subtract_ranges(self._missing, payload.positions)
        if payload.archive is not None:
            self.unread += sum(last - first + 1 for first, last in gone)
        for position in positions_in(gone):
            self._missing_digests.pop(position, None)
        if self._has_archive and payload.archive is not None:
            return
        there, _ = subtract_ranges([(first, last, 0) for first, last in payload.positions], gone)
        there, _ = subtract_ranges(there, tuple(self.chain.missing))
        for position in positions_in(tuple((first, last) for first, last, _ in there)):
            changed = self._mismatches.pop(position, None)
            if changed is None:
                self._report.rows -= 1
                changed = _Mismatch(0)
            event = _Mismatch(payload.number, None, changed.found, changed.event_id)
            self._remember(position, event)

    def _add_event(self, position: int, content: str) -> None:
        twin = event_id_in(self._last_content) if position == self.position else None
        self.position, self._last_content = position, content
        if position > self.chain.upto:
            self._add_unsealed(position, content, twin)
            return
        digest, number = digest_of(content), self.chain.number
        if content[_CREATED_AT] < self._created_after:
            self._warn_of_clock(number, position, content)
        expected = self._expected.pop(position, None)
        if expected is not None:
            self._last_found = max(self._last_found, position)
            if expected == digest:
                self._report.rows += 1
            else:
                event_id = event_id_in(content)
                self._mismatches[position] = _Mismatch(number, expected, digest, event_id)
            return
        event_id = event_id_in(content)
        if (other := self._mismatches.get(position)) is not None and other.expected == digest:
            # The seal covers the second event at the position, not the first.
            self._report.rows += 1
            del self._mismatches[position]
            self._remember(position, _Mismatch(number, None, other.found, other.event_id, event_id))
        elif position > self.chain.missing_upto:
            self._remember(position, _Mismatch(number, None, digest, event_id, twin))

    def _add_unsealed(self, position: int, content: str, twin: str | None) -> None:
        self._report.unsealed += 1
        if self._first_unsealed is None or position < self._first_unsealed[0]:
            self._first_unsealed = position, event_id_in(content)
        # A sealed event was possibly moved to `position`.
        if self._mismatches or self._expected or self._missing or twin:
            event = _Mismatch(0, None, digest_of(content), event_id_in(content), twin)
            self._remember(position, event)
        if content[_CREATED_AT] < self._next_created_after <= self.database_time:
            self._warn_of_clock(self.chain.number + 1, position, content)

    def _warn_of_clock(self, seal: int, position: int, content: str) -> None:
        message = (
            f"the event at position {position} has a time before seal {seal - 1}, but was written"
            " after this seal: a clock went back, or somebody set the time of the event"
        )
        if len(self._report.warnings) < _REPORTED_FINDINGS:
            event_id = event_id_in(content)
            warning = AuditFinding(FindingKind.CLOCK, message, seal, position, event_id)
            self._report.warnings.append(warning)

    def _remember(self, position: int, unexpected: _Mismatch) -> None:
        if len(self._unexpected) < _REMEMBERED_EVENTS:
            self._unexpected.append((position, unexpected))
        elif unexpected.seal or unexpected.twin:
            self._report.count += 1

    def _close_seal(self) -> None:
        """Note the missing events that the last seal covers."""
        number = self.chain.number
        for position in sorted(self._expected):
            if self._missing and self._missing[-1][1:] == (position - 1, number):
                self._missing[-1] = (self._missing[-1][0], position, number)
            else:
                self._missing.append((position, position, number))
            self._missing_digests[position] = self._expected[position]
            if len(self._missing_digests) > _REMEMBERED_EVENTS:
                self._missing_digests.popitem(last=False)
        self._expected = {}

    def finish(self) -> Verification:
        """Return the result of the verification, after all seals and events have been added."""
        self._close_seal()
        self._explain_mismatches()
        self.chain.finish(self.position)
        restored = [
            AuditFinding(FindingKind.RESTORED, str(lost), lost.first) for lost in self.chain.lost
        ]
        self._report.warnings = [*restored, *self._report.warnings][:_REPORTED_FINDINGS]
        self._findings.sort(key=lambda found: found[0])
        self._report.findings = [finding for _, finding in self._findings[:_REPORTED_FINDINGS]]
        return self._report

    def _explain_mismatches(self) -> None:
        """Add a finding for each changed, deleted, moved or inserted event."""
        now_at = {other.found: (at, other.event_id) for at, other in self._unexpected}
        now_at |= {o.found: (at, o.event_id) for at, o in self._mismatches.items() if o.found}
        belongs_at = {digest: at for at, digest in self._missing_digests.items()}
        belongs_at |= {o.expected: at for at, o in self._mismatches.items() if o.expected}
        for position, mismatch in self._mismatches.items():
            kind, message = FindingKind.CHANGED, f"the event at position {position} was changed"
            if mismatch.expected and (now := now_at.get(mismatch.expected)) is not None:
                kind = FindingKind.MOVED
                message = f"the event of position {position} was moved to position {now[0]}"
                mismatch.event_id = now[1]
            elif mismatch.found and (origin := belongs_at.get(mismatch.found)) is not None:
                kind = FindingKind.MOVED
                message = f"the event of position {origin} was moved to position {position}"
            self._find_event(position, kind, message, mismatch)
        self._explain_missing(now_at)
        for position, event in self._unexpected:
            if event.found in belongs_at:
                continue
            if event.twin is not None:
                event.seal = event.seal or self.chain.number + 1
                ids = " and ".join(sorted((str(event.event_id), event.twin)))
                message = f"two events have the position {position}: {ids}"
                event.event_id = None
                self._find_event(position, FindingKind.DUPLICATE, message, event)
            elif event.seal:
                message = f"the event at position {position} was written after seal {event.seal}"
                self._find_event(position, FindingKind.INSERTED, message, event)

    def _explain_missing(self, now_at: dict[bytes | None, tuple[int, str | None]]) -> None:
        reported = 0
        for first, last, seal in self._missing:
            for position in range(first, min(last, first + _REPORTED_FINDINGS - reported - 1) + 1):
                kind, message = FindingKind.DELETED, f"the event at position {position} is missing"
                digest, event = self._missing_digests.get(position), _Mismatch(seal)
                if digest is not None and (now := now_at.get(digest)) is not None:
                    kind, event.event_id = FindingKind.MOVED, now[1]
                    message = f"the event of position {position} was moved to position {now[0]}"
                elif position > self._last_found:
                    kind = FindingKind.TRUNCATED
                    message = f"the event at position {position} and all later events are missing"
                self._find_event(position, kind, message, event)
                reported += 1
                first = position + 1  # noqa: PLW2901  # the rest of the run is only counted
            self._report.count += last - first + 1

    def _find_event(self, position: int, kind: FindingKind, message: str, event: _Mismatch) -> None:
        self._find(position, AuditFinding(kind, message, event.seal, position, event.event_id))

    def _find(self, position: int, finding: AuditFinding) -> None:
        """Add a finding, which is listed after the findings at lower positions."""
        self._report.count += 1
        self._findings.append((position, finding))


def _lower_bound(time: str | None) -> str:
    """Return an ISO 8601 time minus the clock tolerance. Return "" if the time is not valid."""
    try:
        return (datetime.fromisoformat(time or "") - _CLOCK_TOLERANCE).isoformat()[:19]
    except (ValueError, OverflowError):
        return ""
