"""Re-encryption of the stored secrets with the first encryption key, while the system runs.

One UPDATE stores each batch. It compares the old ciphertexts, so that a concurrent change of a row
wins and the row is re-encrypted later. Each ciphertext contains the id of its key: a run that was
killed needs no cleanup, and the next run continues.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Row,
    Table,
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
    key_id_of,
)
from tiger_db.errors import ConfigurationError, Conflict, EncryptionError, QueryTimeout
from tiger_db.models import AuditAction, Entity
from tiger_db.models.secrets import aad_of, encrypted_columns, key_provider, secrets_of

BATCH_ROWS = 1000  # per transaction
DAMAGED = "(damaged)"  # stands for the key id of a value that is not a ciphertext
_HEADER_BYTES = 34  # at most: version, length of the key id, 32 bytes of key id
_FIRST_KEY_SAMPLE_ROWS = 10
_REPORTED_PROBLEMS = 20
# Both are shorter than deadlock_timeout (1 s by default) or hold one row: no deadlock is detected
# in a transaction of an application.
_LOCK_TIMEOUT_OF_BATCH = "100ms"
_LOCK_TIMEOUT_OF_ROW = "10s"


@dataclass(frozen=True, slots=True)
class EncryptionKeyUsage:
    """Number of rows of a table that have a secret encrypted with a key."""

    table: str
    key_id: str
    rows: int


@dataclass(slots=True)
class RotationReport:
    """Result of `rotate`. With `dry_run`, `rotated` counts the rows that can be re-encrypted."""

    key_id: str  # the first key
    rotated: int = 0  # rows
    stuck: int = 0  # rows that could not be re-encrypted
    problems: list[str] = field(default_factory=list)  # reasons, for the first stuck rows
    uses: list[EncryptionKeyUsage] = field(default_factory=list)  # afterwards
    retirable: list[str] = field(default_factory=list)  # ids of other keys that no row needs


async def rotate(
    database: Database,
    *,
    dry_run: bool = False,
    advance: Callable[[int], None] = lambda _rows: None,
) -> RotationReport:
    """Re-encrypt all secrets with the first key, and recompute their fingerprints.

    Other transactions may read and write meanwhile. Each batch is one transaction with its audit
    event; `advance` is called with the number of rows of the batch. Locked rows are skipped at
    first; at the end `rotate` waits for each of them. A row that cannot be decrypted stays as it is
    and is reported. With `dry_run`, all secrets are decrypted and nothing is written.

    Keep a `retirable` key while any process still encrypts with it, and while a backup may be
    restored that needs it.

    Raises:
        ConfigurationError: No encryption key is configured.
        EncryptionError: The first key does not decrypt the rows that have its id.
        DatabaseUnavailable: The connection was lost. Finished batches stay; run it again.
    """
    async with database.session() as session:
        report = RotationReport(_required_provider(session).key_ids[0])
        for mapper in encrypted_entities():
            await _check_first_key(session, mapper)
    for mapper in encrypted_entities():
        wait = False
        while True:
            sweep = _Sweep(database, mapper, wait=wait)
            await sweep.run(advance, dry_run=dry_run)
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
    """Count the rows per table and key. A row that needs several keys counts for each of them."""
    usage = []
    for mapper in encrypted_entities():
        table, counts = _table_of(mapper), Counter[str]()
        headers = [_header(table.c[name]) for name in _secret_names(mapper)]
        rows = await session.execute(select(func.count(), *headers).group_by(*headers))
        for count, *found in rows:
            for key_id in {_key_id(header) for header in found if header is not None}:
                counts[key_id] += count
        usage += [
            EncryptionKeyUsage(table.name, key_id, counts[key_id]) for key_id in sorted(counts)
        ]
    return usage


def encrypted_entities() -> list[Mapper[Any]]:
    """Return the mappers of the entities that have encrypted columns."""
    return [mapper for mapper in Entity._sa_registry.mappers if encrypted_columns(mapper)]  # noqa: SLF001  # SQLModel's name for the registry


async def _check_first_key(session: AsyncSession, mapper: Mapper[Any]) -> None:
    """Verify that the first key decrypts at least one of the newest rows that have its id.

    A different key under an id in use would leave rows that no configured key decrypts.
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
    """One pass over the outdated rows of a table. With `wait`, row by row, waiting for locks."""

    database: Database
    mapper: Mapper[Any]
    wait: bool
    rotated: int = 0
    skipped: int = 0  # rows that were locked or changed concurrently
    stuck: int = 0
    problems: list[str] = field(default_factory=list)

    async def run(self, advance: Callable[[int], None], *, dry_run: bool) -> None:
        batch = await self._prepare(UUID(int=0))
        while batch is not None:
            (last_id, changes), before = batch, self.rotated
            if dry_run:
                self.rotated += len(changes)
                batch = await self._prepare(last_id)
            else:  # the next batch is decrypted while the server stores this one
                stored, prepared = await asyncio.gather(
                    self._store(changes), self._prepare(last_id), return_exceptions=True
                )
                if isinstance(stored, BaseException):
                    raise stored
                if isinstance(prepared, BaseException):
                    raise prepared
                batch = prepared
            advance(self.rotated - before)

    async def _prepare(self, after: UUID) -> tuple[UUID, list[dict[str, object]]] | None:
        """Return the last id of the next batch and its changes, or None at the end of the table."""
        changes = []
        async with self.database.session() as session:
            limit = 1 if self.wait else BATCH_ROWS
            rows = await _outdated_rows(session, self.mapper, after, limit)
            for row in rows:
                try:
                    changes.append(_reencrypt(_required_provider(session), self.mapper, row))
                except EncryptionError:
                    self.stuck += 1
                    if len(self.problems) < _REPORTED_PROBLEMS:
                        self.problems.append(await _describe_failure(session, self.mapper, row.id))
        return (rows[-1].id, changes) if rows else None

    async def _store(self, changes: Sequence[dict[str, object]]) -> None:
        """Store a batch. If a row is locked, store each half of the batch on its own."""
        if not changes:
            return
        try:
            async with self.database.session() as session:
                written = await _write(session, self.mapper, changes, wait=self.wait)
        except (Conflict, QueryTimeout):
            if half := len(changes) // 2:
                await self._store(changes[:half])
                await self._store(changes[half:])
            elif self.wait:
                self.stuck += 1
                self.problems.append(
                    f"{_table_of(self.mapper).name}:{changes[0]['id']}: the row stays locked"
                )
            else:
                self.skipped += 1
        else:
            self.rotated += written
            self.skipped += len(changes) - written


