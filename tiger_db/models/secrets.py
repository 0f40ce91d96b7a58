"""Functions that encrypt the secrets of entities, and prepare secrets for decryption."""

from functools import cache
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Table
from sqlalchemy.orm import Mapper, Session, object_mapper, object_session
from sqlalchemy.orm.attributes import instance_state, set_attribute

from tiger_db.encryption import (
    EncryptedSecret,
    EncryptedType,
    KeyProvider,
    Secret,
    encrypt,
    fingerprint,
)
from tiger_db.errors import ConfigurationError, EncryptionError

CONTEXT = "tiger_db"  # key of the SessionContext in Session.info


class Row(Protocol):
    """A protocol with the attributes of `Entity` that this module needs."""

    id: UUID

    def label(self) -> str: ...


def key_provider(session: Session | None) -> KeyProvider | None:
    """Return the key provider of a session's Database, or None if the Database has no provider."""
    context = None if session is None else session.info.get(CONTEXT)
    provider: KeyProvider | None = None if context is None else context.key_provider
    return provider


@cache
def encrypted_columns(mapper: Mapper[Any]) -> list[tuple[str, EncryptedType]]:
    """Return the names and types of the encrypted columns of an entity."""
    return [(c.key, c.type) for c in mapper.local_table.c if isinstance(c.type, EncryptedType)]


def aad_of(mapper: Mapper[Any], name: str, row_id: UUID | str) -> str:
    """Return the associated data of a ciphertext, in the form `table.column:row id`."""
    assert isinstance(mapper.local_table, Table)
    return f"{mapper.local_table.name}.{name}:{row_id}"


def encrypt_secret(provider: KeyProvider | None, text: str, aad: str) -> bytes:
    """Encrypt a secret with the associated data `aad`, and return the ciphertext.

    Raises:
        ConfigurationError: `provider` is None.
    """
    if provider is None:
        raise ConfigurationError(
            f"{aad}: the secret cannot be stored, because ENCRYPTION_KEYS is not set"
        )
    return encrypt(provider, text, aad)


def encrypt_secrets(mapper: Mapper[Any], row: Row) -> None:
    """Encrypt the new secrets of an entity, and set the blind indexes of the secrets.

    If a secret is set to its old text, the old ciphertext is kept.
    """
    for name, type_ in encrypted_columns(mapper):
        secret, aad = row.__dict__.get(name), aad_of(mapper, name, row.id)
        if not isinstance(secret, Secret):
            continue
        if isinstance(secret, EncryptedSecret) and secret.aad == aad:
            continue
        provider = key_provider(object_session(row))
        text = secret.get_secret_value()
        old = instance_state(row).committed_state.get(name)
        if isinstance(old, EncryptedSecret) and _has_text(old, text, provider):
            set_attribute(row, name, old)  # a flush does not write unchanged columns
            continue
        ciphertext = encrypt_secret(provider, text, aad)
        assert provider is not None  # encrypt_secret() raises an error if the provider is None
        set_attribute(row, name, EncryptedSecret(ciphertext, aad, provider, row.label()))
        if type_.fingerprint:
            mark = fingerprint(provider, provider.key_ids[0], text, aad.split(":")[0])
            set_attribute(row, type_.fingerprint, mark)


def _has_text(secret: EncryptedSecret, text: str, provider: KeyProvider | None) -> bool:
    """Return whether a secret has the given text, encrypted with the first encryption key."""
    try:
        current = provider is not None and secret.key_id == provider.key_ids[0]
        return current and secret.get_secret_value() == text
    except EncryptionError:
        return False


def bind_secrets(row: Row, provider: KeyProvider | None) -> None:
    """Set the associated data and the key provider that loaded secrets need for decryption."""
    mapper = object_mapper(row)
    columns = encrypted_columns(mapper)
    if not columns:
        return
    owner, row_id = row.label(), str(row.id)
    for name, _type in columns:
        secret = row.__dict__.get(name)
        if isinstance(secret, EncryptedSecret) and not secret.aad:
            secret.aad = aad_of(mapper, name, row_id)
            secret.provider, secret.owner = provider, owner


def secrets_of(row: Row) -> list[Secret]:
    """Return the secrets of an entity, without null values."""
    values = (row.__dict__.get(name) for name, _type in encrypted_columns(object_mapper(row)))
    return [value for value in values if isinstance(value, Secret)]


def readable_secrets(row: Row) -> list[str]:
    """Return the decrypted secrets of an entity, so that callers can mask them in texts.

    Secrets that cannot be decrypted are omitted.
    """
    texts = []
    for secret in secrets_of(row):
        try:
            texts.append(secret.get_secret_value())
        except EncryptionError:
            continue
    return texts
