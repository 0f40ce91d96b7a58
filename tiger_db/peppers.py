"""Peppers: server-side secrets in the hashes of API keys. The database does not contain them."""

import hashlib
import hmac
from collections.abc import Mapping

from tiger_db.encryption import KeySet


class Peppers(KeySet):
    """Peppers by id. The first makes new hashes; all verify existing ones."""

    def __init__(self, peppers: Mapping[str, bytes]) -> None:
        super().__init__(peppers)
        self._peppers = dict(peppers)

    def apply(self, pepper_id: str, secret: str) -> str:
        """Return the HMAC-SHA256 of a secret in hexadecimal, which is hashed in its place."""
        return hmac.digest(self._peppers[pepper_id], secret.encode(), hashlib.sha256).hex()
