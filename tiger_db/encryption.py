"""Secrets at rest: AES-256-GCM ciphertexts that are bound to their row and decrypt when asked.

A ciphertext is `version (1 byte) | length of the key id (1 byte) | key id | nonce (12) | text and
tag (16)`. Everything before the nonce, and the place it is for (`table.column:row id`), is
authenticated: changed, or copied to another row or column, it does not decrypt.
"""

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SecretStr
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from sqlalchemy import Dialect, LargeBinary
from sqlalchemy.types import TypeDecorator

from tiger_db.errors import ConfigurationError, EncryptionError, InvalidValue
from tiger_db.redaction import MASK

_VERSION = 1
_NONCE = 12  # bytes; NIST SP 800-38D, 8.2.2: a random 96-bit nonce
_TAG = 16  # bytes
_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}", re.ASCII)
_BAD_KEY_ID = "a key id is 1 to 32 letters, digits, '.', '_' or '-'"


class KeyProvider(Protocol):
    """What encrypts under keys that it knows by id: a `KeyRing`, or a KMS in its place.

    It is called in the event loop's thread for every secret that is read or written: let it cache
    what is slow. What it raises but `EncryptionError` reaches the caller as it is.
    """

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The keys, each 1 to 32 letters, digits, '.', '_' or '-'. The first one encrypts."""
        ...

    def encrypt(self, key_id: str, data: bytes, aad: bytes) -> bytes:
        """Encrypt under a fresh nonce; `aad` is authenticated and not part of the result."""
        ...

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        """Decrypt; EncryptionError: not what `encrypt` made under this key for this aad."""
        ...

    def fingerprint(self, key_id: str, data: bytes) -> bytes:
        """The same bytes for the same data, which tell nothing to who lacks the key: a MAC."""
        ...


class KeyRing:
    """The built-in `KeyProvider`: AES-256-GCM and HMAC-SHA256 under keys held in memory."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        check_keys(keys)
        self.key_ids = tuple(keys)
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._fingerprint_keys = {key_id: _fingerprint_key(key) for key_id, key in keys.items()}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `id:base64-32-bytes[,id:…]`.

        Raises:
            ConfigurationError: malformed; the message never shows a key.
        """
        return cls(parse_keys(text))

    def encrypt(self, key_id: str, data: bytes, aad: bytes) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._ciphers[key_id].encrypt(nonce, data, aad)

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        if len(ciphertext) < _NONCE + _TAG:
            raise EncryptionError
        try:
            return self._ciphers[key_id].decrypt(ciphertext[:_NONCE], ciphertext[_NONCE:], aad)
        except InvalidTag:
            raise EncryptionError from None

    def fingerprint(self, key_id: str, data: bytes) -> bytes:
        return hmac.digest(self._fingerprint_keys[key_id], data, hashlib.sha256)

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(self.key_ids)})"


def parse_keys(text: str) -> dict[str, bytes]:
    """The keys in `id:base64-32-bytes[,id:…]`, in their order.

    Raises:
        ConfigurationError: malformed; the message never shows a key.
    """
    keys: dict[str, bytes] = {}
    for number, item in enumerate(text.strip().split(","), start=1):
        key_id, colon, encoded = item.strip().partition(":")
        if not colon or not _KEY_ID.fullmatch(key_id):
            raise ConfigurationError(f"key {number} is not id:base64-32-bytes")
        if key_id in keys:
            raise ConfigurationError(f"key id {key_id!r} is given twice")
        try:
            keys[key_id] = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise ConfigurationError(f"key {key_id!r} is not 32 bytes of base64") from None
    check_keys(keys)
    return keys


def check_keys(keys: Mapping[str, bytes]) -> None:
    """Raise ConfigurationError unless there is a key, and each has a good id and 32 bytes."""
    if not keys:
        raise ConfigurationError("no key is given")
    for key_id, key in keys.items():
        if not _KEY_ID.fullmatch(key_id):
            raise ConfigurationError(_BAD_KEY_ID)
        if len(key) != 32:  # noqa: PLR2004  # AES-256, HMAC-SHA256
            raise ConfigurationError(f"key {key_id!r} is not 32 bytes of base64")


def encrypt(provider: KeyProvider, text: str, aad: str) -> bytes:
    """Encrypt a text under the first key for one place (`table.column:row id`)."""
    key_id = provider.key_ids[0]
    header = ciphertext_header(key_id)
    return header + provider.encrypt(key_id, text.encode(), header + aad.encode())


def decrypt(provider: KeyProvider, ciphertext: bytes, aad: str, owner: str = "") -> str:
    """Decrypt what `encrypt` made for this place; `owner` is what errors call its row.

    Raises:
        EncryptionError: not for this place, changed, or under a key that is not here.
    """
    where = f"{aad} ({owner})" if owner else aad
    header, key_id = _header_in(ciphertext, where)
    if key_id not in provider.key_ids:
        raise EncryptionError(f"{where}: encryption key {key_id!r} is not configured")
    try:
        return provider.decrypt(key_id, ciphertext[len(header) :], header + aad.encode()).decode()
    except EncryptionError:
        raise EncryptionError(
            f"{where}: the ciphertext was changed, belongs to another place,"
            f" or key {key_id!r} is not the one that made it"
        ) from None


def fingerprint(provider: KeyProvider, key_id: str, text: str, column: str) -> bytes:
    """By which a text is found in a column (`table.column`), stored while this key was first."""
    return provider.fingerprint(key_id, f"{column}\0{text}".encode())


@lru_cache(maxsize=256)
def ciphertext_header(key_id: str) -> bytes:
    """What every ciphertext under this key starts with, and no other does."""
    if not _KEY_ID.fullmatch(key_id):
        raise EncryptionError(_BAD_KEY_ID)
    return bytes([_VERSION, len(key_id)]) + key_id.encode("ascii")


def key_id_of(ciphertext: bytes) -> str:
    """The id of the key that made a ciphertext."""
    return _header_in(ciphertext, "ciphertext")[1]


def generate_key(key_id: str = "k1") -> str:
    """A new random key in the form that `ENCRYPTION_KEYS` takes.

    Raises:
        InvalidValue: the id is too long, or has characters that it may not have.
    """
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidValue(_BAD_KEY_ID)
    return f"{key_id}:{base64.b64encode(os.urandom(32)).decode('ascii')}"


def _header_in(ciphertext: bytes, where: str) -> tuple[bytes, str]:
    if len(ciphertext) < 2 or ciphertext[0] != _VERSION:  # noqa: PLR2004  # version and length
        raise EncryptionError(f"{where}: not a ciphertext of a version known here")
    header = ciphertext[: 2 + ciphertext[1]]
    key_id = header[2:].decode("ascii", errors="replace")
    try:
        if ciphertext_header(key_id) == header:
            return header, key_id
    except EncryptionError:
        pass
    raise EncryptionError(f"{where}: the ciphertext is damaged")


def _fingerprint_key(key: bytes) -> bytes:
    """A key of its own for fingerprints, so that encryption and search share none (RFC 5869)."""
    return HKDF(SHA256(), length=32, salt=None, info=b"tiger_db fingerprint").derive(key)


class Secret(SecretStr):
    """A text that shows only when asked: masked in `repr`, `str`, JSON and errors."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[object], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.validated,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda _: MASK, return_schema=core_schema.str_schema(), when_used="json"
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "format": "password", "writeOnly": True}

    @classmethod
    def validated(cls, value: object) -> "Secret":
        if isinstance(value, EncryptedSecret):
            return value
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(text, str):
            raise PydanticCustomError("secret_type", "Input should be a text")
        if not text:
            raise PydanticCustomError("secret_empty", "Input should not be empty")
        if text == MASK:
            # What a response showed in its place, sent back, must not replace the secret.
            raise PydanticCustomError("secret_masked", "Input should be the secret, not its mask")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PydanticCustomError("string_unicode", "Input should be valid Unicode") from None
        return Secret(text)

    def _display(self) -> str:
        return MASK