async def _outdated_rows(
    session: AsyncSession, mapper: Mapper[Any], after: UUID, limit: int
) -> Sequence[Row[Any]]:
    table = _table_of(mapper)
    secrets = [type_coerce(table.c[name], LargeBinary) for name in _secret_names(mapper)]
    rows = await session.execute(
        select(table.c.id, *secrets)
        .where(table.c.id > after, _is_outdated(session, mapper))
        .order_by(table.c.id)
        .limit(limit)
    )
    return rows.all()


def _reencrypt(provider: KeyProvider, mapper: Mapper[Any], row: Row[Any]) -> dict[str, object]:
    """Return the parameters of `_write`: the old ciphertexts of a row and the new ones.

    Raises:
        EncryptionError: A ciphertext cannot be decrypted. Then no secret of the row is changed.
    """
    first = provider.key_ids[0]
    current, row_id = ciphertext_header(first), str(row.id)
    change: dict[str, object] = {"id": row.id}
    ciphertexts: tuple[bytes | None, ...] = tuple(row[1:])
    for (name, type_), ciphertext in zip(encrypted_columns(mapper), ciphertexts, strict=True):
        change[f"old_{name}"] = change[f"new_{name}"] = ciphertext
        if type_.fingerprint:
            change[type_.fingerprint] = None
        if ciphertext is None or ciphertext.startswith(current):
            continue
        aad = aad_of(mapper, name, row_id)
        plain = decrypt(provider, ciphertext, aad)
        change[f"new_{name}"] = encrypt(provider, plain, aad)
        if type_.fingerprint:
            change[type_.fingerprint] = fingerprint(provider, first, plain, aad.split(":")[0])
    return change


async def _describe_failure(session: AsyncSession, mapper: Mapper[Any], row_id: UUID) -> str:
    """Return why a row cannot be decrypted, with the label of its owner."""
    row = await session.get(mapper.class_, row_id)
    for secret in secrets_of(row) if row else ():
        try:
            secret.get_secret_value()
        except EncryptionError as error:
            return str(error)
    return f"{_table_of(mapper).name}:{row_id}: the row was changed concurrently: try again"


async def _write(
    session: AsyncSession, mapper: Mapper[Any], changes: Sequence[dict[str, object]], *, wait: bool
) -> int:
    """Store the rows that were not changed since, with an audit event; return their number.

    Raises:
        Conflict, QueryTimeout: A row is locked.
    """
    lock_timeout = _LOCK_TIMEOUT_OF_ROW if wait else _LOCK_TIMEOUT_OF_BATCH
    await session.execute(text(f"SET LOCAL lock_timeout = '{lock_timeout}'"))
    names, table = _secret_names(mapper), _table_of(mapper).name
    marks = [type_.fingerprint for _, type_ in encrypted_columns(mapper) if type_.fingerprint]
    arrays = {name: [change[name] for change in changes] for name in changes[0]}
    casts = (f"CAST(:{name} AS {'uuid' if name == 'id' else 'bytea'}[])" for name in arrays)
    written = await session.scalars(
        text(
            f"UPDATE {table} SET"  # noqa: S608  # names of the models
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
        await audit_logs.log_event(
            session,
            action=AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE,
            resource_type="encryption_key",
            resource_id=_required_provider(session).key_ids[0],
            details={"table": table, "rows": len(ids), "from": str(ids[0]), "to": str(ids[-1])},
        )
    return len(ids)


def _header(secret: ColumnElement[Any]) -> ColumnElement[bytes | None]:
    """Return the SQL expression of a ciphertext's version and key id.

    PostgreSQL reads only the first bytes of a long value for it.
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
    """Return the SQL condition that a row has a secret not encrypted with the first key."""
    current = literal(ciphertext_header(_required_provider(session).key_ids[0]), LargeBinary)
    headers = [_header(_table_of(mapper).c[name]) for name in _secret_names(mapper)]
    return or_(*(func.coalesce(header != current, False) for header in headers))


def _table_of(mapper: Mapper[Any]) -> Table:
    assert isinstance(mapper.local_table, Table)
    return mapper.local_table


def _secret_names(mapper: Mapper[Any]) -> list[str]:
    return [name for name, _ in encrypted_columns(mapper)]


def _required_provider(session: AsyncSession) -> KeyProvider:
    provider = key_provider(session.sync_session)
    if provider is None:
        raise ConfigurationError("ENCRYPTION_KEYS is not set, so there is no key to rotate to")
    return provider
