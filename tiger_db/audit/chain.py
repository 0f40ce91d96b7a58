"""Verification of the chain of seals: order, links, signatures, origin and signing keys."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiger_db.audit.seal_format import (
    DIGEST_BYTES,
    NO_PREVIOUS_DIGEST,
    Seal,
    SealPayload,
    merkle_root,
)
from tiger_db.errors import InvalidValue
from tiger_db.signing import parse_public_key, public_text


class FindingKind(StrEnum):
    CHANGED = "changed"
    DELETED = "deleted"
    INSERTED = "inserted later"
    MOVED = "moved"
    TRUNCATED = "truncated at the end"
    FORGED = "seal forged"
    CHECKPOINT = "checkpoint mismatch"
    DUPLICATE = "two events in one position"
    CLOCK = "clock went back"
    PROTECTION = "protection weakened"
    RESTORED = "lost by a restore"
    ARCHIVE = "archive changed"


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """Evidence of tampering with a seal or an event."""

    kind: FindingKind
    message: str
    seal: int | None = None  # Number of the seal that the finding is about.
    position: int | None = None  # Position of the event that the finding is about.
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class LostSeals:
    """The seals that a restore of the database has lost, according to a seal that records it."""

    seal: int  # Number of the seal that records the restore.
    first: int  # Number of the first lost seal. `seal - 1` is the number of the last one.
    after: int  # The lost seals covered positions above `after`, up to `upto`.
    upto: int
    digest: str  # Digest of the payload of the last lost seal.

    def __str__(self) -> str:
        return describe_lost_seals(self.first, self.seal, self.after, self.upto)


class ChainVerifier:
    """A verification of seals that the caller adds in the order of their rows.

    Each seal must continue the chain of the seals before it, and must be signed with the key in
    force. The first seal names the first key in force, and a seal with `next_key` changes the key
    for the seals after it. Seals are trusted if a seal with one of the `keys` precedes or follows
    them in the unbroken chain, because each seal signs the digest of the previous seal. Seals of
    version 1 can be signed with any of the `keys`.

    `ChainVerifier` calls `find` for each finding, with the last position before the finding.
    """

    def __init__(
        self,
        keys: Sequence[Ed25519PublicKey],
        find: Callable[[int, AuditFinding], None],
        *,
        checkpoints: Iterable[Seal] = (),
    ) -> None:
        self.number = 0  # Number of the last added seal.
        self.upto = 0  # Highest position that is covered by the seals added so far.
        self.missing_upto = -(2**63) - 1  # Highest position that a missing seal can cover.
        self.missing: list[tuple[int, int]] = []  # Ranges that missing or invalid seals can cover.
        self.payload_digest = NO_PREVIOUS_DIGEST
        self.origin: str | None = None
        self.key: str | None = None  # Public key in force, in the form of `public_text`.
        self.signers: list[str] = []  # Public keys whose signatures were verified.
        self._find = find
        self._given = {public_text(key): key for key in keys}
        self._is_trusted = False  # True if the key in force follows from one of the given keys.
        self._untrusted_from: int | None = None  # Number of the first seal that is not trusted yet.
        self.has_unreadable_seal = False
        self._is_unreadable = False  # Whether the last added seal is unreadable.
        self._has_finding = False
        self.is_sound = True  # Whether no finding was reported.
        self.matched: list[Seal] = []  # Checkpoints that are in the chain.
        self.lost: list[LostSeals] = []  # Seals that recorded restores have lost.
        self._checkpoints: list[Seal] = []  # Checkpoints that were not compared yet.
        for checkpoint in checkpoints:
            if _signer(checkpoint, [*self._given, checkpoint.payload().key]) is not None:
                self._checkpoints.append(checkpoint)
                continue
            message = "none of the given public keys has signed the checkpoint"
            self._report(FindingKind.CHECKPOINT, message)

    def restart(self, find: Callable[[int, AuditFinding], None]) -> "ChainVerifier":
        """Return a verification of the same chain from its first seal, with the same keys."""
        again = ChainVerifier([*self._given.values()], find)
        again.origin = self.origin
        return again

    def start(self, seal: Seal) -> None:
        """Continue the chain after a seal that the caller trusts."""
        payload = seal.payload()
        self.number, self.upto = payload.number, payload.upto
        self.payload_digest, self.origin = seal.payload_digest, payload.origin
        self.key, self._is_trusted = payload.next_key or payload.key, True

    def start_before(self, seal: Seal) -> None:
        """Begin the chain with a seal whose predecessors the caller does not verify."""
        payload = seal.payload()
        self.number, self.upto = payload.number - 1, payload.after
        self.payload_digest, self.origin = payload.previous, payload.origin

    def add(self, seal: Seal) -> SealPayload | None:
        """Verify the next seal. Return its payload, or None if the payload cannot be read."""
        self._has_finding = False
        before = self.number
        try:
            payload = seal.payload()
        except InvalidValue as error:
            self._break()
            self.number += 1
            self._forged(str(error))
            self._is_unreadable = self.has_unreadable_seal = True
            return None
        is_linked = self._verify_link(seal, payload)
        self.number, self.payload_digest = payload.number, seal.payload_digest
        if is_linked:
            self._verify_fields(payload)
        self._verify_signature(seal, payload)
        if not self._has_finding and payload.retired is None:
            self._verify_digests(seal, payload)
        self._compare_checkpoint(seal, payload)
        if payload.lost and payload.lost_upto is not None and self.accepts_last_seal:
            self.lost.append(
                LostSeals(self.number, before + 1, self.upto, payload.lost_upto, payload.lost)
            )
        if payload.retired is None or self.accepts_last_seal:
            self.upto = max(self.upto, payload.upto)
        return payload

    @property
    def accepts_last_seal(self) -> bool:
        """Whether the signature and the place of the last added seal are correct."""
        return not self._has_finding

    def _verify_link(self, seal: Seal, payload: SealPayload) -> bool:
        """Verify that a seal continues the chain of the previous seals."""
        if self._is_unreadable:
            self._is_unreadable = False
            self._skip_to(payload)
            return False
        records_restore = payload.lost is not None and payload.number > self.number + 1
        if payload.number != self.number + 1 and not records_restore:
            self._break()
            first, last = self.number + 1, payload.number - 1
            message = describe_missing_seals(first, last)
            if first > last:
                message = f"expected seal {first}, found seal {payload.number}"
            self._report(FindingKind.FORGED, message, first)
            self._skip_to(payload)
            return False
        problem = None
        if seal.row_number not in (None, payload.number):
            problem = f"the number of the row is {seal.row_number}"
        elif payload.previous != self.payload_digest:
            problem = "the field `previous` is not the digest of the previous seal"
        elif payload.after != self.upto:
            problem = "the field `after` is not the last position of the previous seal"
        if problem is not None:
            self._break()
            self.number = payload.number
            self._forged(problem)
        return problem is None

    def _skip_to(self, payload: SealPayload) -> None:
        self.missing.append((self.upto + 1, payload.after))
        self.missing_upto = payload.after

    def _verify_fields(self, payload: SealPayload) -> None:
        if self.origin is not None and payload.origin != self.origin:
            self._forged("the seal belongs to an audit trail of another origin")
        elif payload.upto < payload.after or (
            payload.upto != payload.after and (payload.retired or payload.next_key or payload.lost)
        ):
            self._forged("the field `upto` is not valid")
        self.origin = self.origin or payload.origin

    def _verify_signature(self, seal: Seal, payload: SealPayload) -> None:
        allowed = [self.key or payload.key]
        if payload.origin is None:
            allowed += self._given
        signer = _signer(seal, allowed)
        if signer is None:
            known = {*self._given, *self.signers}
            message = "none of the given public keys has signed the seal"
            if payload.key in known and _signer(seal, [payload.key]) is not None:
                message = "the seal is signed with a key that was not in force"
            self._forged(message)
            return
        if signer in self._given:
            self._is_trusted, self._untrusted_from = True, None
        elif not self._is_trusted and self._untrusted_from is None:
            self._untrusted_from = payload.number
        if signer not in self.signers:
            self.signers.append(signer)
        self.key = payload.next_key or signer

    def _verify_digests(self, seal: Seal, payload: SealPayload) -> None:
        if (
            len(seal.digests) != payload.event_count * DIGEST_BYTES
            or merkle_root(seal.event_digests(payload)).hex() != payload.root
        ):
            self._forged("the digests of the events do not match the Merkle root")

    def _compare_checkpoint(self, seal: Seal, payload: SealPayload) -> None:
        for checkpoint in [*self._checkpoints]:
            message, expected = None, checkpoint.payload()
            number = expected.number
            if payload.number == number and seal.payload_json != checkpoint.payload_json:
                message = f"seal {number} differs from the seal in the checkpoint"
            if payload.origin and expected.origin and payload.origin != expected.origin:
                message = (
                    f"seal {payload.number} belongs to another audit trail than the checkpoint"
                )
            if message is not None:
                self._report(FindingKind.CHECKPOINT, message, payload.number)
            if message is not None or payload.number == number:
                self._checkpoints.remove(checkpoint)
                self.matched += [] if message else [checkpoint]

    def find_loss(self, checkpoint: Seal) -> LostSeals | None:
        """Return the record of the restore that has lost the seal of a checkpoint, or None."""
        expected = checkpoint.payload()
        for lost in self.lost:
            if expected.number == lost.seal - 1:
                is_lost = checkpoint.payload_digest == lost.digest
            else:
                is_lost = lost.first <= expected.number < lost.seal and (
                    expected.key in {*self._given, *self.signers}
                    and expected.origin in (None, self.origin)
                )
            if is_lost:
                return lost
        return None

    def check_trust(self) -> None:
        """Report the last seals if their signing key does not follow from one of the `keys`."""
        if self._untrusted_from is not None:
            first, last = self._untrusted_from, self.number
            message = f"seal {first}: none of the given public keys has signed the seal"
            if first != last:
                message = f"none of the given public keys has signed the seals {first} to {last}"
            self._report(FindingKind.FORGED, message, first)

    def _break(self) -> None:
        """Report the seals before a break in the chain whose signing key is unknown."""
        self.check_trust()
        self._untrusted_from, self.key, self._is_trusted = None, None, False

    def finish(self, newest_position: int) -> None:
        """Report what can be known only after the last seal and the last event."""
        self._break()
        for checkpoint in self._checkpoints:
            if self.find_loss(checkpoint) is not None:
                continue
            expected = checkpoint.payload()
            first, kind = min(self.number + 1, expected.number), FindingKind.TRUNCATED
            message = (
                f"{describe_missing_seals(first, expected.number)}, according to the checkpoint:"
                f" {_describe_extent(self.upto, expected.upto)}; the newest event is at position"
                f" {newest_position}"
            )
            if self.number + 1 == expected.number and self.payload_digest != expected.previous:
                kind = FindingKind.CHECKPOINT
                message = f"seal {self.number} is not the seal that precedes the checkpoint"
            self.upto += 1  # the finding follows those about the last events
            self._report(kind, message, first)
            self.upto -= 1

    def _forged(self, reason: str) -> None:
        self._report(FindingKind.FORGED, f"seal {self.number}: {reason}", self.number)

    def _report(self, kind: FindingKind, message: str, seal: int | None = None) -> None:
        self._has_finding, self.is_sound = True, False
        self._find(self.upto, AuditFinding(kind, message, seal))


def _signer(seal: Seal, keys: Iterable[str]) -> str | None:
    """Return the first of the public keys that has signed the seal, or None."""
    for key in keys:
        try:
            if seal.is_signed_by([parse_public_key(key)]):
                return key
        except InvalidValue:
            continue
    return None


def describe_missing_seals(first: int, last: int) -> str:
    return f"{_describe_seals(first, last)} missing"


def describe_lost_seals(first: int, restore: int, after: int, upto: int) -> str:
    return (
        f"{_describe_seals(first, restore - 1)} lost by a restore, which seal {restore} records:"
        f" {_describe_extent(after, upto)}"
    )


def _describe_seals(first: int, last: int) -> str:
    return f"seal {first} is" if first == last else f"the seals from {first} to {last} are"


def _describe_extent(after: int, upto: int) -> str:
    if upto <= after:
        return "no events were sealed there"
    if upto == after + 1:
        return f"position {upto} was sealed there"
    return f"positions from {after + 1} to {upto} were sealed there"
