"""Which encryption keys the stored secrets need, and moving all of them to the first one.

A row is moved by one statement that compares its old ciphertexts: a change that comes between
reading and writing wins, and is moved later. The ciphertexts alone tell what has been moved: a run
that was killed leaves nothing to clean up, and the next one goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Row,
    Table,
    and_,
    bindparam,
    case,
    column,
    func,
    literal,
    or_,
    select,
    text,
    true,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, array
from sqlalchemy.dialects.postgresql import UUID as SQLUUID
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper

from tiger_db.crud import audit_logs
from tiger_db.database import Database
from tiger_db.encryption import KeyProvider, decrypt, encrypt, fingerprints, header_of
from tiger_db.errors import ConfigurationError, EncryptionError
from tiger_db.models import AuditAction, Entity
from tiger_db.models.base import encrypted_columns, key_provider, place_of, secrets_of

DAMAGED = "(damaged)"  # in place of the key id of what is no ciphertext
BATCH = 500  # rows in a transaction
_HEADER = 34  # bytes at most: version, length, 32 of key id
_SHOWN = 20  # problems that a report has in words
_LOCKED = ("55P03", "57014")  # SQLSTATEs of lock_timeout and statement_timeout


@dataclass(frozen=True, slots=True)
class KeyUse:
    """How many rows of a table have a secret under a key."""

    table: str
    key_id: str
    rows: int


@dataclass(slots=True)
class Rotation:
    """What `rotate` did, or would do, and what it found afterwards."""

    key_id: str  # the first key
    rotated: int = 0  # rows
    stuck: int = 0  # rows that could not be moved
    problems: list[str] = field(default_factory=list)  # why; a line each, of the first ones
    uses: list[KeyUse] = field(default_factory=list)
    retirable: list[str] = field(default_factory=list)  # other keys, that no row needs


async def key_uses(session: AsyncSession) -> list[KeyUse]:
    """The rows per table and key, as they are now; a row that needs several counts for each."""
    uses = []
    for mapper in _entities():
        table = _table(mapper)
        starts = [func.substr(table.c[name], 1, _HEADER) for name in _names(mapper)]
        heads = (
            func.unnest(array(starts)).table_valued(column("head", LargeBinary)).render_derived()
        )
        head, length = heads.c.head, func.length(heads.c.head)
        is_ciphertext = case(
            (length > 2, and_(func.get_byte(head, 0) == 1, length >= 2 + func.get_byte(head, 1))),  # noqa: PLR2004  # version and length come first
            else_=False,
        )
        key_id = func.encode(func.substr(head, 3, func.get_byte(head, 1)), "escape")
        keys = (
            select(case((is_ciphertext, key_id), else_=DAMAGED).label("key_id"))
            .where(head.is_not(None))
            .distinct()
            .lateral()
        )
        rows = await session.execute(
            select(keys.c.key_id, func.count())
            .select_from(table)
            .join(keys, true())
            .group_by(keys.c.key_id)
            .order_by(keys.c.key_id)
        )
        uses += [KeyUse(table.name, key, count) for key, count in rows]
    return uses


async def rows_to_rotate(session: AsyncSession) -> int:
    """How many rows have a secret that is not under the first key.

    Raises:
        ConfigurationError: there is no encryption key.
    """
    counts = [
        await session.scalar(
            select(func.count()).select_from(_table(mapper)).where(_outdated(session, mapper))
        )
        for mapper in _entities()
    ]
    return sum(filter(None, counts))


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
        DatabaseUnavailable: lost meanwhile; what was moved stays so. Run it again.
    """
    async with database.session() as session:
        report = Rotation(_provider(session).key_ids[0])
    for mapper in _entities():
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
        needed = {use.key_id for use in report.uses}
        report.retirable = [key for key in _provider(session).key_ids[1:] if key not in needed]
    return report


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
    sweep, after = _Sweep(), UUID(int=0)
    while True:
        moved, changes = 0, []
        try:
            async with database.session() as session:
                rows = await _outdated_rows(session, mapper, after, 1 if patient else BATCH)
                if not rows:
                    return sweep
                after = rows[-1].id
                for row in rows:
                    try:
                        changes.append(_resealed(_provider(session), mapper, row))
                    except EncryptionError:
                        sweep.stuck += 1
                        if len(sweep.problems) < _SHOWN:
                            sweep.problems.append(await _reason(session, mapper, row.id))
                moved = len(changes)
                if changes and not dry_run:
                    moved = await _write(session, mapper, changes, patient=patient)
        except DBAPIError as error:
            if not patient or getattr(error.orig, "sqlstate", None) not in _LOCKED:
                raise
            sweep.stuck += 1
            sweep.problems.append(f"{_table(mapper).name}:{after}: it is locked: try again later")
        else:
            sweep.moved += moved
            sweep.left += len(changes) - moved
            advance(moved)


