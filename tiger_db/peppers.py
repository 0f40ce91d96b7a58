"""The server-side secrets under which API keys are hashed: no dump of the database holds them."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Self

from tiger_db.encryption import check_keys, parse_keys


class Peppers:
    """Secrets by id. The first one is for new hashes, all are for checking."""

    def __init__(self, peppers: Mapping[str, bytes]) -> None:
        check_keys(peppers)
        self.ids = tuple(peppers)
        self._peppers = dict(peppers)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `id:base64-32-bytes[,id:…]`.

        Raises:
            ConfigurationError: malformed; the message never shows a pepper.
        """
        return cls(parse_keys(text))

    def apply(self, pepper_id: str, secret: str) -> str:
        """What is hashed in place of the secret: its HMAC-SHA256, in hexadecimal."""
        return hmac.digest(self._peppers[pepper_id], secret.encode(), hashlib.sha256).hex()

    def __repr__(self) -> str:
        return f"Peppers({', '.join(self.ids)})"
