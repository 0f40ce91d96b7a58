"""Encryption of secrets with AES-256-GCM, and decryption on access.

A stored secret is `version (1 byte) | length of the key id (1 byte) | key id | nonce (12 bytes) |
ciphertext and tag (16 bytes)`. AES-GCM also authenticates the associated data `table.column:row
id`, the values of the columns in `Entity.secrets_bound_to`, and the bytes of the ciphertext that
precede the nonce. Decryption fails for a ciphertext that was changed, or that was copied to another
row or column, and if a value of these columns was changed.

Ciphertexts of version 1 do not authenticate the values of other columns. For a key with the mark
`:v2` in `ENCRYPTION_KEYS`, ciphertexts of version 1 are refused. The mark is stored with the keys,
because an attacker who can write to the database cannot change the keys.
"""

import base64
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Protocol, Self, runtime_checkable

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
from tiger_db.tracebacks import forgets_locals

_VERSION = 2
_UNBOUND_VERSION = 1
BOUND_MARK = ":v2"  # mark of a key for which ciphertexts of version 1 are refused
_KEY_BYTES = 32  # length of the keys of AES-256 and HMAC-SHA256
_TAG_BYTES = 16
_NONCE_BYTES = 12  # section 8.2.2 of NIST SP 800-38D allows random nonces of 96 bits
_KEY_ID = re.compile(r"[A-Za-z0-9_.-]{1,32}", re.ASCII)
_BOUND_MARK = re.compile(rf"(?<=[^:,\s]){BOUND_MARK}(?=[,\s]|\Z)")
_BAD_KEY_ID = "a key id must be 1 to 32 letters, digits, '.', '_' or '-'"


class KeySet:
    """Secret keys of 32 bytes, each with a key id. The first key is the current key."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        if not keys:
            raise ConfigurationError("at least one key is required")
        for key_id, key in keys.items():
            if not _KEY_ID.fullmatch(key_id):
                raise ConfigurationError(_BAD_KEY_ID)
            if len(key) != _KEY_BYTES:
                raise ConfigurationError(f"key {key_id!r} is not 32 bytes of base64")
        self.key_ids = tuple(keys)

    @classmethod
    @forgets_locals
    def parse(cls, text: str) -> Self:
        """Parse keys of the form `id:base64-32-bytes`, separated by commas or line breaks.

        Raises:
            ConfigurationError: the text is malformed. The error message never shows a key.
        """
        keys: dict[str, bytes] = {}
        items = list(filter(None, re.split(r"[,\s]+", text))) or [""]
        for number, item in enumerate(items, start=1):
            key_id, colon, encoded = item.partition(":")
            if not colon or not _KEY_ID.fullmatch(key_id):
                raise ConfigurationError(f"key {number} does not have the form id:base64-32-bytes")
            if key_id in keys:
                raise ConfigurationError(f"key id {key_id!r} occurs twice")
            try:
                keys[key_id] = decode_base64(encoded)
            except ValueError:
                raise ConfigurationError(f"key {key_id!r} is not 32 bytes of base64") from None
        return cls(keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.key_ids)})"


def decode_base64(text: str) -> bytes:
    """Decode standard or URL-safe base64, with or without padding.

    Raises:
        ValueError: the text is not base64.
    """
    standard = text.replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)


def generate_key(key_id: str = "k1") -> str:
    """Return a new random key as `id:base64`, the format of `API_KEY_PEPPERS`.

    Raises:
        InvalidValue: the key id is not 1 to 32 letters, digits, '.', '_' or '-'.
    """
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidValue(_BAD_KEY_ID)
    return f"{key_id}:{base64.b64encode(os.urandom(_KEY_BYTES)).decode('ascii')}"


def generate_encryption_key(key_id: str = "k1") -> str:
    """Return a new random key as `id:base64:v2`, the format of `ENCRYPTION_KEYS`.

    Raises:
        InvalidValue: the key id is not 1 to 32 letters, digits, '.', '_' or '-'.
    """
    return generate_key(key_id) + BOUND_MARK


@runtime_checkable
class KeyProvider(Protocol):
    """The interface of `KeyRing`, and of adapters for key management services.

    The methods of a provider block the event loop and are called for each secret, so an adapter
    should cache the results of slow calls. If a method raises an exception other than
    `EncryptionError`, the caller of tiger_db gets this exception unchanged.

    A provider can have the attribute `bound_key_ids`: a collection of the ids of keys for which
    tiger_db refuses ciphertexts of version 1.
    """

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The key ids, each of 1 to 32 letters, digits, '.', '_' or '-'.

        New ciphertexts are encrypted with the key whose id comes first.
        """
        ...

    def encrypt(self, key_id: str, data: bytes, aad: bytes) -> bytes:
        """Encrypt data with a new nonce, and authenticate the associated data `aad`."""
        ...

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        """Decrypt a ciphertext. Raise EncryptionError if the key or the data `aad` is wrong."""
        ...

    def fingerprint(self, key_id: str, data: bytes) -> bytes:
        """Return a message authentication code (MAC) of data. Equal data have equal MACs."""
        ...


