"""Verification of the audit trail against the seals, in the database or in an export."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiger_db.audit import storage
from tiger_db.audit.exporting import read_export
from tiger_db.audit.seal_format import (
    DIGEST_BYTES,
    NO_PREVIOUS_DIGEST,
    PositionRanges,
    Seal,
    SealPayload,
    digest_of,
    merkle_root,
)
from tiger_db.audit.storage import Event
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, InvalidValue
from tiger_db.public import Progress, no_progress, public

_REPORTED_FINDINGS = 1000
_REMEMBERED_EVENTS = 100_000  # Maximum number of events kept in memory that differ from a seal.
_PROGRESS_POSITIONS = 1000  # Number of positions between two calls of `progress`.
# `verify` tolerates that the database's clock was set back by at most `_CLOCK_TOLERANCE`.
_CLOCK_TOLERANCE = timedelta(seconds=5)
# `_CREATED_AT` selects `created_at` without fractions of a second from the content of an event.
_CREATED_AT = slice(59, 78)
_SELECT_RETIREMENTS = """
SELECT statement, signature, ''::bytea FROM audit_seals WHERE statement LIKE '%"retired":%'
"""


class FindingKind(StrEnum):
    CHANGED = "changed"
    DELETED = "deleted"
    INSERTED = "inserted later"
    MOVED = "moved"
    TRUNCATED = "truncated at the end"
    FORGED = "seal forged"
    CHECKPOINT = "checkpoint mismatch"


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """Evidence of tampering with a seal or an event."""

    kind: FindingKind
    message: str
    seal: int | None = None  # Number of the seal that the finding is about.
    position: int | None = None  # Position of the event that the finding is about.
    event_id: str | None = None


@dataclass(slots=True)
class Verification:
    """The result of a verification of the audit trail."""

    seals: int = 0  # Number of seals that the verification read.
    rows: int = 0  # Number of sealed events that are unchanged.
    retired: int = 0  # Number of events in retired months.
    unsealed: int = 0  # Number of events that no seal covers.
    count: int = 0  # Number of all findings, which can be more than 1,000.
    # `findings` has the first 1,000 findings, in the order of positions.
    findings: list[AuditFinding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return self.count == 0


@public
async def verify(
    database: Database,
    *,
    keys: Sequence[Ed25519PublicKey] = (),
    checkpoint: Seal | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Verify all seals and events in one snapshot of the database.

    Each seal must be signed with one of the `keys`, by default with `AUDIT_SIGNING_KEY`. A
    checkpoint must have been exported earlier, and kept outside the database. With a checkpoint,
    `verify` detects that the newest seals and events were removed, or that all seals were replaced.
    The memory use of `verify` does not depend on the number of events. `verify` calls `progress`
    with the last verified position, and with the last position of the audit trail.

    Raises:
        ConfigurationError: The list `keys` is empty, and `AUDIT_SIGNING_KEY` is not set.
    """
    if not keys:
        own = await database.signing_key()
        keys = [own.public_key()] if own is not None else []
    verifier = TrailVerifier(keys, checkpoint)
    async with storage.open_snapshot(database) as connection:
        total = await connection.fetchval("SELECT max(position) FROM audit_logs") or 0
        verifier.database_time = await storage.database_time(connection)
        verifier.expect_retired(Seal(*row) for row in await connection.fetch(_SELECT_RETIREMENTS))
        async for item in storage.read_trail(connection):
            verifier.add(item)
            if not isinstance(item, Seal) and item[0] % _PROGRESS_POSITIONS == 0:
                progress(item[0], total)
        progress(total, total)
    return verifier.finish()


