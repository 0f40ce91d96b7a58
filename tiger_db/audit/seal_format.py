"""Seal format: digests of events, Merkle root, signed payload. This module uses no database.

The content of an event is one line of JSON: the fields that are not NULL, in a fixed order. A seal
covers a list of events. A leaf of the seal's Merkle tree (RFC 6962, section 2.1) is the position of
an event in 8 bytes, and the SHA-256 digest of the event's content. The payload of a seal is JSON,
contains the digest of the previous seal's payload, and is signed with Ed25519 (RFC 8032).
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, TypeAdapter, ValidationError

from tiger_db.errors import InvalidValue

DIGEST_BYTES = 32  # Size of a SHA-256 digest in bytes.
NO_PREVIOUS_DIGEST = "0" * 64  # Value of the field `previous` in the first seal.
SEAL_VERSION = 2  # Version of the payloads of new seals.
RESTORE_VERSION = 3  # Version of the payloads of seals that record a restore.
ARCHIVE_VERSION = 4  # Version of the payloads of retirements whose events are in the archive.
# Each range of positions is a pair: the first position and the last position of the range.
PositionRanges: TypeAlias = tuple[tuple[int, int], ...]


def digest_of(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


def split_digests(digests: bytes | bytearray) -> Iterator[bytes]:
    """Yield each digest from a concatenation of digests."""
    for start in range(0, len(digests), DIGEST_BYTES):
        yield bytes(digests[start : start + DIGEST_BYTES])


class MerkleTree:
    """The Merkle tree of events that are added in the order of positions, in little memory."""

    def __init__(self, leaves: Iterable[tuple[int, bytes]] = ()) -> None:
        self.count = 0
        self._ranges: list[list[int]] = []
        # Each item of the stack is a complete subtree: the number of its leaves, and its root.
        self._stack: list[tuple[int, bytes]] = []
        for position, digest in leaves:
            self.add(position, digest)

    def add(self, position: int, digest: bytes) -> None:
        self.count += 1
        if self._ranges and self._ranges[-1][1] == position - 1:
            self._ranges[-1][1] = position
        else:
            self._ranges.append([position, position])
        size = 1
        root = hashlib.sha256(b"\0" + position.to_bytes(8, "big", signed=True) + digest).digest()
        while self._stack and self._stack[-1][0] == size:
            root = _node(self._stack.pop()[1], root)
            size *= 2
        self._stack.append((size, root))

    @property
    def positions(self) -> PositionRanges:
        return tuple((first, last) for first, last in self._ranges)

    @property
    def root(self) -> str:
        """The root of the tree in hexadecimal."""
        if not self._stack:
            return hashlib.sha256(b"").hexdigest()
        *rest, (_, root) = self._stack
        for _, left in reversed(rest):
            root = _node(left, root)
        return root.hex()


def merkle_root(leaves: Iterable[tuple[int, bytes]]) -> bytes:
    """Compute the root of a Merkle tree. Each leaf is a pair of a position and a digest."""
    return bytes.fromhex(MerkleTree(leaves).root)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def ranges_of(positions: Iterable[int]) -> PositionRanges:
    """Convert ascending positions to ranges of consecutive positions."""
    return MerkleTree((position, b"") for position in positions).positions


def positions_in(ranges: PositionRanges) -> Iterator[int]:
    for first, last in ranges:
        yield from range(first, last + 1)


def subtract_ranges(
    runs: list[tuple[int, int, int]], ranges: PositionRanges
) -> tuple[list[tuple[int, int, int]], PositionRanges]:
    """Return the runs without the positions of the ranges, and the positions of both.

    Runs and ranges are in ascending order. The third item of a run is the number of its seal.
    """
    rest: list[tuple[int, int, int]] = []
    removed: list[tuple[int, int]] = []
    ordered, at = sorted(ranges), 0
    for run_first, last, seal in runs:
        first = run_first
        while at < len(ordered) and ordered[at][1] < first:
            at += 1
        index = at
        while first <= last and index < len(ordered) and ordered[index][0] <= last:
            low, high = max(ordered[index][0], first), min(ordered[index][1], last)
            if low > first:
                rest.append((first, low - 1, seal))
            removed.append((low, high))
            first = high + 1
            index += 1
        if first <= last:
            rest.append((first, last, seal))
    return rest, tuple(removed)


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Origin = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Int64 = Annotated[int, Field(gt=-(2**63) + 1, lt=2**63 - 1)]
# A file of the archive: its name, the number of its rows, and the SHA-256 digest of its bytes.
ArchivedFile: TypeAlias = tuple[
    Annotated[str, Field(pattern=r"^month=\d{4}-\d\d/\w[\w-]*\.parquet$")],
    Annotated[int, Field(ge=1)],
    Digest,
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SealPayload:
    """The signed part of a seal that covers the events at positions above `after`, up to `upto`.

    All events that are still unsealed after this seal were written after the time `closed_at`. If
    `closed_at` is None, the audit trail can contain unsealed events that are older than the seal.

    `retired` is the retired month, such as `2025-01`, whose events at `positions` were removed. A
    seal that records a retired month covers no new events. All times in the payload are UTC times
    of the database's clock.

    In version 1, a payload has no `origin` and no `next_key`. In version 2, `origin` is the random
    identity of the audit trail, which is the same in all seals. The seals after a seal with
    `next_key` are signed with that key. `key` and `next_key` are public keys.

    A payload of version 3 records that a restore of the database has lost the seals between the
    seal with the digest `previous` and this seal. `lost` is the digest of the payload of the last
    lost seal, whose number is `number - 1`. `lost_upto` is the last position that it covered.

    A payload of version 4 records a retired month, whose events were written to the files in
    `archive`.
    """

    version: int = 1
    number: Int64
    previous: str
    after: Int64
    upto: Int64
    positions: tuple[tuple[Int64, Int64], ...]
    root: str
    sealed_at: str
    key: str
    closed_at: str | None = None
    retired: str | None = None
    origin: Origin | None = None
    next_key: str | None = None
    lost: Digest | None = None
    lost_upto: Int64 | None = None
    archive: tuple[ArchivedFile, ...] | None = None

    @property
    def event_count(self) -> int:
        return sum(last - first + 1 for first, last in self.positions)

    def to_json(self) -> str:
        """Return the payload as JSON, in the exact form that is signed."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        present = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(present, separators=(",", ":"))


