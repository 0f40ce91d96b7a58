"""The text of a key: `tdb_<live|test>_<public id>_<secret><checksum>`, all in base62.

A double click selects it whole. The public id has 12 characters, the secret 43 (256 random bits),
the checksum 6: the CRC-32 of everything before it, so that what was cut or mistyped is told without
asking the database.
"""

import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

KEY_PATTERN = r"\btdb_(?:live|test)_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b"

_FORM = re.compile(r"(tdb_(?:live|test)_[0-9A-Za-z]{12})_([0-9A-Za-z]{49})", re.ASCII)
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID = 12  # characters; 71 bits
_SECRET = 43  # characters; the first length that holds 256 bits
_CHECKSUM = 6  # characters; the first length that holds 32 bits


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """A well-formed key: its public prefix, and the secret that follows, checksum included."""

    prefix: str
    secret: str = field(repr=False)

    @property
    def raw_key(self) -> str:
        return f"{self.prefix}_{self.secret}"


def new_key(environment: str) -> ParsedKey:
    """A new random key for an environment, `live` or `test`."""
    public_id = "".join(secrets.choice(_ALPHABET) for _ in range(_ID))
    prefix = f"tdb_{environment}_{public_id}"
    secret = _base62(secrets.randbits(256), _SECRET)
    return ParsedKey(prefix, secret + checksum(f"{prefix}_{secret}"))


def parse_key(raw_key: str) -> ParsedKey | None:
    """The parts of a key's text; None for anything that cannot be one."""
    form = _FORM.fullmatch(raw_key) if isinstance(raw_key, str) else None
    if form is None or checksum(raw_key[:-_CHECKSUM]) != raw_key[-_CHECKSUM:]:
        return None
    return ParsedKey(form[1], form[2])


def checksum(text: str) -> str:
    """CRC-32 as 6 characters of base62."""
    return _base62(zlib.crc32(text.encode()), _CHECKSUM)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
