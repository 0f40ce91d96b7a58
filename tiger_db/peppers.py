"""Peppers: secrets in the hashes of API keys, which are not stored in the database."""

import hashlib
import hmac
from collections.abc import Mapping

from tiger_db.encryption import KeySet


class Peppers(KeySet):
    """Peppers by pepper id. New hashes use the first pepper; each pepper can verify old hashes."""

    def __init__(self, peppers: Mapping[str, bytes]) -> None:
        super().__init__(peppers)
        self._peppers = dict(peppers)

    def apply(self, pepper_id: str, secret: str) -> str:
        """Return the hexadecimal HMAC-SHA256 of a secret, which is hashed instead of the secret."""
        return hmac.digest(self._peppers[pepper_id], secret.encode(), hashlib.sha256).hex()
