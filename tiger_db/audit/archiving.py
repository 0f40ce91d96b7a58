"""The archive writer: copies the sealed events of a month to Parquet files, and proves the copy."""

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeAlias

from tiger_db.audit import storage
from tiger_db.audit.archive_files import (
    REPLACED,
    ROWS_PER_GROUP,
    Archive,
    ParquetFile,
    Row,
    event_row,
    event_schema,
    is_archived_name,
    is_of_seals,
    open_archive,
    origin_of,
    read_events,
    read_seals,
    seal_bytes,
    seal_schema,
)
from tiger_db.audit.months import (
    ArchiveBusyError,
    CannotRetireError,
    SealedMonth,
    fetch_retirements,
    find_sealed_month,
    sealed_events,
    seals_between,
)
from tiger_db.audit.seal_format import ArchivedFile, MerkleTree, Seal, digest_of
from tiger_db.audit.sealer import Sealer, check_clocks, required_key
from tiger_db.audit.storage import Connection
from tiger_db.database import Database
from tiger_db.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    FileError,
    InvalidState,
    InvalidValue,
)
from tiger_db.files import UNFINISHED
from tiger_db.migrations.locks import lock_key
from tiger_db.public import Progress, no_progress, public
from tiger_db.signing import parse_public_key

ROWS_PER_FILE = 1_000_000
_SEAL_BYTES_PER_GROUP = 8 * 2**20
Runner: TypeAlias = Callable[..., Awaitable[Any]]  # Runs a function in another thread.
_MONTH = re.compile(r"(?!0000)\d{4}-(0[1-9]|1[0-2])", re.ASCII)
_ARCHIVE_LOCK_ID = lock_key(0x7469676572_02)
_TAKE_ARCHIVE_LOCK = f"SELECT pg_catalog.pg_try_advisory_lock({_ARCHIVE_LOCK_ID})"
_RELEASE_ARCHIVE_LOCK = f"SELECT pg_catalog.pg_advisory_unlock({_ARCHIVE_LOCK_ID})"


@dataclass(frozen=True, slots=True)
class ArchivedMonth:
    """A month in the archive, whose files were read back and match the seals.

    `files` has the name, the number of rows and the SHA-256 digest of each file. `root` is the root
    of the Merkle tree of the events.
    """

    month: str
    events: int
    root: str
    files: tuple[ArchivedFile, ...]


@public
async def archive(
    database: Database, month: str, *, progress: Progress = no_progress
) -> ArchivedMonth | None:
    """Write the events of a month such as `2026-01` to the archive, and leave them in the database.

    `maintain` does the same before it retires a month. All events of the month must be sealed, and
    the seals must belong to the chain that `AUDIT_SIGNING_KEY` continues. The files are written
    under temporary names, are read back, and must match the seals. A repeated call replaces no file
    that a retirement has signed, and deletes no file. Return None if the database has no events of
    the month. The memory use does not depend on the number of events. `archive` calls `progress`
    with the number of events that were written or read back, and with the total of both.

    Raises:
        InvalidValue: `month` is not a month, or has not ended.
        ConfigurationError: `AUDIT_ARCHIVE` or `AUDIT_SIGNING_KEY` is not set, or the key is not the
            key in force, or pyarrow is not installed.
        DatabaseUnavailable: Another session is archiving or removing months.
        FileError: A file cannot be written or read back, or the folder `AUDIT_CHECKPOINTS` cannot
            be read or written.
        InvalidState: The events are not sealed or differ from the seals, the chain of seals is
            broken, the month has no partition, the archive has files of another audit trail, or the
            clocks of the database and of this machine differ by more than a minute.
    """
    if _MONTH.fullmatch(month) is None:
        raise InvalidValue("the month must have the form YYYY-MM, such as 2026-01")
    files = await open_configured(database)
    key, folder = await required_key(database), database.settings.audit_checkpoints
    async with storage.open_connection(database) as connection:
        now = await storage.fetch_clock(connection)
        check_clocks(now, datetime.now(UTC), "no month is archived")
        if month >= f"{now.astimezone(UTC):%Y-%m}":
            raise InvalidValue(f"the month {month} has not ended")
        sealer = await Sealer.open(connection, key, folder)
        try:
            async with archive_lock(connection):
                return await archive_month(sealer, files, month, progress=progress)
        except ArchiveBusyError as error:
            raise DatabaseUnavailable(str(error)) from None
        except CannotRetireError as error:
            raise InvalidState(f"the events of {month} were not archived: {error}") from None


async def open_configured(database: Database) -> Archive:
    """Open the archive in `AUDIT_ARCHIVE`."""
    location = database.settings.audit_archive
    if location is None:
        raise ConfigurationError(
            "AUDIT_ARCHIVE is not set: set it to a folder, or to a URL such as s3://bucket/prefix"
        )
    return await asyncio.to_thread(open_archive, location)