@public
async def verify_export(
    path: Path,
    *,
    keys: Sequence[Ed25519PublicKey],
    checkpoint: Seal | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Verify an export of the whole audit trail in JSON Lines, without a database.

    `verify_export` calls `progress` with the number of verified bytes, and with the number of all
    bytes of the file.

    Raises:
        ConfigurationError: The list `keys` is empty.
        InvalidValue: The file is not an export in JSON Lines, or the export has no seal and no
            checkpoint is given.
        OSError: The file of the export cannot be read.
    """
    verifier = TrailVerifier(keys, checkpoint)

    def run() -> Verification:
        total = path.stat().st_size
        verifier.expect_retired(item for item, _ in read_export(path) if isinstance(item, Seal))
        done = 0
        for item, size in read_export(path):
            done += size
            verifier.add(item)
            if isinstance(item, Seal):
                progress(done, total)
        progress(total, total)
        report = verifier.finish()
        if report.seals == 0 and checkpoint is None:
            raise InvalidValue(f"{path} holds no seal: export the audit trail without filters")
        return report

    return await asyncio.to_thread(run)


@dataclass(slots=True)
class _Mismatch:
    """A position whose event is missing (`found` is None) or differs from the sealed event."""

    seal: int  # number of the seal that covers the position, or 0 for an unsealed event
    expected: bytes | None = None
    found: bytes | None = None
    event_id: str | None = None


class TrailVerifier:
    """A verification of seals and events that the caller adds one after another.

    Add the seals in the order of seal numbers. After each call of `add_seal`, call `add_event` for
    the events that the seal covers, in the order of positions. Set `database_time` before the first
    seal is added. If `database_time` is earlier than the newest seal, the times of unsealed events
    are not checked.

    Raises:
        ConfigurationError: The list `keys` is empty.
    """

    def __init__(self, keys: Sequence[Ed25519PublicKey], checkpoint: Seal | None = None) -> None:
        if not keys:
            raise ConfigurationError(
                "there is no key to verify seals with: give a public key, or set AUDIT_SIGNING_KEY"
            )
        self.database_time = "9"  # the text "9" sorts after every time in ISO 8601
        self._keys = keys
        self._checkpoint = checkpoint
        self._checkpoint_seen = checkpoint is None
        self._report = Verification()
        self._findings: list[tuple[int, AuditFinding]] = []  # findings with their sort keys
        self._retired: PositionRanges = ()
        # The following attributes describe the last added seal.
        self._number = 0
        self._payload_digest = NO_PREVIOUS_DIGEST
        self._is_unreadable = False
        self._upto = 0  # Highest position that is covered by the seals added so far.
        self._missing_upto = -(2**63) - 1  # Highest position that a missing seal can cover.
        # Events of the last added seal were created at `_created_after` or later. Events that the
        # next seals cover were created at `_next_created_after` or later. If one of these two
        # attributes is an empty text, the creation times of its events are not checked.
        self._created_after = ""
        self._next_created_after = ""
        # The following attributes describe events, with positions as keys.
        self._expected: dict[int, bytes] = {}  # Digests of sealed events that are not added yet.
        self._last_found = 0  # Highest position at which a sealed event was added.
        self._mismatches: dict[int, _Mismatch] = {}
        self._unexpected: list[tuple[int, _Mismatch]] = []
        self._backdated: list[tuple[int, _Mismatch]] = []
        if checkpoint is not None and not checkpoint.is_signed_by(keys):
            self._find(
                0, FindingKind.CHECKPOINT, "none of the given public keys has signed the checkpoint"
            )
            self._checkpoint_seen = True

    def expect_retired(self, seals: Iterable[Seal]) -> None:
        """Accept missing events whose retirement is recorded by a correctly signed seal."""
        payloads = (seal.payload() for seal in seals if seal.is_signed_by(self._keys))
        retired = (payload for payload in payloads if payload.retired is not None)
        self._retired = tuple(sorted(run for payload in retired for run in payload.positions))

    def add(self, item: Seal | Event) -> None:
        if isinstance(item, Seal):
            self._add_seal(item)
        else:
            self._add_event(*item)

    def _add_seal(self, seal: Seal) -> None:
        self._close_seal()
        self._created_after = self._next_created_after
        self._report.seals += 1
        try:
            payload = seal.payload()
        except InvalidValue as error:
            self._number += 1
            self._find_forged(str(error))
            self._is_unreadable = True
            return
        self._verify_link(payload)
        self._number, self._payload_digest = payload.number, seal.payload_digest
        expected = seal.event_digests(payload)
        if not seal.is_signed_by(self._keys):
            self._find_forged("none of the given public keys has signed the seal")
        elif payload.retired is None and (
            len(seal.digests) != payload.event_count * DIGEST_BYTES
            or merkle_root(expected).hex() != payload.root
        ):
            self._find_forged("the digests of the events do not match the Merkle root")
        self._compare_checkpoint(seal, payload)
        if payload.retired is None:
            # A forged seal can cover positions that earlier seals covered.
            self._expected = {at: digest for at, digest in expected if at > self._upto}
            self._drop_retired(payload)
        self._upto = max(self._upto, payload.upto)
        # If the database's clock was set back, the creation times of events prove nothing.
        if payload.sealed_at[:19] < self._created_after:
            self._created_after = ""
        self._next_created_after = _lower_bound(payload.closed_at) or self._created_after

    def _verify_link(self, payload: SealPayload) -> None:
        """Verify that a seal continues the chain of the previous seals."""
        if self._is_unreadable:
            self._is_unreadable = False
            self._missing_upto = payload.after
        elif payload.number != self._number + 1:
            first, last = self._number + 1, payload.number - 1
            message = _missing_seals(first, last)
            if first > last:
                message = f"expected seal {first}, found seal {payload.number}"
            self._find(self._upto, FindingKind.FORGED, message, seal=first)
            self._missing_upto = payload.after
        elif payload.previous != self._payload_digest:
            self._number = payload.number
            self._find_forged("the field `previous` is not the digest of the previous seal")
        elif payload.after != self._upto and payload.retired is None:
            self._number = payload.number
            self._find_forged("the field `after` is not the last position of the previous seal")

    def _compare_checkpoint(self, seal: Seal, payload: SealPayload) -> None:
        if self._checkpoint is None or self._checkpoint_seen:
            return
        if payload.number == self._checkpoint.payload().number:
            self._checkpoint_seen = True
            if seal.payload_json != self._checkpoint.payload_json:
                message = f"seal {payload.number} differs from the seal in the checkpoint"
                self._find(self._upto, FindingKind.CHECKPOINT, message, seal=payload.number)

    def _drop_retired(self, payload: SealPayload) -> None:
        for first, last in self._retired:
            for position in range(max(first, payload.after + 1), min(last, payload.upto) + 1):
                if self._expected.pop(position, None) is not None:
                    self._report.retired += 1

    def _add_event(self, position: int, content: str) -> None:
        digest = digest_of(content)
        if position > self._upto:
            self._add_unsealed(position, content, digest)
            return
        event_id = storage.event_id_in(content)
        if content[_CREATED_AT] < self._created_after:
            self._backdated.append((position, _Mismatch(self._number, event_id=event_id)))
        expected = self._expected.pop(position, None)
        if expected is not None:
            self._last_found = max(self._last_found, position)
            if expected == digest:
                self._report.rows += 1
            else:
                self._mismatches[position] = _Mismatch(self._number, expected, digest, event_id)
        elif (other := self._mismatches.get(position)) is not None and other.expected == digest:
            # Two events have the same position. The seal covers the second event, not the first.
            self._report.rows += 1
            del self._mismatches[position]
            unexpected = _Mismatch(self._number, found=other.found, event_id=other.event_id)
            self._remember(position, unexpected)
        elif position > self._missing_upto:
            self._remember(position, _Mismatch(self._number, found=digest, event_id=event_id))

    def _add_unsealed(self, position: int, content: str, digest: bytes) -> None:
        self._report.unsealed += 1
        event_id = storage.event_id_in(content)
        if self._mismatches or self._expected:  # a sealed event was possibly moved to `position`
            self._remember(position, _Mismatch(0, found=digest, event_id=event_id))
        if content[_CREATED_AT] < self._next_created_after <= self.database_time:
            self._backdated.append((position, _Mismatch(self._number + 1, event_id=event_id)))

    def _remember(self, position: int, unexpected: _Mismatch) -> None:
        if len(self._unexpected) < _REMEMBERED_EVENTS:
            self._unexpected.append((position, unexpected))
        elif unexpected.seal:
            self._report.count += 1

    def _close_seal(self) -> None:
        """Record a mismatch for each missing event that the last seal covers."""
        for position, digest in self._expected.items():
            if len(self._mismatches) < _REMEMBERED_EVENTS:
                self._mismatches[position] = _Mismatch(self._number, digest)
            else:
                self._report.count += 1
        self._expected = {}

    def finish(self) -> Verification:
        """Return the result of the verification, after all seals and events have been added."""
        self._close_seal()
        self._explain_mismatches()
        if self._checkpoint is not None and not self._checkpoint_seen:
            self._add_missing_checkpoint(self._checkpoint.payload())
        self._findings.sort(key=lambda found: found[0])
        self._report.findings = [finding for _, finding in self._findings[:_REPORTED_FINDINGS]]
        return self._report

    def _add_missing_checkpoint(self, checkpoint: SealPayload) -> None:
        first = self._number + 1
        kind = FindingKind.TRUNCATED
        message = f"{_missing_seals(first, checkpoint.number)}, according to the checkpoint"
        if first == checkpoint.number and self._payload_digest != checkpoint.previous:
            kind = FindingKind.CHECKPOINT
            message = f"seal {self._number} is not the seal that precedes the checkpoint"
        self._find(self._upto + 1, kind, message, seal=first)

    def _explain_mismatches(self) -> None:
        """Add a finding for each changed, deleted, moved or inserted event."""
        now_at = {other.found: (at, other.event_id) for at, other in self._unexpected}
        now_at |= {o.found: (at, o.event_id) for at, o in self._mismatches.items() if o.found}
        belongs_at = {other.expected: at for at, other in self._mismatches.items()}
        for position, mismatch in self._mismatches.items():
            if (now := now_at.get(mismatch.expected)) is not None:
                kind = FindingKind.MOVED
                message = f"the event of position {position} was moved to position {now[0]}"
                mismatch.event_id = now[1]
            elif mismatch.found in belongs_at:
                kind = FindingKind.MOVED
                origin = belongs_at[mismatch.found]
                message = f"the event of position {origin} was moved to position {position}"
            elif mismatch.found is not None:
                kind = FindingKind.CHANGED
                message = f"the event at position {position} was changed"
            elif position > self._last_found:
                kind = FindingKind.TRUNCATED
                message = f"the event at position {position} and all later events are missing"
            else:
                kind = FindingKind.DELETED
                message = f"the event at position {position} is missing"
            self._find(position, kind, message, event=mismatch)
        for position, backdated in self._backdated:
            message = (
                f"the event at position {position} has a time before seal {backdated.seal - 1},"
                " but was written after this seal"
            )
            self._find(position, FindingKind.INSERTED, message, event=backdated)
        for position, unexpected in self._unexpected:
            if unexpected.found not in belongs_at and unexpected.seal:
                message = (
                    f"the event at position {position} was written after seal {unexpected.seal}"
                )
                self._find(position, FindingKind.INSERTED, message, event=unexpected)

    def _find_forged(self, reason: str) -> None:
        message = f"seal {self._number}: {reason}"
        self._find(self._upto, FindingKind.FORGED, message, seal=self._number)

    def _find(
        self,
        position: int,
        kind: FindingKind,
        message: str,
        *,
        seal: int | None = None,
        event: _Mismatch | None = None,
    ) -> None:
        """Add a finding about a seal, or about the event at the position."""
        finding = AuditFinding(kind, message, seal)
        if event is not None:
            finding = AuditFinding(kind, message, event.seal, position, event.event_id)
        self._report.count += 1
        self._findings.append((position, finding))


def _missing_seals(first: int, last: int) -> str:
    if first == last:
        return f"seal {first} is missing"
    return f"the seals from {first} to {last} are missing"


def _lower_bound(time: str | None) -> str:
    """Return an ISO 8601 time minus the clock tolerance. Return "" if the time is not valid."""
    try:
        return (datetime.fromisoformat(time or "") - _CLOCK_TOLERANCE).isoformat()[:19]
    except (ValueError, OverflowError):
        return ""