class KeyRing(KeySet):
    """The built-in `KeyProvider`, which uses AES-256-GCM and HMAC-SHA256 with keys in memory.

    The keys whose ids are in `bound_key_ids` decrypt no ciphertexts of version 1.
    """

    def __init__(self, keys: Mapping[str, bytes], *, bound_key_ids: Collection[str] = ()) -> None:
        super().__init__(keys)
        self.bound_key_ids = frozenset(bound_key_ids)
        self._ciphers = {key_id: AESGCM(key) for key_id, key in keys.items()}
        self._fingerprint_keys = {  # keys that HKDF (RFC 5869) derives from the encryption keys
            key_id: HKDF(SHA256(), length=32, salt=None, info=b"tiger_db fingerprint").derive(key)
            for key_id, key in keys.items()
        }

    @classmethod
    @forgets_locals
    def parse(cls, text: str) -> Self:
        """Parse keys of the form `id:base64-32-bytes`, or `id:base64-32-bytes:v2`.

        Raises:
            ConfigurationError: the text is malformed. The error message never shows a key.
        """
        ring = super().parse(_BOUND_MARK.sub("", text))
        marked = (item for item in re.split(r"[,\s]+", text) if _BOUND_MARK.search(item))
        ring.bound_key_ids = frozenset(item.partition(":")[0] for item in marked)
        return ring

    def encrypt(self, key_id: str, data: bytes, aad: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[key_id].encrypt(nonce, data, aad)

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        if len(ciphertext) < _NONCE_BYTES + _TAG_BYTES:
            raise EncryptionError
        nonce, encrypted = ciphertext[:_NONCE_BYTES], ciphertext[_NONCE_BYTES:]
        try:
            return self._ciphers[key_id].decrypt(nonce, encrypted, aad)
        except InvalidTag:
            raise EncryptionError from None

    def fingerprint(self, key_id: str, data: bytes) -> bytes:
        return hmac.digest(self._fingerprint_keys[key_id], data, hashlib.sha256)


@forgets_locals
def encrypt(provider: KeyProvider, text: str, aad: str, bound: str = "") -> bytes:
    """Encrypt a text with the first key of the provider.

    The associated data `aad` has the form `table.column:row id`. The text `bound` contains the
    values of other columns of the row, which are associated data too.
    """
    key_id = provider.key_ids[0]
    header = ciphertext_header(key_id)
    return header + provider.encrypt(key_id, text.encode(), header + (aad + bound).encode())


@forgets_locals
def decrypt(
    provider: KeyProvider, ciphertext: bytes, aad: str, owner: str = "", bound: str | None = ""
) -> str:
    """Decrypt a ciphertext that `encrypt` made with the same `aad` and `bound`.

    The text `owner` describes the row of the ciphertext in error messages. `bound` is None if the
    values of the other columns are not known.

    Raises:
        EncryptionError: the ciphertext was changed, the associated data is wrong or not known, the
            encryption key is missing, or the ciphertext has version 1 and its key has the mark
            `:v2`.
    """
    where = f"{aad} ({owner})" if owner else aad
    header, key_id = _read_header(ciphertext, where)
    if key_id not in provider.key_ids:
        raise EncryptionError(f"{where}: encryption key {key_id!r} is not configured")
    if header[0] == _UNBOUND_VERSION:
        if key_id in bound_key_ids(provider):
            raise EncryptionError(
                f"{where}: ciphertexts of version 1 are refused, because the encryption key"
                f" {key_id!r} has the mark {BOUND_MARK}"
            )
        bound = ""
    if bound is None:
        raise EncryptionError(
            f"{where}: a secret can be decrypted only with the other columns of its row: load the"
            " whole entity"
        )
    try:
        data = provider.decrypt(key_id, ciphertext[len(header) :], header + (aad + bound).encode())
    except EncryptionError:
        raise EncryptionError(
            f"{where}: the ciphertext was changed, belongs to another row or column,"
            + (" or belongs to other values of the columns it is bound to," if bound else "")
            + f" or was encrypted with a different key that has the same id {key_id!r}"
        ) from None
    return data.decode()


def bound_key_ids(provider: KeyProvider) -> Collection[str]:
    """Return the ids of the keys for which ciphertexts of version 1 are refused."""
    ids: Collection[str] = getattr(provider, "bound_key_ids", ())
    return ids


@forgets_locals
def fingerprint(provider: KeyProvider, key_id: str, text: str, column: str) -> bytes:
    """Return the blind index of a text, which is a MAC for search by equality.

    The argument `column` has the form `table.column`.
    """
    return provider.fingerprint(key_id, f"{column}\0{text}".encode())


@lru_cache(maxsize=256)
def ciphertext_header(key_id: str, version: int = _VERSION) -> bytes:
    """Return the header of a key's ciphertexts: version, length of the key id, and key id."""
    if not _KEY_ID.fullmatch(key_id):
        raise EncryptionError(_BAD_KEY_ID)
    return bytes([version, len(key_id)]) + key_id.encode("ascii")


def key_id_of(ciphertext: bytes) -> str:
    """Return the id of the encryption key of a ciphertext."""
    return _read_header(ciphertext, "ciphertext")[1]


def is_bound(ciphertext: bytes) -> bool:
    """Return whether a ciphertext is bound to the values of other columns of its row."""
    return ciphertext[:1] != bytes([_UNBOUND_VERSION])


def _read_header(ciphertext: bytes, where: str) -> tuple[bytes, str]:
    """Return the header and the key id of a ciphertext. Error messages begin with `where`."""
    if len(ciphertext) < 2 or ciphertext[0] not in (_UNBOUND_VERSION, _VERSION):  # noqa: PLR2004  # a header has at least 2 bytes
        raise EncryptionError(f"{where}: the value is not a ciphertext of a known version")
    header = ciphertext[: 2 + ciphertext[1]]
    key_id = header[2:].decode("ascii", errors="replace")
    try:
        if ciphertext_header(key_id, ciphertext[0]) == header:
            return header, key_id
    except EncryptionError:
        pass
    raise EncryptionError(f"{where}: the ciphertext is damaged")


class Secret(SecretStr):
    """A secret text that is masked in `repr`, `str`, JSON and error messages."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[object], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate,
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
    def _validate(cls, value: object) -> "Secret":
        if isinstance(value, EncryptedSecret):
            return value
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(text, str):
            raise PydanticCustomError("secret_type", "Input should be a text")
        if not text:
            raise PydanticCustomError("secret_empty", "Input should not be empty")
        if text == MASK:
            # A client can send back a response that contains the mask instead of the secret. The
            # mask must not replace the stored secret.
            raise PydanticCustomError("secret_masked", "Input should be the secret, not its mask")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PydanticCustomError("string_unicode", "Input should be valid Unicode") from None
        return Secret(text)

    def _display(self) -> str:
        return MASK

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a plain secret cannot be pickled, because a pickle is not encrypted")


class EncryptedSecret(Secret):
    """A secret that is stored as a ciphertext. `get_secret_value` decrypts the ciphertext.

    `bound` contains the values of the other columns that are associated data, or is None if these
    values are not known. If a flush replaces a ciphertext, the attribute `replaced_bound` of the
    new secret has the value of `bound` for the old ciphertext.

    A loaded secret gets its associated data and its key provider from `source` when it is used for
    the first time, because most secrets of a list of rows are never used.
    """

    aad: str
    provider: KeyProvider | None
    owner: str
    bound: str | None
    source: "SecretSource | None" = None
    column = ""  # name of the column of a loaded secret
    replaced_bound: str | None = None
    same_text = False  # whether the flush that replaces the ciphertext keeps the text

    def __init__(
        self,
        ciphertext: bytes,
        aad: str = "",
        provider: KeyProvider | None = None,
        owner: str = "",
        bound: str | None = "",
    ) -> None:
        self.ciphertext = ciphertext
        self.aad = aad
        self.provider = provider
        self.owner = owner
        self.bound = bound

    def __getattr__(self, name: str) -> object:
        if name not in _LOADED_ATTRIBUTES:
            raise AttributeError(name)
        self.aad, self.provider, self.owner, self.bound = "", None, "", ""
        if self.source is not None:
            self.aad, self.provider, self.owner, self.bound = self.source.resolve(self.column)
            self.source = None
        return vars(self)[name]

    @property
    def key_id(self) -> str:
        """The id of the key that encrypted this secret."""
        return key_id_of(self.ciphertext)

    @forgets_locals
    def get_secret_value(self) -> str:
        """Return the decrypted secret.

        Raises:
            EncryptionError: the encryption key is missing or wrong, the ciphertext belongs to
                another row, or the secret is not part of an entity.
        """
        if not self.aad:
            raise EncryptionError(
                "a secret can be decrypted only as part of an entity: load the whole entity"
            )
        if self.provider is None:
            raise EncryptionError(
                f"{self.aad}: encryption key {self.key_id!r} is not configured"
                " (set ENCRYPTION_KEYS)"
            )
        return decrypt(self.provider, self.ciphertext, self.aad, self.owner, self.bound)

    def __len__(self) -> int:
        return len(self.get_secret_value())

    def __copy__(self) -> Self:
        return type(self)(self.ciphertext, self.aad, self.provider, self.owner, self.bound)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.__copy__()

    def __reduce__(self) -> tuple[object, ...]:
        # A pickle must not contain keys, so the provider is omitted.
        return EncryptedSecret, (self.ciphertext, self.aad, None, self.owner, self.bound)


_LOADED_ATTRIBUTES = {"aad", "provider", "owner", "bound"}


class SecretSource(Protocol):
    """The row from which secrets were loaded."""

    def resolve(self, column: str) -> tuple[str, KeyProvider | None, str, str | None]:
        """Return the values of `aad`, `provider`, `owner` and `bound` for a secret of the row."""
        ...


def _loaded_secret(ciphertext: bytes | None) -> EncryptedSecret | None:
    if ciphertext is None:
        return None
    secret = EncryptedSecret.__new__(EncryptedSecret)
    secret.ciphertext = ciphertext
    return secret


class EncryptedType(TypeDecorator[SecretStr]):
    """The SQL type of `bytea` columns with ciphertexts.

    Storing a plain text raises EncryptionError. The argument `fingerprint` is the name of the
    column with the blind index of the secret. The function `normalize` returns the normalized form
    of a secret, or raises ValueError if the secret is invalid. Secrets are normalized before they
    are encrypted.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(
        self, fingerprint: str | None = None, normalize: Callable[[str], str] | None = None
    ) -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.normalize = normalize

    def process_bind_param(
        self,
        value: SecretStr | None,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy passes this argument
    ) -> bytes | None:
        if value is None:
            return None
        if not isinstance(value, EncryptedSecret):
            raise EncryptionError(
                "a secret can be stored only as part of an entity, which encrypts the secret"
            )
        return value.ciphertext

    def result_processor(
        self,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy passes this argument
        coltype: object,  # noqa: ARG002  # SQLAlchemy passes this argument
    ) -> Callable[[bytes | None], EncryptedSecret | None]:
        # SQLAlchemy would call process_result_value() by way of another function.
        return _loaded_secret

    def compare_values(self, x: object, y: object) -> bool:
        if isinstance(x, EncryptedSecret) and isinstance(y, EncryptedSecret):
            return x.ciphertext == y.ciphertext
        return x is y