@asynccontextmanager
async def archive_lock(connection: Connection) -> AsyncIterator[None]:
    """Hold the lock of the archive: one session at a time archives and retires months.

    Raises:
        ArchiveBusyError: Another session holds the lock.
    """
    if not await connection.fetchval(_TAKE_ARCHIVE_LOCK):
        raise ArchiveBusyError("another session is archiving or removing months: try again later")
    try:
        yield
    finally:
        if not connection.is_closed():
            await connection.execute(_RELEASE_ARCHIVE_LOCK)


async def archive_month(
    sealer: Sealer,
    archive: Archive,
    month: str,
    *,
    written_before: datetime | None = None,
    progress: Progress = no_progress,
) -> ArchivedMonth | None:
    """Write a month to the archive, with seals that belong to the verified chain. See `archive`.

    The caller holds the lock of the archive.

    Raises:
        CannotRetireError: The events are not sealed or differ from the seals.
        InvalidState: The chain of seals is broken.
    """
    connection, chain = sealer.connection, sealer.chain
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await sealer.catch_up()
        found = await find_sealed_month(
            connection, month, chain.upto, written_before=written_before
        )
        if found is None:
            return None
        signed = {
            file for seal in await fetch_retirements(connection)
            for file, _, _ in seal.payload().archive or ()
        }  # fmt: skip
        writer = _MonthWriter(
            archive, month, chain.origin or "", signed, (progress, 2 * found.count)
        )
        # The single thread finishes its work before `abort` runs, also if the task is cancelled.
        with ThreadPoolExecutor(1) as thread:
            run = partial(asyncio.get_running_loop().run_in_executor, thread)
            try:
                await run(writer.check_folder)
                past = await _write_events(connection, writer, found, run)
                await sealer.check_past(past)
                await _write_seals(connection, writer, found, run)
                files = await run(writer.finish)
            finally:
                await run(writer.abort)
        return ArchivedMonth(month, found.count, writer.tree.root, files)


async def _write_events(
    connection: Connection, writer: "_MonthWriter", month: SealedMonth, run: Runner
) -> dict[int, str]:
    """Write the events. Return the digests of the payloads of their seals, by seal number."""
    rows, past = list[Row](), dict[int, str]()
    async with aclosing(sealed_events(connection, month, past)) as events:
        async for event, digest in events:
            writer.add(event[0], digest)
            rows.append(event_row(event))
            if len(rows) == ROWS_PER_GROUP:
                await run(writer.write_events, rows)
                rows = []
    if rows:
        await run(writer.write_events, rows)
    return past


async def _write_seals(
    connection: Connection, writer: "_MonthWriter", month: SealedMonth, run: Runner
) -> None:
    """Write the seals, whose payloads have been verified, and verify their signatures."""
    seals: list[Seal] = []
    size = 0
    async for seal in seals_between(connection, month.first, month.last, whole_chain=True):
        payload = seal.payload()
        if not seal.is_signed_by([parse_public_key(payload.key)]):
            raise CannotRetireError(
                f"the signature of seal {payload.number} is not valid: run `tiger-db verify-audit`"
            )
        seals.append(seal)
        size += len(seal.digests) + len(seal.payload_json)
        if size >= _SEAL_BYTES_PER_GROUP:
            await run(writer.write_seals, seals)
            seals, size = [], 0
    if seals:
        await run(writer.write_seals, seals)


@dataclass
class _Part:
    """A file that is being written, with what a copy that was read back must match."""

    file: ParquetFile
    tree: MerkleTree = field(default_factory=MerkleTree)  # of the events in the file
    seals: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def check(self, progress: Progress, done: int, total: int) -> None:
        """Read the file back, and compare it with the events and seals of the database.

        Raises:
            FileError: The file is not the one that was written.
        """
        archive, name = self.file.archive, self.file.unfinished
        tree, seals = MerkleTree(), hashlib.sha256()
        with archive.read(name) as (copy, digest):
            with suppress(InvalidValue):
                if self.tree.count:
                    for position, content in read_events(copy):
                        tree.add(position, digest_of(content))
                        if tree.count % ROWS_PER_GROUP == 0:
                            progress(done + tree.count, total)
                else:
                    for seal in read_seals(copy):
                        seals.update(seal_bytes(seal))
            same = (tree.root, tree.positions) == (self.tree.root, self.tree.positions)
            if not same or seals.digest() != self.seals.digest() or digest != self.file.digest:
                raise FileError(f"the archive: {name}: the file is not the one that was written")


