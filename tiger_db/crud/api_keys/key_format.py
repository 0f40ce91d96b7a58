"""The format of API keys: `tdb_<live|test>_<public id>_<secret><checksum>`, in base62.

A double click selects the whole key. The public id has 12 characters, the secret 43 (256 random
bits), the checksum 6: the CRC-32 of all characters before it. A truncated or mistyped key fails the
checksum, without a query.
"""

import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

KEY_PATTERN = r"\btdb_(?:live|test)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b"

_FORMAT = re.compile(r"(tdb_(?:live|test)_[0-9A-Za-z]{12})_([0-9A-Za-z]{49})", re.ASCII)
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID = 12  # characters; 71 bits
_SECRET = 43  # characters; the first length that holds 256 bits
_CHECKSUM = 6  # characters; the first length that holds 32 bits


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key: its public prefix, and its secret with the checksum."""

    prefix: str
    secret: str = field(repr=False)

    @property
    def raw_key(self) -> str:
        return f"{self.prefix}_{self.secret}"


def new_key(environment: str) -> ParsedKey:
    """Generate a random key for an environment, `live` or `test`."""
    public_id = "".join(secrets.choice(_ALPHABET) for _ in range(_ID))
    prefix = f"tdb_{environment}_{public_id}"
    secret = _base62(secrets.randbits(256), _SECRET)
    return ParsedKey(prefix, secret + checksum(f"{prefix}_{secret}"))


def parse_key(raw_key: str) -> ParsedKey | None:
    """Split a raw key into its parts; return None if it is malformed or no string."""
    match = _FORMAT.fullmatch(raw_key) if isinstance(raw_key, str) else None
    if match is None or checksum(raw_key[:-_CHECKSUM]) != raw_key[-_CHECKSUM:]:
        return None
    return ParsedKey(match[1], match[2])


def checksum(text: str) -> str:
    """Return the CRC-32 of a text as 6 characters of base62."""
    return _base62(zlib.crc32(text.encode()), _CHECKSUM)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
