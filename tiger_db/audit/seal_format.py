"""What a seal states, how it is signed, and what it proves. Nothing here asks a database.

The content of an event is one line of JSON: its fields in a fixed order, those without a value left
out. A seal covers events by their places: the leaves of its Merkle tree (RFC 6962, section 2.1) are
a place, in 8 bytes, and the SHA-256 of the event's content. Its statement is JSON too, signed as it
stands with Ed25519 (RFC 8032), and holds the digest of the statement before it.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tiger_db.errors import InvalidValue

DIGEST = 32  # bytes of SHA-256
FIRST = "0" * 64  # stands for the digest of the statement before the first
Runs = tuple[tuple[int, int], ...]  # of places, first and last included
_VERSION = 1
_TOO_FAR = 2**63 - 1  # the last that a column can hold


def digest_of(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


def merkle_root(leaves: Iterable[tuple[int, bytes]]) -> bytes:
    """The root over places and digests, in the order given."""
    stack: list[tuple[int, bytes]] = []  # subtrees: how many leaves, and their root
    for place, digest in leaves:
        size = 1
        root = hashlib.sha256(b"\0" + place.to_bytes(8, "big", signed=True) + digest).digest()
        while stack and stack[-1][0] == size:
            root = _node(stack.pop()[1], root)
            size *= 2
        stack.append((size, root))
    if not stack:
        return hashlib.sha256(b"").digest()
    root = stack.pop()[1]
    while stack:
        root = _node(stack.pop()[1], root)
    return root


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def runs_of(places: Iterable[int]) -> Runs:
    """The runs of ascending places."""
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return tuple((first, last) for first, last in runs)


def places_in(runs: Runs) -> Iterator[int]:
    for first, last in runs:
        yield from range(first, last + 1)


@dataclass(frozen=True, slots=True)
class Statement:
    """What a seal says of the events in the places after `after`, up to `upto`.

    What is not covered by it or by one before was written after `closed_at`; None: that cannot be
    said of this one. Times are in UTC, by the database's clock. `retired`, such as `2025-01`, is
    the month whose events have left: then `positions` are theirs, and nothing else is covered.
    """

    number: int
    previous: str
    after: int
    upto: int
    positions: Runs
    root: str
    sealed_at: str
    key: str
    closed_at: str | None = None
    retired: str | None = None

    @property
    def rows(self) -> int:
        return sum(last - first + 1 for first, last in self.positions)

    def text(self) -> str:
        """The statement as it is signed."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(
            {"version": _VERSION} | {k: v for k, v in fields.items() if v is not None},
            separators=(",", ":"),
        )


def _can_be(statement: Statement) -> bool:
    """Whether its members are what they are said to be: JSON does not tell."""
    places = [place for run in statement.positions for place in run]
    numbers = (statement.number, statement.after, statement.upto, *places)
    texts = (statement.previous, statement.root, statement.sealed_at, statement.key)
    return (
        all(isinstance(number, int) and abs(number) < _TOO_FAR for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and isinstance(statement.closed_at, str | None)
        and isinstance(statement.retired, str | None)
    )


@dataclass(frozen=True, slots=True)
class Seal:
    """A statement's text, its signature, and the digests of the events in their order."""

    text: str
    signature: bytes
    digests: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def signed_by(self, keys: Sequence[Ed25519PublicKey]) -> bool:
        for key in keys:
            try:
                key.verify(self.signature, self.text.encode())
            except InvalidSignature:
                continue
            return True
        return False

    def statement(self) -> Statement:
        """What it says.

        Raises:
            InvalidValue: it is not the text of a statement.
        """
        try:
            fields = json.loads(self.text)
            positions = tuple((int(first), int(last)) for first, last in fields.pop("positions"))
            if fields.pop("version") != _VERSION:
                raise InvalidValue("a seal of another version: upgrade tiger_db")
            statement = Statement(positions=positions, **fields)
            sound = statement.text() == self.text and _can_be(statement)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise InvalidValue("not the statement of a seal")
        return statement

    def expected(self, statement: Statement) -> list[tuple[int, bytes]]:
        """The places that it covers, with the digest of the event in each."""
        digests = (self.digests[at : at + DIGEST] for at in range(0, len(self.digests), DIGEST))
        return list(zip(places_in(statement.positions), digests, strict=False))


def make_seal(key: Ed25519PrivateKey, statement: Statement, digests: Iterable[bytes]) -> Seal:
    text = statement.text()
    return Seal(text, key.sign(text.encode()), b"".join(digests))


def to_json(seal: Seal) -> dict[str, str]:
    return {
        "statement": seal.text,
        "signature": base64.b64encode(seal.signature).decode(),
        "digests": base64.b64encode(seal.digests).decode(),
    }


def from_json(fields: object) -> Seal:
    """A seal as `to_json` gave it, or without its digests.

    Raises:
        InvalidValue: it is not one.
    """
    try:
        assert isinstance(fields, dict)
        digests = base64.b64decode(fields.get("digests", ""), validate=True)
        signature = base64.b64decode(fields["signature"], validate=True)
        seal = Seal(fields["statement"], signature, digests)
        seal.statement()
    except (AssertionError, KeyError, TypeError, binascii.Error):
        raise InvalidValue("not a seal") from None
    return seal
