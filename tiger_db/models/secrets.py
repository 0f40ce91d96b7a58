"""Functions that encrypt the secrets of entities, and prepare secrets for decryption."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol
from uuid import UUID

from sqlalchemy import Connection, Table, select
from sqlalchemy.orm import Mapper, Session, object_mapper, object_session
from sqlalchemy.orm.attributes import instance_state, set_attribute
from sqlalchemy.orm.base import NO_VALUE

from tiger_db.encryption import (
    EncryptedSecret,
    EncryptedType,
    KeyProvider,
    Secret,
    ciphertext_header,
    encrypt,
    fingerprint,
    is_bound,
)
from tiger_db.errors import ConfigurationError, EncryptionError
from tiger_db.tracebacks import forgets_locals

CONTEXT = "tiger_db"  # key of the SessionContext in Session.info


class Row(Protocol):
    """A protocol with the attributes of `Entity` that this module needs."""

    id: UUID
    secrets_bound_to: ClassVar[Mapping[str, Callable[[Any], str | None]]]

    def label(self) -> str: ...

    @classmethod
    def label_of(cls, values: Mapping[str, Any]) -> str: ...


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


def bound_text(entity: type[Row], values: Mapping[str, object]) -> str | None:
    """Return the values of the columns to which the secrets of a row are bound, as one text.

    Return None if a value is not known.
    """
    parts = []
    for name, convert in sorted(entity.secrets_bound_to.items()):
        value = values.get(name, NO_VALUE)
        if value is NO_VALUE:
            return None
        text = None if value is None else convert(value)
        parts.append(f"|{name}" if text is None else f"|{name}={len(text)}:{text}")
    return "".join(parts)


def encrypt_secret(provider: KeyProvider | None, text: str, aad: str, bound: str | None) -> bytes:
    """Encrypt a secret with the associated data `aad` and `bound`, and return the ciphertext.

    Raises:
        ConfigurationError: `provider` is None.
        EncryptionError: `bound` is None.
    """
    if provider is None:
        raise ConfigurationError(
            f"{aad}: the secret cannot be stored, because ENCRYPTION_KEYS is not set"
        )
    if bound is None:
        raise EncryptionError(f"{aad}: load the whole entity before a secret is stored")
    return encrypt(provider, text, aad, bound)


@forgets_locals
def encrypt_for_row(provider: KeyProvider | None, row: Row, name: str, text: str) -> bytes:
    """Encrypt a secret for a column of a loaded row, and return the ciphertext.

    Raises:
        EncryptionError: the other secrets of the row do not belong to the row.
    """
    mapper = object_mapper(row)
    others = [secret for secret in secrets_of(row) if isinstance(secret, EncryptedSecret)]
    _check_row(provider, others)
    return encrypt_secret(provider, text, aad_of(mapper, name, row.id), _loaded_bound(row))


def encrypt_secrets(mapper: Mapper[Any], connection: Connection, row: Row) -> None:
    """Encrypt the new secrets of an entity, and set the blind indexes of the secrets.

    If the value of a column in `secrets_bound_to` was changed, the stored secrets are encrypted
    again. If a secret is set to its old text, the old ciphertext is kept.

    Raises:
        EncryptionError: a stored secret must be encrypted again, but cannot be decrypted, or the
            stored secrets do not belong to the row.
    """
    columns = encrypted_columns(mapper)
    if not columns:
        return
    state = instance_state(row)
    changed = state.committed_state
    names = [*row.secrets_bound_to, *(name for name, _ in columns)]
    if changed.keys().isdisjoint([*names, "id"]):
        return
    stored: Mapping[str, Any] = {}
    if state.key is not None:
        stored = _lock_stored(mapper, connection, state.key[1][0], names)
    pending = {name for name in names if name in changed or not stored}
    provider, label = key_provider(object_session(row)), row.label()
    old_bound = bound_text(type(row), stored)
    bound = bound_text(
        type(row),
        {name: row.__dict__.get(name) for name in pending}
        | {name: stored[name] for name in names if name not in pending},
    )
    old: dict[str, EncryptedSecret] = {}
    for name, _ in columns:
        if (secret := stored.get(name)) is not None:
            assert state.key is not None
            aad = aad_of(mapper, name, state.key[1][0])
            old[name] = EncryptedSecret(secret.ciphertext, aad, provider, label, old_bound)
    given = {n: row.__dict__.get(n) if n in pending else old.get(n) for n, _ in columns}
    outdated = [
        (name, type_, secret)
        for name, type_ in columns
        if isinstance(secret := given[name], Secret)
        and not (
            isinstance(secret, EncryptedSecret)
            and (secret.aad, secret.bound) == (aad_of(mapper, name, row.id), bound)
        )
    ]
    if outdated and bound == old_bound:
        _check_row(provider, [secret for name, secret in old.items() if name not in pending])
    for name, type_, secret in outdated:
        text, aad, earlier = secret.get_secret_value(), aad_of(mapper, name, row.id), old.get(name)
        if (
            earlier is not None
            and (earlier.aad, earlier.bound) == (aad, bound)
            and _has_text(earlier, text, provider)
        ):
            set_attribute(row, name, earlier)  # a flush does not write unchanged columns
            continue
        ciphertext = encrypt_secret(provider, text, aad, bound)
        assert provider is not None  # encrypt_secret() raises an error if the provider is None
        encrypted = EncryptedSecret(ciphertext, aad, provider, label, bound)
        encrypted.replaced_bound, encrypted.same_text = old_bound, name not in pending
        set_attribute(row, name, encrypted)
        if type_.fingerprint:
            mark = fingerprint(provider, provider.key_ids[0], text, aad.split(":")[0])
            set_attribute(row, type_.fingerprint, mark)


def _lock_stored(
    mapper: Mapper[Any], connection: Connection, row_id: UUID, names: Iterable[str]
) -> Mapping[str, Any]:
    """Lock a row and return its stored values, because another transaction can have changed them.

    Return an empty mapping if the row was deleted.
    """
    columns = mapper.local_table.c
    statement = select(*(columns[name] for name in names)).where(columns.id == row_id)
    row = connection.execute(statement.with_for_update(key_share=True)).one_or_none()
    return {} if row is None else dict(zip(names, row, strict=True))


def _check_row(provider: KeyProvider | None, secrets: Iterable[EncryptedSecret]) -> None:
    """Check that the stored secrets of a row belong to the row.

    A new secret must not be stored beside a changed `server_url`. One secret is checked, because
    all secrets of a row are bound to the same values.

    Raises:
        EncryptionError: a stored secret does not belong to the row.
    """
    for secret in secrets:
        known = provider is not None and secret.key_id in provider.key_ids
        if known and is_bound(secret.ciphertext):
            secret.get_secret_value()
            return


def _has_text(secret: EncryptedSecret, text: str, provider: KeyProvider | None) -> bool:
    """Return whether a secret has the given text, in a ciphertext that need not be replaced."""
    if provider is None:
        return False
    try:
        current = secret.ciphertext.startswith(ciphertext_header(provider.key_ids[0]))
        return current and secret.get_secret_value() == text
    except EncryptionError:
        return False


@dataclass(slots=True)  # not frozen, because the constructor of a frozen class is slow
class LoadedRow:
    """The values of a loaded row to which its secrets are bound. See `EncryptedSecret.source`."""

    mapper: Mapper[Any]
    provider: KeyProvider | None
    values: Mapping[str, Any]

    def resolve(self, column: str) -> tuple[str, KeyProvider | None, str, str | None]:
        entity: type[Row] = self.mapper.class_
        aad = aad_of(self.mapper, column, self.values["id"])
        bound = bound_text(entity, self.values)
        return aad, self.provider, entity.label_of(self.values), bound


def bind_loaded_secrets(
    mapper: Mapper[Any], values: Mapping[str, Any], provider: KeyProvider | None
) -> None:
    """Bind the secrets in the values of a new entity, which come from the database, to its row."""
    names, secrets = _names_of_bound(mapper)
    row = LoadedRow(mapper, provider, {name: values[name] for name in names if name in values})
    for name in secrets:
        secret = values.get(name)
        if secret is not None:
            secret.source, secret.column = row, name


@cache
def _names_of_bound(mapper: Mapper[Any]) -> tuple[list[str], list[str]]:
    """Return the names of the columns that secrets are bound to, and of the encrypted columns."""
    entity: type[Row] = mapper.class_
    return ["id", *entity.secrets_bound_to], [name for name, _ in encrypted_columns(mapper)]


def bind_secrets(row: Row, provider: KeyProvider | None) -> None:
    """Set the associated data and the key provider that loaded secrets need for decryption."""
    mapper = object_mapper(row)
    columns = encrypted_columns(mapper)
    if not columns:
        return
    owner, row_id, bound = row.label(), str(row.id), _loaded_bound(row)
    for name, _type in columns:
        secret = row.__dict__.get(name)
        if not isinstance(secret, EncryptedSecret):
            continue
        if not secret.aad:
            secret.aad = aad_of(mapper, name, row_id)
            secret.provider, secret.owner, secret.bound = provider, owner, bound
        elif name not in instance_state(row).committed_state:
            secret.bound = bound  # the other columns can have been refreshed without the secret


def _loaded_bound(row: Row) -> str | None:
    """Return `bound_text` of the values that the database has, without pending changes."""
    values, changed = row.__dict__, instance_state(row).committed_state
    return bound_text(
        type(row),
        {n: changed.get(n, values.get(n, NO_VALUE)) for n in row.secrets_bound_to},
    )


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
