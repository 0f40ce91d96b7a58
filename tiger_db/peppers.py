"""Peppers: secrets for the hashes and the codes of API keys. They are not in the database."""

import hashlib
import hmac
from collections.abc import Mapping

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tiger_db.encryption import KeySet

# With this purpose, HKDF derives other keys for the codes than for the hashes, so that no hash of a
# secret can serve as the code of a row.
_CODE_PURPOSE = b"tiger_db api_keys.mac"


class Peppers(KeySet):
    """Peppers with ids. New hashes use the first pepper. Existing hashes can use any pepper."""

    def __init__(self, peppers: Mapping[str, bytes]) -> None:
        super().__init__(peppers)
        self._peppers = dict(peppers)
        self._code_keys = {
            pepper_id: HKDF(SHA256(), length=32, salt=None, info=_CODE_PURPOSE).derive(pepper)
            for pepper_id, pepper in peppers.items()
        }

    def apply(self, pepper_id: str, secret: str) -> str:
        """Return the HMAC-SHA256 of a secret in hexadecimal. The pepper is the key of the HMAC."""
        return hmac.digest(self._peppers[pepper_id], secret.encode(), hashlib.sha256).hex()

    def authenticate(self, pepper_id: str, row: bytes) -> str:
        """Return the HMAC-SHA256 of a row in hexadecimal, under a key derived from the pepper."""
        return hmac.digest(self._code_keys[pepper_id], row, hashlib.sha256).hex()