class EncryptedSecret(Secret):
    """A secret as it is stored: decrypted when `get_secret_value` is called, and not before."""

    def __init__(
        self,
        ciphertext: bytes,
        aad: str = "",
        provider: KeyProvider | None = None,
        owner: str = "",
    ) -> None:
        self.ciphertext = ciphertext
        self.aad = aad
        self.provider = provider
        self.owner = owner

    @property
    def key_id(self) -> str:
        """The id of the encryption key it needs."""
        return key_id_of(self.ciphertext)

    def get_secret_value(self) -> str:
        """Decrypt.

        Raises:
            EncryptionError: the key is missing or wrong, or the ciphertext is not this row's.
        """
        if not self.aad:
            raise EncryptionError("a secret decrypts only as part of its row: load the whole row")
        if self.provider is None:
            raise EncryptionError(
                f"{self.aad}: encryption key {self.key_id!r} is not configured"
                " (set ENCRYPTION_KEYS)"
            )
        return decrypt(self.provider, self.ciphertext, self.aad, self.owner)

    def __len__(self) -> int:
        return len(self.get_secret_value())

    def __copy__(self) -> "EncryptedSecret":
        return EncryptedSecret(self.ciphertext, self.aad, self.provider, self.owner)

    def __deepcopy__(self, memo: dict[int, object]) -> "EncryptedSecret":
        return self.__copy__()

    def __reduce__(self) -> tuple[type["EncryptedSecret"], tuple[bytes, str, None, str]]:
        return EncryptedSecret, (self.ciphertext, self.aad, None, self.owner)  # without the keys


class EncryptedType(TypeDecorator[SecretStr]):
    """A `bytea` column of ciphertexts. A plain text is refused: it must be sealed for its row.

    `fingerprint` names the column that makes this one searchable.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(self, fingerprint: str | None = None) -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def process_bind_param(
        self,
        value: SecretStr | None,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> bytes | None:
        if value is None:
            return None
        if not isinstance(value, EncryptedSecret):
            raise EncryptionError("a secret can only be written as part of its row")
        return value.ciphertext

    def process_result_value(
        self,
        value: bytes | None,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> EncryptedSecret | None:
        return None if value is None else EncryptedSecret(value)

    def compare_values(self, x: object, y: object) -> bool:
        if isinstance(x, EncryptedSecret) and isinstance(y, EncryptedSecret):
            return x.ciphertext == y.ciphertext
        return x is y
