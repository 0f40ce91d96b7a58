"""What an access token of Tiger's says of itself."""

import base64
import binascii
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

_STAMPS = re.compile(rb"(\d{13}),(\d{13})")
_LENGTH = 36  # characters of base64, for these 27 bytes
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class NewToken:
    """What a refresh brought. `expires_at` is aware; None: it is read out of a token of Tiger's."""

    access_token: str = field(repr=False)
    expires_at: datetime | None = None
    refresh_token: str | None = field(default=None, repr=False)
    code: int | None = None  # the broker's


class TokenTimes(NamedTuple):
    """When a token was made and until when it is good, by Tiger's clock (UTC)."""

    generated_at: datetime
    expires_at: datetime


def token_times(token: str) -> TokenTimes | None:
    """Read the times out of a token; None where it is of another form, as OAuth's are.

    Tiger's tokens are base64 of `<generated>,<expires>`, two stamps of 13 digits in epoch
    milliseconds, and 16 opaque bytes (tigeropen 3.8.0, `should_token_refresh`), whose alphabet and
    padding make no difference.
    """
    try:
        content = base64.b64decode(token.strip()[:_LENGTH], validate=True)
    except (binascii.Error, ValueError):
        return None
    stamps = _STAMPS.fullmatch(content)
    if stamps is None:
        return None
    generated, expires = (_EPOCH + timedelta(milliseconds=int(stamp)) for stamp in stamps.groups())
    return TokenTimes(generated, expires) if generated < expires else None
