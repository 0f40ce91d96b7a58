"""The format of API keys, `tdb_<live|test>_<public id>_<secret><checksum>`, in base62.

API keys contain only letters, digits and `_`, so that a double click selects a whole API key. The
checksum is the CRC-32 of all characters before the checksum. Because of the checksum, a truncated
or mistyped API key is refused without a database query.
"""

import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

KEY_PATTERN = r"\btdb_(?:live|test)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b"

_FORMAT = re.compile(r"(tdb_(?:live|test)_[0-9A-Za-z]{12})_([0-9A-Za-z]{49})", re.ASCII)
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
# The public id at the end of an API key's public prefix has 12 base62 characters, which are 71
# random bits. A secret of 256 bits needs at least 43 base62 characters, and a checksum of 32 bits
# needs at least 6 base62 characters.
_ID_CHARACTERS = 12
_SECRET_CHARACTERS = 43
_CHECKSUM_CHARACTERS = 6


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed API key, split into the public prefix and the secret with the checksum."""

    prefix: str
    secret: str = field(repr=False)

    @property
    def raw_key(self) -> str:
        return f"{self.prefix}_{self.secret}"


def new_key(environment: str) -> ParsedKey:
    """Generate a random API key for the environment `live` or `test`."""
    public_id = "".join(secrets.choice(_ALPHABET) for _ in range(_ID_CHARACTERS))
    prefix = f"tdb_{environment}_{public_id}"
    secret = _base62(secrets.randbits(256), _SECRET_CHARACTERS)
    return ParsedKey(prefix, secret + checksum(f"{prefix}_{secret}"))


def parse_key(raw_key: str) -> ParsedKey | None:
    """Parse a raw API key. Return None if the raw key is malformed or is not a string."""
    match = _FORMAT.fullmatch(raw_key) if isinstance(raw_key, str) else None
    at = -_CHECKSUM_CHARACTERS
    if match is None or checksum(raw_key[:at]) != raw_key[at:]:
        return None
    return ParsedKey(match[1], match[2])


def checksum(text: str) -> str:
    """Return the CRC-32 of a text as 6 base62 characters."""
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_CHARACTERS)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