async def _outdated_rows(
    session: AsyncSession, mapper: Mapper[Any], after: UUID, limit: int
) -> Sequence[Row[Any]]:
    table = _table(mapper)
    secrets = [type_coerce(table.c[name], LargeBinary) for name in _names(mapper)]
    rows = await session.execute(
        select(table.c.id, *secrets)
        .where(table.c.id > after, _outdated(session, mapper))
        .order_by(table.c.id)
        .limit(limit)
    )
    return rows.all()


def _resealed(provider: KeyProvider, mapper: Mapper[Any], row: Row[Any]) -> dict[str, object]:
    """What `_write` needs: a row's old ciphertexts, and those under the first key.

    Raises:
        EncryptionError: one of them cannot be decrypted. The row then waits for its key as a whole.
    """
    current = header_of(provider.key_ids[0])
    change: dict[str, object] = {"id": row.id}
    ciphertexts: tuple[bytes | None, ...] = tuple(row[1:])
    for (name, type_), ciphertext in zip(encrypted_columns(mapper), ciphertexts, strict=True):
        change[f"old_{name}"] = change[f"new_{name}"] = ciphertext
        if type_.fingerprint:
            change[type_.fingerprint] = None
        if ciphertext is None or ciphertext.startswith(current):
            continue
        place = place_of(mapper, name, row.id)
        plain = decrypt(provider, ciphertext, place)
        change[f"new_{name}"] = encrypt(provider, plain, place)
        if type_.fingerprint:
            change[type_.fingerprint] = fingerprints(provider, plain, place.split(":")[0])[0]
    return change


async def _reason(session: AsyncSession, mapper: Mapper[Any], row_id: UUID) -> str:
    """Why a row's secrets cannot be decrypted, in words that name its owner."""
    row = await session.get(mapper.class_, row_id)
    for secret in secrets_of(row) if row else ():
        try:
            secret.get_secret_value()
        except EncryptionError as error:
            return str(error)
    return f"{_table(mapper).name}:{row_id}: it has changed meanwhile: try again"


async def _write(
    session: AsyncSession,
    mapper: Mapper[Any],
    changes: Sequence[dict[str, object]],
    *,
    patient: bool,
) -> int:
    """Store what was resealed, with its event, where nothing has changed since; how many rows.

    Locked rows are skipped: a batch that waits may wait for one who waits for another of its rows.
    """
    table = _table(mapper)
    types = {name: SQLUUID() if name == "id" else LargeBinary() for name in changes[0]}
    given = (
        func.unnest(
            *(
                bindparam(None, [change[name] for change in changes], ARRAY(type_))
                for name, type_ in types.items()
            )
        )
        .table_valued(*(column(name, type_) for name, type_ in types.items()), name="given")
        .render_derived()
    )
    free = select(table.c.id).where(table.c.id.in_([change["id"] for change in changes]))
    if patient:
        await session.execute(text("SET LOCAL lock_timeout = '10s'"))
    else:
        free = free.with_for_update(key_share=True, skip_locked=True)
    names = _names(mapper)
    written = await session.execute(
        update(table)
        .where(
            table.c.id == given.c.id,
            table.c.id.in_(select(free.cte("free").c.id)),
            *(table.c[name].is_not_distinct_from(given.c[f"old_{name}"]) for name in names),
        )
        .values({name: given.c[f"new_{name}"] for name in names})
        .values(
            {
                type_.fingerprint: func.coalesce(
                    given.c[type_.fingerprint], table.c[type_.fingerprint]
                )
                for _, type_ in encrypted_columns(mapper)
                if type_.fingerprint
            }
        )
        .returning(table.c.id)
    )
    ids = sorted(written.scalars())
    if ids:
        await audit_logs.log_event(
            session,
            action=AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE,
            resource_type="encryption_key",
            resource_id=_provider(session).key_ids[0],
            details={
                "table": table.name,
                "rows": len(ids),
                "from": str(ids[0]),
                "to": str(ids[-1]),
            },
        )
    return len(ids)


def _entities() -> list[Mapper[Any]]:
    """Those that have secrets."""
    return [mapper for mapper in Entity._sa_registry.mappers if encrypted_columns(mapper)]  # noqa: SLF001  # SQLModel's name for the registry


def _table(mapper: Mapper[Any]) -> Table:
    assert isinstance(mapper.local_table, Table)
    return mapper.local_table


def _names(mapper: Mapper[Any]) -> list[str]:
    return [name for name, _ in encrypted_columns(mapper)]


def _outdated(session: AsyncSession, mapper: Mapper[Any]) -> ColumnElement[bool]:
    """Whether a row has a secret that is not under the first key."""
    current = header_of(_provider(session).key_ids[0])
    table = _table(mapper)
    return or_(
        *(
            func.substr(table.c[name], 1, len(current), type_=LargeBinary)
            != literal(current, LargeBinary)
            for name in _names(mapper)
        )
    )


def _provider(session: AsyncSession) -> KeyProvider:
    provider = key_provider(session.sync_session)
    if provider is None:
        raise ConfigurationError("ENCRYPTION_KEYS is not set, so there is no key to rotate to")
    return provider
