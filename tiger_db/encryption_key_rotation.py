"""Moves the stored secrets to the first encryption key, on a living system.

A row is moved by one statement that compares its old ciphertexts: a change that comes between
reading and writing wins, and is moved later. The ciphertexts alone tell what has been moved: a run
that was killed leaves nothing to clean up, and the next one goes on where it was.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import (
    LargeBinary,
    Row,
    not_,
    select,
    text,
    type_coerce,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper

from tiger_db.crud import audit_logs
from tiger_db.database import Database
from tiger_db.encryption import KeyProvider, ciphertext_header, decrypt, encrypt, fingerprint
from tiger_db.errors import Conflict, EncryptionError, QueryTimeout
from tiger_db.key_uses import (
    KeyUse,
    encrypted_entities,
    key_uses,
    outdated,
    required_provider,
    secret_names,
    table_of,
)
from tiger_db.models import AuditAction
from tiger_db.models.base import aad_of, encrypted_columns, secrets_of

T = TypeVar("T")
U = TypeVar("U")
BATCH = 1000  # rows in a transaction
_SAMPLE = 10  # rows, of which one must be readable
_SHOWN = 20  # problems that a report has in words


@dataclass(slots=True)
class Rotation:
    """What `rotate` did, or would do, and what it found afterwards."""

    key_id: str  # the first key
    rotated: int = 0  # rows
    stuck: int = 0  # rows that could not be moved
    problems: list[str] = field(default_factory=list)  # why; a line each, of the first ones
    uses: list[KeyUse] = field(default_factory=list)
    retirable: list[str] = field(default_factory=list)  # other keys, that no row needs


async def rotate(
    database: Database,
    *,
    dry_run: bool = False,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Rotation:
    """Move every secret to the first key, with its fingerprint, while others read and write.

    It commits in batches, each with its audit event; `advance` is told how many rows each has. Rows
    that are locked are left for later, and waited for in the end, one by one. What cannot be
    decrypted stays as it is and is reported. With `dry_run`, everything is decrypted and nothing
    written.

    Only when no row needs a key any more is it `retirable`; even then keep it as long as a process
    that has another first key runs, and for as long as backups of now may be restored.

    Raises:
        ConfigurationError: there is no encryption key.
        EncryptionError: the first key does not decrypt what is under its id already.
        DatabaseUnavailable: lost meanwhile; what was moved stays so. Run it again.
    """
    async with database.session() as session:
        report = Rotation(required_provider(session).key_ids[0])
        for mapper in encrypted_entities():
            await _check_first_key(session, mapper)
    for mapper in encrypted_entities():
        patient = False
        while True:
            sweep = await _sweep(database, mapper, advance, dry_run=dry_run, patient=patient)
            report.rotated += sweep.moved
            if not sweep.left:
                break
            patient = not sweep.moved
        report.stuck += sweep.stuck
        report.problems += sweep.problems[: _SHOWN - len(report.problems)]
    async with database.session() as session:
        report.uses = await key_uses(session)
        other_keys = required_provider(session).key_ids[1:]
    needed = {use.key_id for use in report.uses}
    report.retirable = [key_id for key_id in other_keys if key_id not in needed]
    return report


async def _check_first_key(session: AsyncSession, mapper: Mapper[Any]) -> None:
    """Refuse another key under an id that is in use: its rows and the old ones would mix."""
    newest = select(mapper.class_).where(not_(outdated(session, mapper)))
    rows = await session.scalars(newest.order_by(table_of(mapper).c.id.desc()).limit(_SAMPLE))
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
    """How one way through a table went, in rows."""

    moved: int = 0
    left: int = 0  # locked, or changed meanwhile
    stuck: int = 0
    problems: list[str] = field(default_factory=list)


async def _sweep(
    database: Database,
    mapper: Mapper[Any],
    advance: Callable[[int], None],
    *,
    dry_run: bool,
    patient: bool,
) -> _Sweep:
    """Go through a table once. A patient one waits for locks, and so goes row by row."""
    sweep, limit = _Sweep(), 1 if patient else BATCH
    batch = await _prepare(database, mapper, UUID(int=0), limit, sweep)
    while batch is not None:
        (last, changes), before = batch, sweep.moved
        if dry_run:
            sweep.moved += len(changes)
            batch = await _prepare(database, mapper, last, limit, sweep)
        else:  # the next ones are decrypted while the server stores these
            _, batch = await _both(
                _store(database, mapper, changes, sweep, patient=patient),
                _prepare(database, mapper, last, limit, sweep),
            )
        advance(sweep.moved - before)
    return sweep


async def _prepare(
    database: Database, mapper: Mapper[Any], after: UUID, limit: int, sweep: _Sweep
) -> tuple[UUID, list[dict[str, object]]] | None:
    """The next outdated rows: the id of the last one, and what to store; None: there are none."""
    changes = []
    async with database.session() as session:
        rows = await _outdated_rows(session, mapper, after, limit)
        for row in rows:
            try:
                changes.append(_resealed(required_provider(session), mapper, row))
            except EncryptionError:
                sweep.stuck += 1
                if len(sweep.problems) < _SHOWN:
                    sweep.problems.append(await _reason(session, mapper, row.id))
    return (rows[-1].id, changes) if rows else None


async def _store(
    database: Database,
    mapper: Mapper[Any],
    changes: Sequence[dict[str, object]],
    sweep: _Sweep,
    *,
    patient: bool,
) -> None:
    """Store what was resealed; of rows that are locked, one half after the other."""
    if not changes:
        return
    try:
        async with database.session() as session:
            moved = await _write(session, mapper, changes, patient=patient)
    except (Conflict, QueryTimeout):
        if half := len(changes) // 2:
            for part in (changes[:half], changes[half:]):
                await _store(database, mapper, part, sweep, patient=patient)
        elif patient:
            sweep.stuck += 1
            sweep.problems.append(f"{table_of(mapper).name}:{changes[0]['id']}: it stays locked")
        else:
            sweep.left += 1
    else:
        sweep.moved += moved
        sweep.left += len(changes) - moved


async def _both(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Both results, once both have ended; raises what one of them raises."""
    one, other = await asyncio.gather(first, second, return_exceptions=True)
    if isinstance(one, BaseException):
        raise one
    if isinstance(other, BaseException):
        raise other
    return one, other


