"""Peppers: secrets for the hashes of API keys. The database does not contain peppers."""

import hashlib
import hmac
from collections.abc import Mapping

from tiger_db.encryption import KeySet


class Peppers(KeySet):
    """Peppers with ids. New hashes use the first pepper. Existing hashes can use any pepper."""

    def __init__(self, peppers: Mapping[str, bytes]) -> None:
        super().__init__(peppers)
        self._peppers = dict(peppers)

    def apply(self, pepper_id: str, secret: str) -> str:
        """Return the HMAC-SHA256 of a secret in hexadecimal. The pepper is the key of the HMAC."""
        return hmac.digest(self._peppers[pepper_id], secret.encode(), hashlib.sha256).hex()
