"""Re-encryption of the stored secrets with the first encryption key, while the system runs.

Each batch of rows is stored by one UPDATE statement. If another transaction has changed the secret
of a row in the meantime, the UPDATE skips the row. If the new secret of a skipped row also
needs re-encryption, a later UPDATE stores its new ciphertext. Each ciphertext contains the id of
the encryption key. Therefore, if a rotation is killed, the next rotation finds the rows that still
need older keys.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    LargeBinary,
    Row,
    Table,
    any_,
    case,
    func,
    literal,
    not_,
    or_,
    select,
    text,
    type_coerce,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper

from tiger_db.crud import audit_logs
from tiger_db.database import Database
from tiger_db.encryption import (
    KeyProvider,
    ciphertext_header,
    decrypt,
    encrypt,
    fingerprint,
    is_bound,
    key_id_of,
)
from tiger_db.errors import ConfigurationError, Conflict, EncryptionError, QueryTimeout
from tiger_db.models import AuditAction, Entity
from tiger_db.models.secrets import aad_of, bound_text, encrypted_columns, key_provider, secrets_of
from tiger_db.public import Progress, no_progress
from tiger_db.tracebacks import forgets_locals

BATCH_ROWS = 1000  # Maximum number of rows per transaction.
# Key id that `list_encryption_key_usage` reports for values that are not ciphertexts.
DAMAGED = "(damaged)"
# Maximum length of a ciphertext's header: version (1 byte), length of the id (1), key id (32).
_HEADER_BYTES = 34
_FIRST_KEY_SAMPLE_ROWS = 10
_REPORTED_PROBLEMS = 20
# A rotation must not cause deadlock errors in applications. To prevent deadlock errors, the lock
# timeout of a batch is less than PostgreSQL's deadlock_timeout (1 s by default). The lock timeout
# of a single row can be longer, because the transaction locks only one row.
_LOCK_TIMEOUT_OF_BATCH = "100ms"
_LOCK_TIMEOUT_OF_ROW = "10s"


@dataclass(frozen=True, slots=True)
class EncryptionKeyUsage:
    """The number of rows of a table that have a secret encrypted with the key `key_id`.

    `unbound` is the number of these rows that have a ciphertext of version 1, which is not bound to
    other columns of the row.
    """

    table: str
    key_id: str
    rows: int
    unbound: int = 0


@dataclass(slots=True)
class UnnormalizedSecrets:
    """Rows whose secrets an older release has stored without normalization."""

    normalizable: list[UUID] = field(default_factory=list)
    # Ids of rows whose secret could not be normalized.
    invalid: list[UUID] = field(default_factory=list)
    unreadable: int = 0  # Number of rows that cannot be decrypted, because their key is missing.
    # Ids of rows whose secret does not belong to the row, although its key is configured.
    foreign: list[UUID] = field(default_factory=list)


@dataclass(slots=True)
class RotationReport:
    """The result of the function `rotate`."""

    key_id: str  # Id of the first encryption key.
    rotated: int = 0  # Number of re-encrypted rows, or of rows to re-encrypt (`dry_run`).
    stuck: int = 0  # Number of rows that could not be re-encrypted.
    # At most 20 error messages about rows that could not be re-encrypted.
    problems: list[str] = field(default_factory=list)
    uses: list[EncryptionKeyUsage] = field(
        default_factory=list
    )  # Number of rows per key after the rotation.
    retirable: list[str] = field(default_factory=list)  # Ids of old keys that no row uses.


async def rotate(
    database: Database,
    *,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> RotationReport:
    """Re-encrypt all secrets with the first encryption key, and recompute the fingerprints.

    `rotate` also normalizes the secrets that an older release has stored without normalization.

    Other transactions can read and write the rows during the rotation. Each batch of rows has its
    own transaction, with an audit event. After each batch, `rotate` calls `progress(done, None)`,
    where `done` is the number of rows that it has re-encrypted so far. `rotate` first skips locked
    rows, and waits for the locked rows at the end. If a row cannot be decrypted, `rotate` reports
    the row and leaves the row unchanged. If `dry_run` is true, `rotate` decrypts the secrets that
    need re-encryption, but changes no row.

    Remove a key in `RotationReport.retirable` only when no process encrypts with the key, and no
    backup that is kept for a restore needs the key.

    Raises:
        ConfigurationError: the setting `ENCRYPTION_KEYS` is missing.
        EncryptionError: the first key cannot decrypt the rows that have the first key's id.
        DatabaseUnavailable: the connection to the database was lost. The committed batches stay
            re-encrypted. Call `rotate` again for the rows that still need re-encryption.
    """
    async with database.session() as session:
        report = RotationReport(_required_provider(session).key_ids[0])
        for mapper in encrypted_entities():
            await _check_first_key(session, mapper)
    for mapper in encrypted_entities():
        async with database.session() as session:
            provider = _required_provider(session)
            # A sweep decrypts the other rows, and normalizes their secrets too.
            found = await find_unnormalized_secrets(
                session, mapper, provider, key_id=provider.key_ids[0]
            )
        wait = False
        while True:
            sweep = _Sweep(database, mapper, {*found.normalizable}, wait=wait)
            await sweep.run(progress, report.rotated, dry_run=dry_run)
            report.rotated += sweep.rotated
            if not sweep.skipped:
                break
            wait = not sweep.rotated
        report.stuck += sweep.stuck
        report.problems += sweep.problems[: _REPORTED_PROBLEMS - len(report.problems)]
    async with database.session() as session:
        report.uses = await list_encryption_key_usage(session)
        other_keys = _required_provider(session).key_ids[1:]
    needed = {usage.key_id for usage in report.uses}
    report.retirable = [key_id for key_id in other_keys if key_id not in needed]
    return report


async def list_encryption_key_usage(session: AsyncSession) -> list[EncryptionKeyUsage]:
    """Count the rows per table and encryption key.

    A row whose secrets are encrypted with two keys is counted once for each key.
    """
    usage = []
    for mapper in encrypted_entities():
        table, counts, unbound = _table_of(mapper), Counter[str](), Counter[str]()
        headers = [_header(table.c[name]) for name in _secret_names(mapper)]
        rows = await session.execute(select(func.count(), *headers).group_by(*headers))
        for count, *found in rows:
            for key_id in {_key_id(header) for header in found if header is not None}:
                counts[key_id] += count
            for key_id in {_key_id(h) for h in found if h is not None and not is_bound(h)}:
                unbound[key_id] += count * (key_id != DAMAGED)
        usage += [
            EncryptionKeyUsage(table.name, key_id, counts[key_id], unbound[key_id])
            for key_id in sorted(counts)
        ]
    return usage


@forgets_locals
async def find_unnormalized_secrets(
    session: AsyncSession,
    mapper: Mapper[Any],
    provider: KeyProvider,
    *,
    key_id: str | None = None,
) -> UnnormalizedSecrets:
    """Find the rows of a table that contain a secret that is not normalized.

    If `key_id` is given, only secrets that are encrypted with this key are read.
    """
    found, table = UnnormalizedSecrets(), _table_of(mapper)
    for name, type_ in encrypted_columns(mapper):
        if type_.normalize is None:
            continue
        secret = type_coerce(table.c[name], LargeBinary)
        page = select(table.c.id, secret, *_bound_columns(mapper))
        page = page.where(secret.is_not(None)).order_by(table.c.id)
        if key_id is not None:
            page = page.where(_header(table.c[name]) == ciphertext_header(key_id))
        after = UUID(int=0)
        while rows := (
            await session.execute(page.where(table.c.id > after).limit(BATCH_ROWS))
        ).all():
            for row_id, ciphertext, *values in rows:
                try:
                    aad, bound = aad_of(mapper, name, row_id), _bound_text(mapper, values)
                    plain = decrypt(provider, ciphertext, aad, bound=bound)
                    if type_.normalize(plain) != plain:
                        found.normalizable.append(row_id)
                except EncryptionError:
                    if _key_id(ciphertext) in provider.key_ids:
                        found.foreign.append(row_id)
                    else:
                        found.unreadable += 1
                except ValueError:
                    found.invalid.append(row_id)
            after = rows[-1].id
    return found


def encrypted_entities() -> list[Mapper[Any]]:
    """Return the mappers of the entities that have encrypted columns."""
    return [mapper for mapper in Entity._sa_registry.mappers if encrypted_columns(mapper)]  # noqa: SLF001  # SQLModel has no public name for the registry


async def _check_first_key(session: AsyncSession, mapper: Mapper[Any]) -> None:
    """Check that the first key decrypts a row whose ciphertext names the first key.

    If a new key had the id of an old key, the rows that the old key has encrypted could not be
    decrypted.
    """
    current = select(mapper.class_).where(not_(_is_outdated(session, mapper)))
    rows = await session.scalars(
        current.order_by(_table_of(mapper).c.id.desc()).limit(_FIRST_KEY_SAMPLE_ROWS)
    )
    failure = None
    for row in rows:
        try:
            for secret in secrets_of(row):
                secret.get_secret_value()
        except EncryptionError as error:
            failure = error
        else:
            return
    if failure:
        raise failure


@dataclass(slots=True)
class _Sweep:
    """One pass over the rows of a table that need re-encryption.

    If `wait` is true, each batch is one row, and the pass waits for row locks.
    """

    database: Database
    mapper: Mapper[Any]
    # Ids of the rows to normalize. The sweep adds the ids of other rows that it normalizes.
    unnormalized: set[UUID]
    wait: bool
    rotated: int = 0
    skipped: int = 0  # number of rows that were locked or changed concurrently
    stuck: int = 0
    problems: list[str] = field(default_factory=list)

    async def run(self, progress: Progress, rotated_before: int, *, dry_run: bool) -> None:
        batch = await self._prepare(UUID(int=0))
        while batch is not None:
            last_id, changes = batch
            if dry_run:
                self.rotated += len(changes)
                batch = await self._prepare(last_id)
            else:  # PostgreSQL stores a batch while this process decrypts the next batch
                stored, prepared = await asyncio.gather(
                    self._store(changes), self._prepare(last_id), return_exceptions=True
                )
                if isinstance(stored, BaseException):
                    raise stored
                if isinstance(prepared, BaseException):
                    raise prepared
                batch = prepared
            progress(rotated_before + self.rotated, None)

    async def _prepare(self, after: UUID) -> tuple[UUID, list[dict[str, object]]] | None:
        """Return the last row id and the changes of the next batch, or None if no row is left."""
        changes = []
        async with self.database.session() as session:
            limit = 1 if self.wait else BATCH_ROWS
            rows = await _outdated_rows(session, self.mapper, self.unnormalized, after, limit)
            for row in rows:
                try:
                    provider = _required_provider(session)
                    if change := _reencrypt(provider, self.mapper, row, self.unnormalized):
                        changes.append(change)
                except EncryptionError:
                    self.stuck += 1
                    if len(self.problems) < _REPORTED_PROBLEMS:
                        self.problems.append(await _describe_failure(session, self.mapper, row.id))
        return (rows[-1].id, changes) if rows else None

    async def _store(self, changes: Sequence[dict[str, object]]) -> None:
        """Store a batch. If a row is locked, split the batch, so that the other rows are stored."""
        if not changes:
            return
        try:
            async with self.database.session() as session:
                written = await _write(
                    session, self.mapper, changes, self.unnormalized, wait=self.wait
                )
        except (Conflict, QueryTimeout):
            if half := len(changes) // 2:
                await self._store(changes[:half])
                await self._store(changes[half:])
            elif self.wait:
                self.stuck += 1
                self.problems.append(
                    f"{_table_of(self.mapper).name}:{changes[0]['id']}:"
                    " another transaction keeps the row locked: end it, and run the rotation again"
                )
            else:
                self.skipped += 1
        else:
            self.rotated += written
            self.skipped += len(changes) - written


async def _outdated_rows(
    session: AsyncSession,
    mapper: Mapper[Any],
    unnormalized: Collection[UUID],
    after: UUID,
    limit: int,
) -> Sequence[Row[Any]]:
    table = _table_of(mapper)
    secrets = [type_coerce(table.c[name], LargeBinary) for name in _secret_names(mapper)]
    rows = await session.execute(
        select(table.c.id, *secrets, *_bound_columns(mapper))
        .where(
            table.c.id > after,
            or_(
                _is_outdated(session, mapper),
                table.c.id == any_(literal([*unnormalized], ARRAY(table.c.id.type))),
            ),
        )
        .order_by(table.c.id)
        .limit(limit)
    )
    return rows.all()


@forgets_locals
def _reencrypt(
    provider: KeyProvider, mapper: Mapper[Any], row: Row[Any], unnormalized: set[UUID]
) -> dict[str, object] | None:
    """Return the old and the new ciphertexts of a row, as SQL parameters for `_write`.

    The secrets that need a new ciphertext are normalized. If the id of the row is in
    `unnormalized`, the other secrets are normalized too. If a secret was not normalized, the id of
    the row is added to `unnormalized`.

    Return None if no secret of the row needs a new ciphertext, for example because another session
    has changed the row.

    Raises:
        EncryptionError: a secret of the row cannot be decrypted.
    """
    first, normalize = provider.key_ids[0], row.id in unnormalized
    current, row_id = ciphertext_header(first), str(row.id)
    change: dict[str, object] = {"id": row.id}
    columns = encrypted_columns(mapper)
    ciphertexts: tuple[bytes | None, ...] = tuple(row[1 : len(columns) + 1])
    bound = _bound_text(mapper, row[len(columns) + 1 :])
    for (name, type_), ciphertext in zip(columns, ciphertexts, strict=True):
        change[f"old_{name}"] = change[f"new_{name}"] = ciphertext
        if type_.fingerprint:
            change[type_.fingerprint] = None
        if ciphertext is None:
            continue
        is_current = ciphertext.startswith(current)
        normal_form = type_.normalize if normalize or not is_current else None
        if is_current and normal_form is None:
            continue
        aad = aad_of(mapper, name, row_id)
        plain = decrypt(provider, ciphertext, aad, bound=bound)
        normal = plain if normal_form is None else _normalized(plain, normal_form)
        if normal != plain:
            unnormalized.add(row.id)
        elif is_current:
            continue
        change[f"new_{name}"] = encrypt(provider, normal, aad, bound)
        if type_.fingerprint:
            change[type_.fingerprint] = fingerprint(provider, first, normal, aad.split(":")[0])
    names = _secret_names(mapper)
    changed = any(change[f"new_{name}"] is not change[f"old_{name}"] for name in names)
    return change if changed else None


def _normalized(text: str, normalize: Callable[[str], str]) -> str:
    """Return the normalized text, or the text itself if `normalize` raises ValueError."""
    try:
        return normalize(text)
    except ValueError:
        return text


async def _describe_failure(session: AsyncSession, mapper: Mapper[Any], row_id: UUID) -> str:
    """Return an error message that names a row and says why the row cannot be decrypted."""
    row = await session.get(mapper.class_, row_id)
    for secret in secrets_of(row) if row else ():
        try:
            secret.get_secret_value()
        except EncryptionError as error:
            return str(error)
    table = _table_of(mapper).name
    return f"{table}:{row_id}: the row was changed concurrently: run the rotation again"


async def _write(
    session: AsyncSession,
    mapper: Mapper[Any],
    changes: Sequence[dict[str, object]],
    unnormalized: Collection[UUID] = (),
    *,
    wait: bool,
) -> int:
    """Store the new ciphertexts of a batch, with an audit event. Return the number of stored rows.

    Rows whose ciphertexts were changed concurrently are skipped. The audit event names the rows
    whose secrets were normalized.

    Raises:
        Conflict, QueryTimeout: another transaction holds the lock of a row.
    """
    lock_timeout = _LOCK_TIMEOUT_OF_ROW if wait else _LOCK_TIMEOUT_OF_BATCH
    await session.execute(text(f"SET LOCAL lock_timeout = '{lock_timeout}'"))
    names, table = _secret_names(mapper), _table_of(mapper).name
    marks = [type_.fingerprint for _, type_ in encrypted_columns(mapper) if type_.fingerprint]
    arrays = {name: [change[name] for change in changes] for name in changes[0]}
    casts = (f"CAST(:{name} AS {'uuid' if name == 'id' else 'bytea'}[])" for name in arrays)
    written = await session.scalars(
        text(
            f"UPDATE {table} SET"  # noqa: S608  # inserts only names of tables and columns
            f" {', '.join(f'{name} = new_{name}' for name in names)},"
            f" {', '.join(f'{mark} = coalesce(given.{mark}, {table}.{mark})' for mark in marks)}"
            f" FROM unnest({', '.join(casts)})"
            f" AS given ({', '.join(arrays)}) WHERE {table}.id = given.id"
            + "".join(f" AND {name} IS NOT DISTINCT FROM old_{name}" for name in names)
            + f" RETURNING {table}.id"
        ),
        arrays,
    )
    ids = sorted(written)
    if ids:
        normalized = [str(row_id) for row_id in ids if row_id in unnormalized]
        await audit_logs.log_event(
            session,
            action=AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE,
            resource_type="encryption_key",
            resource_id=_required_provider(session).key_ids[0],
            details={"table": table, "rows": len(ids), "from": str(ids[0]), "to": str(ids[-1])}
            | ({"normalized": normalized} if normalized else {}),
        )
    return len(ids)


def _header(secret: ColumnElement[Any]) -> ColumnElement[bytes | None]:
    """Return an SQL expression for the header of a ciphertext (version and key id).

    PostgreSQL reads only the first bytes of a long ciphertext.
    """
    start = func.substr(secret, 1, _HEADER_BYTES)
    header = func.substr(start, 1, 2 + func.get_byte(start, 1), type_=LargeBinary)
    return case((func.octet_length(secret) > 1, header), else_=type_coerce(secret, LargeBinary))


def _key_id(header: bytes) -> str:
    try:
        return key_id_of(header)
    except EncryptionError:
        return DAMAGED


def _is_outdated(session: AsyncSession, mapper: Mapper[Any]) -> ColumnElement[bool]:
    """Return the SQL condition that a secret of a row is not encrypted with the first key."""
    current = literal(ciphertext_header(_required_provider(session).key_ids[0]), LargeBinary)
    headers = [_header(_table_of(mapper).c[name]) for name in _secret_names(mapper)]
    return or_(*(func.coalesce(header != current, False) for header in headers))


def _table_of(mapper: Mapper[Any]) -> Table:
    assert isinstance(mapper.local_table, Table)
    return mapper.local_table


def _bound_columns(mapper: Mapper[Any]) -> list[ColumnElement[Any]]:
    return [_table_of(mapper).c[name] for name in mapper.class_.secrets_bound_to]


def _bound_text(mapper: Mapper[Any], values: Iterable[object]) -> str:
    """Return `bound_text` of the values of `_bound_columns`."""
    bound = bound_text(
        mapper.class_, dict(zip(mapper.class_.secrets_bound_to, values, strict=True))
    )
    assert bound is not None  # all values are known
    return bound


def _secret_names(mapper: Mapper[Any]) -> list[str]:
    return [name for name, _ in encrypted_columns(mapper)]


def _required_provider(session: AsyncSession) -> KeyProvider:
    provider = key_provider(session.sync_session)
    if provider is None:
        raise ConfigurationError("ENCRYPTION_KEYS is not set: a rotation needs an encryption key")
    return provider