async def _outdated_rows(
    session: AsyncSession, mapper: Mapper[Any], after: UUID, limit: int
) -> Sequence[Row[Any]]:
    table = table_of(mapper)
    secrets = [type_coerce(table.c[name], LargeBinary) for name in secret_names(mapper)]
    rows = await session.execute(
        select(table.c.id, *secrets)
        .where(table.c.id > after, outdated(session, mapper))
        .order_by(table.c.id)
        .limit(limit)
    )
    return rows.all()


def _resealed(provider: KeyProvider, mapper: Mapper[Any], row: Row[Any]) -> dict[str, object]:
    """What `_write` needs: a row's old ciphertexts, and those under the first key.

    Raises:
        EncryptionError: one of them cannot be decrypted. The row then waits for its key as a whole.
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


async def _reason(session: AsyncSession, mapper: Mapper[Any], row_id: UUID) -> str:
    """Why a row's secrets cannot be decrypted, in words that name its owner."""
    row = await session.get(mapper.class_, row_id)
    for secret in secrets_of(row) if row else ():
        try:
            secret.get_secret_value()
        except EncryptionError as error:
            return str(error)
    return f"{table_of(mapper).name}:{row_id}: it has changed meanwhile: try again"


async def _write(
    session: AsyncSession,
    mapper: Mapper[Any],
    changes: Sequence[dict[str, object]],
    *,
    patient: bool,
) -> int:
    """Store what was resealed, with its event, where nothing has changed since; how many rows.

    Raises:
        Conflict, QueryTimeout: one of the rows is locked for longer than others may have to wait
            for this.
    """
    # Less than deadlock_timeout, whose default is a second: nobody else's transaction is ended.
    lock_timeout = "10s" if patient else "100ms"
    await session.execute(text(f"SET LOCAL lock_timeout = '{lock_timeout}'"))
    names, table = secret_names(mapper), table_of(mapper).name
    marks = [type_.fingerprint for _, type_ in encrypted_columns(mapper) if type_.fingerprint]
    arrays = {name: [change[name] for change in changes] for name in changes[0]}
    written = await session.scalars(
        text(
            f"UPDATE {table} SET"  # noqa: S608  # names of the models
            f" {', '.join(f'{name} = new_{name}' for name in names)},"
            f" {', '.join(f'{mark} = coalesce(given.{mark}, {table}.{mark})' for mark in marks)}"
            f" FROM unnest({', '.join(f'CAST(:{name} AS {_array(name)})' for name in arrays)})"
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
            resource_id=required_provider(session).key_ids[0],
            details={
                "table": table,
                "rows": len(ids),
                "from": str(ids[0]),
                "to": str(ids[-1]),
            },
        )
    return len(ids)


def _array(name: str) -> str:
    return "uuid[]" if name == "id" else "bytea[]"
