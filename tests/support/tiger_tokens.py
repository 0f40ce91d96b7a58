"""Access tokens in Tiger's format."""

import base64
import hashlib
import itertools
from datetime import UTC, datetime, timedelta

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
SOON = NOW + timedelta(milliseconds=1)
MONTH = timedelta(days=30)


def tiger_token(generated: datetime = NOW, lasting: timedelta = MONTH) -> str:
    """Make a token in Tiger's format. All are different, but the same in each run."""
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    stamps = [(at - epoch) // timedelta(milliseconds=1) for at in (generated, generated + lasting)]
    opaque = hashlib.sha256(str(next(_made)).encode()).digest()[:16]
    return base64.b64encode(f"{stamps[0]},{stamps[1]}".encode() + opaque).decode()


_made = itertools.count()