_PAYLOAD = TypeAdapter(SealPayload)


@dataclass(frozen=True, slots=True)
class Seal:
    """A signed payload, and the concatenated digests of the sealed events in order of position."""

    payload_json: str
    signature: bytes
    digests: bytes
    # Number of the seal's row in the database, which is not signed. In an export, the number of the
    # row is unknown.
    row_number: int | None = field(default=None, compare=False)

    @property
    def payload_digest(self) -> str:
        return hashlib.sha256(self.payload_json.encode()).hexdigest()

    def is_signed_by(self, keys: Sequence[Ed25519PublicKey]) -> bool:
        """Return whether the seal's signature is valid for one of the public keys."""
        for key in keys:
            try:
                key.verify(self.signature, self.payload_json.encode())
            except InvalidSignature:
                continue
            return True
        return False

    def payload(self) -> SealPayload:
        """Return the parsed payload of the seal.

        Raises:
            InvalidValue: The payload of the seal is not valid, or has an unsupported version.
        """
        try:
            payload = _PAYLOAD.validate_json(self.payload_json, strict=True)
        except (ValidationError, TypeError):
            payload = None
        if payload is not None and payload.version not in range(1, ARCHIVE_VERSION + 1):
            raise InvalidValue("the version of the seal is not supported: upgrade tiger_db")
        if (
            payload is None
            or payload.to_json() != self.payload_json
            or (payload.origin is not None) != (payload.version != 1)
            or (payload.next_key is not None and payload.version != SEAL_VERSION)
            or (payload.lost is not None) != (payload.version == RESTORE_VERSION)
            or (payload.lost_upto is not None) != (payload.version == RESTORE_VERSION)
            or (payload.archive is not None) != (payload.version == ARCHIVE_VERSION)
            or (payload.archive is not None and payload.retired is None)
        ):
            raise InvalidValue("the payload of the seal is invalid")
        return payload

    def event_digests(self, payload: SealPayload) -> list[tuple[int, bytes]]:
        """Return a pair of position and digest for each event that the seal covers."""
        return list(zip(positions_in(payload.positions), split_digests(self.digests), strict=False))


def make_seal(key: Ed25519PrivateKey, payload: SealPayload, digests: bytes) -> Seal:
    """Sign a payload, and return the seal."""
    payload_json = payload.to_json()
    return Seal(payload_json, key.sign(payload_json.encode()), digests)


def seal_to_json(seal: Seal) -> dict[str, str]:
    return {
        "statement": seal.payload_json,
        "signature": base64.b64encode(seal.signature).decode(),
        "digests": base64.b64encode(seal.digests).decode(),
    }


def seal_from_json(fields: object) -> Seal:
    """Decode a seal from the output of `seal_to_json`, in which `digests` may be missing.

    Raises:
        InvalidValue: The argument `fields` does not encode a valid seal.
    """
    try:
        assert isinstance(fields, dict)
        digests = base64.b64decode(fields.get("digests", ""), validate=True)
        signature = base64.b64decode(fields["signature"], validate=True)
        seal = Seal(fields["statement"], signature, digests)
        seal.payload()
    except (AssertionError, KeyError, TypeError, binascii.Error):
        raise InvalidValue("the JSON value is not a seal of audit events") from None
    return seal