class _MonthWriter:
    """The files of one month: written under temporary names, checked, and then renamed."""

    def __init__(
        self,
        archive: Archive,
        month: str,
        origin: str,
        signed: set[str],
        progress: tuple[Progress, int],
    ) -> None:
        self.tree = MerkleTree()  # of all events of the month
        self._archive, self._month, self._origin = archive, month, origin
        self._signed = signed  # names of the files that retirements have signed
        self._parts: list[_Part] = []
        self._pending: list[tuple[int, bytes]] = []
        self._progress, self._total = progress

    def check_folder(self) -> None:
        """Remove the leftovers of killed writers. Refuse a folder with another audit trail.

        Raises:
            InvalidState: A file of the month belongs to another audit trail, or has the name of an
                archived file and is none.
        """
        for name in self._archive.names(self._month):
            if f"/{UNFINISHED}" in name:
                self._archive.delete(name)
            elif is_archived_name(name) and name not in self._signed:
                with self._archive.read(name) as (copy, _), suppress(InvalidValue):
                    if (origin := origin_of(copy)) is None:
                        raise InvalidState(
                            f"the archive: {name} is no file of tiger_db: move it to another folder"
                        )
                    if origin not in ("", self._origin):
                        raise InvalidState(
                            f"the archive: {name} belongs to another audit trail:"
                            " use one archive for each database"
                        )

    def add(self, position: int, digest: bytes) -> None:
        """Note an event that the next call of `write_events` writes."""
        self.tree.add(position, digest)
        self._pending.append((position, digest))

    def write_events(self, rows: list[Row]) -> None:
        if not self._parts or self._parts[-1].file.rows >= ROWS_PER_FILE:
            self._begin(event_schema(self._origin))
        part = self._parts[-1]
        part.file.add(rows)
        for position, digest in self._pending:
            part.tree.add(position, digest)
        self._pending = []
        self._progress(self.tree.count, self._total)

    def write_seals(self, seals: list[Seal]) -> None:
        if self._parts[-1].tree.count:
            self._begin(seal_schema(self._origin))
        part = self._parts[-1]
        part.file.add([(s.row_number, s.payload_json, s.signature, s.digests) for s in seals])
        for seal in seals:
            part.seals.update(seal_bytes(seal))

    def _begin(self, schema: object) -> None:
        if self._parts:
            self._parts[-1].file.close()
        self._parts.append(_Part(ParquetFile(self._archive, self._month, schema)))

    def finish(self) -> tuple[ArchivedFile, ...]:
        """Check all files, give them their names, and return them.

        A file that has one of the names, or that is of an interrupted attempt, gets another name.

        Raises:
            FileError: A file was not stored as it was written.
            InvalidState: A retirement has signed a file with one of the names.
        """
        self._parts[-1].file.close()
        done = self.tree.count
        for part in self._parts:
            part.check(self._progress, done, self._total)
            done += part.tree.count
        self._progress(self._total, self._total)
        files = {_name(self._month, part.tree, self.tree): part for part in self._parts}
        if names := files.keys() & self._signed:
            raise InvalidState(f"the archive: a retirement has signed {min(names)} already")
        present = [
            name for name in self._archive.names(self._month)
            if is_archived_name(name) and name not in self._signed
        ]  # fmt: skip
        kept = {
            name for name in present
            if name in files and self._archive.digest(name) == files[name].file.digest
        }  # fmt: skip
        # The file of seals, which sorts first, is renamed first and written last. While a file of
        # the month is missing, there is no file of seals.
        if kept != files.keys():
            kept = {name for name in kept if not is_of_seals(name)}
        for name in present:
            if name not in kept:
                head, _, tail = name.rpartition("/")
                self._archive.move(name, f"{head}/{REPLACED}{secrets.token_hex(4)}-{tail}")
        for name, part in files.items():
            if name not in kept:
                self._archive.move(part.file.unfinished, name)
            if self._archive.digest(name) != part.file.digest:
                raise FileError(f"the archive: {name}: the file is not the one that was written")
        return tuple((name, part.file.rows, part.file.digest) for name, part in files.items())

    def abort(self) -> None:
        """Delete the temporary files that are left, unless the archive fails."""
        unfinished = {part.file.unfinished for part in self._parts}
        for part in self._parts:
            with suppress(FileError):
                part.file.close()
        with suppress(FileError):
            for name in self._archive.names(self._month) if unfinished else ():
                if name in unfinished:
                    self._archive.delete(name)


def _name(month: str, events: MerkleTree, all_events: MerkleTree) -> str:
    """Return the name of a file: of the events, or of the seals if there are no events in it."""
    positions = (events if events.count else all_events).positions
    kind = "events" if events.count else "_seals"
    return f"month={month}/{kind}-{positions[0][0]:019}-{positions[-1][1]:019}.parquet"
