"""The files of the archive: a folder or a bucket of an object store, and Parquet in it.

pyarrow is an optional dependency, which is imported only when an archive is opened.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from tiger_db.audit.event_content import CONTENT_COLUMNS, Event
from tiger_db.audit.event_members import split_members, text_of
from tiger_db.audit.seal_format import Seal
from tiger_db.errors import ConfigurationError, FileError, InvalidValue
from tiger_db.files import UNFINISHED, sync_path

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import FileSystem

ROWS_PER_GROUP = (
    20_000  # Readers skip a row group whose statistics exclude the account or the time.
)
REPLACED = ".replaced-"  # Prefix of the names of files of interrupted attempts.
_NAME = re.compile(r"month=(\d{4}-\d\d)/(\w[\w-]*\.parquet)", re.ASCII)
_EXTENT = re.compile(r"(?:events|_seals)-(\d{19})-(\d{19})\.parquet", re.ASCII)
_ORIGIN = b"tiger_db.origin"  # Key of the origin of the audit trail in the metadata of a file.
_CHUNK_BYTES = 2**20
_S3_OPTIONS = {"endpoint_override", "region", "scheme", "tls_ca_file_path"}
# In seconds. A request times out if the store sends and receives nothing for so long.
_S3_TIMEOUTS = {"connect_timeout": 5, "request_timeout": 20}
_S3_ATTEMPTS = 3  # of each request
_TIMED_OUT = "Timeout was reached"  # in an error of the S3 client
_SEALS_PER_BATCH = 20  # A seal can have 320 kB of digests.
_BLOOM_FILTER = {"ndv": 1000, "fpp": 0.01}
Row: TypeAlias = tuple[object, ...]


def _import_pyarrow() -> Any:  # noqa: ANN401  # pyarrow has no types
    try:
        import pyarrow as pa  # noqa: PLC0415  # optional, and slow to import
        from pyarrow import fs, parquet  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigurationError(
            "the archive needs pyarrow: install tiger_db with the extra `archive`"
        ) from error
    return pa


@contextlib.contextmanager
def archive_errors(name: str) -> Iterator[None]:
    """Convert the errors of pyarrow and of the file system to FileError."""
    pyarrow = _import_pyarrow()
    try:
        yield
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"the archive: {name} does not exist") from None
    except UnicodeDecodeError as error:
        raise FileError(f"the archive: {name}: a file has the name {error.object!r}") from None
    except (OSError, pyarrow.ArrowException) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        problem = "the store does not answer" if _TIMED_OUT in lines[0] else lines[0]
        raise FileError(f"the archive: {name}: {problem}") from None


@contextlib.contextmanager
def _temporary_errors() -> Iterator[None]:
    """Convert the errors of the file system about a temporary file to FileError."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"a temporary file cannot be written: {error.strerror}: make room for a copy of a file"
            " of the archive, or set TMPDIR to another folder"
        ) from None


@dataclass(frozen=True)
class Archive:
    """The files of an archive. A name is a path relative to the archive, with slashes.

    The methods block, and raise FileError if a file cannot be read or written.
    """

    location: str
    root: str
    filesystem: "FileSystem"
    folder: Path | None  # None for an object store

    def names(self, month: str | None = None) -> list[str]:
        """Return the names of all files of the archive or of a month, in ascending order.

        The entries in `unread_entries` are left out.
        """
        base = "" if month is None else f"month={month}"
        with archive_errors(self.location):
            if self.folder is not None:
                is_missing = month is not None and not (self.folder / base).exists()
                return [] if is_missing else _list_folder(self.folder, base)[0]
            fs = _import_pyarrow().fs
            path = self._path(base) if base else self.root
            selector = fs.FileSelector(path, recursive=True, allow_not_found=month is not None)
            found = self.filesystem.get_file_info(selector)
        start = len(self.root) + 1
        return sorted(info.path[start:] for info in found if info.type == fs.FileType.File)

    def check_missing(self, name: str, error: FileError) -> None:
        """Raise an error of `read` again, unless the archive can be listed and lacks the file.

        A store that fails is not a file that somebody has removed.
        """
        if name in self.names():
            raise error

    def unread_entries(self) -> dict[str, str]:
        """Return what is wrong with each entry of a folder that `names` leaves out, by its name.

        These are the folders in the folders of months, links to folders, because a link can lead to
        the archive itself, and links that lead nowhere. An object store has none.
        """
        with archive_errors(self.location):
            return _list_folder(self.folder, "")[1] if self.folder is not None else {}

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a new file. A file in a folder is on the disk when the `with` block ends."""
        with archive_errors(name):
            if self.folder is not None:
                (self.folder / name).parent.mkdir(exist_ok=True)
            with self.filesystem.open_output_stream(self._path(name)) as stream:
                yield stream
            if self.folder is not None:
                sync_path(self.folder / name)

    @contextlib.contextmanager
    def read(self, name: str) -> Iterator[tuple[IO[bytes], str]]:
        """Copy a file to a temporary file. Yield the temporary file, and the SHA-256 digest."""
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            with _temporary_errors():
                copy = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            path = self._path(name)
            with archive_errors(name), self.filesystem.open_input_stream(path) as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    rest = memoryview(chunk)
                    with _temporary_errors():
                        while rest:  # a write can be partial, because the file has no buffer
                            rest = rest[copy.write(rest) :]
            copy.seek(0)
            yield copy, digest.hexdigest()

    def is_parquet(self, name: str) -> bool:
        """Return whether a file is named like a Parquet file, or begins like one."""
        with archive_errors(name), self.filesystem.open_input_stream(self._path(name)) as stream:
            return name.endswith(".parquet") or stream.read(4) == b"PAR1"

    def digest(self, name: str) -> str:
        with self.read(name) as (_, digest):
            return digest

    def move(self, name: str, target: str) -> None:
        """Rename a file. In an object store, this copies the object and deletes the old one."""
        with archive_errors(target):
            self.filesystem.move(self._path(name), self._path(target))
            if self.folder is not None:
                sync_path((self.folder / target).parent)
                sync_path(self.folder)

    def delete(self, name: str) -> None:
        with archive_errors(name):
            self.filesystem.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def _list_folder(root: Path, base: str) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files in a folder of an archive, and the unread entries.

    The folder of a month can be a link to another disk.
    """
    names, unread, waiting = list[str](), dict[str, str](), [base]
    while waiting:
        parent = waiting.pop()
        with os.scandir(root / parent) as entries:
            for entry in entries:
                name = os.fsencode(entry.name).decode()
                path = f"{parent}/{name}" if parent else name
                is_month = not parent and name.startswith("month=")
                if _is_broken_link(entry):
                    unread[path] = "the link leads to no file"
                elif entry.is_file():
                    names.append(path)
                elif not entry.is_dir():
                    continue
                elif parent.startswith("month=") or (entry.is_symlink() and not is_month):
                    unread[path] = "the folder does not belong to the archive"
                else:
                    waiting.append(path)
    return sorted(names), dict(sorted(unread.items()))


def _is_broken_link(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a link that leads to nothing, or to itself."""
    if entry.is_symlink():
        try:
            entry.stat()
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                return True
            raise
    return False


def open_archive(location: str) -> Archive:
    """Open the archive AUDIT_ARCHIVE: an existing folder, or `s3://bucket/prefix`.

    Raises:
        ConfigurationError: pyarrow is not installed.
        FileError: The folder does not exist, or the URL of the object store is not valid.
    """
    pyarrow = _import_pyarrow()
    if "://" in location:
        return _open_s3(location)
    folder = Path(location).absolute()
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist: create the folder"
        raise FileError(f"the archive: {location} {problem}")
    return Archive(location, folder.as_posix(), pyarrow.fs.LocalFileSystem(), folder)


def _open_s3(location: str) -> Archive:
    """Open an archive in a store with the API of S3, which must answer each request in time."""
    fs, url = _import_pyarrow().fs, urlsplit(location)
    options: dict[str, object] = dict(parse_qsl(url.query))
    if unknown := options.keys() - _S3_OPTIONS - _S3_TIMEOUTS.keys():
        raise FileError(f"the archive: {location}: there is no option {min(unknown)}")
    for name, default in _S3_TIMEOUTS.items():
        value = str(options.get(name, default))
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise FileError(f"the archive: {location}: {name} must be a number of seconds")
        options[name] = int(value)
    with archive_errors(location):
        if not {"region", "endpoint_override"} & options.keys():
            options["region"] = fs.resolve_s3_region(url.netloc)
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS)
        filesystem = fs.S3FileSystem(**options, retry_strategy=retries)
    return Archive(location, (url.netloc + unquote(url.path)).rstrip("/"), filesystem, None)


def parse_name(name: str) -> tuple[str, str] | None:
    """Return the month and the rest of the name of an archived file, or None for other files."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


def extent_in(name: str) -> tuple[int, int] | None:
    """Return the first and last position in the name of an archived file, or None."""
    found = _EXTENT.fullmatch(name.rpartition("/")[2])
    return (int(found[1]), int(found[2])) if found else None


def is_archived_name(name: str) -> bool:
    """Return whether a name is one that `archive` gives to a file."""
    return parse_name(name) is not None and extent_in(name) is not None


def is_of_seals(name: str) -> bool:
    """Return whether an archived file has seals, according to its name."""
    return "/_seals-" in name


def is_leftover(name: str) -> bool:
    """Return whether a file is unfinished or was replaced. Readers of the archive ignore it."""
    return name.rpartition("/")[2].startswith((UNFINISHED, REPLACED))


def event_schema(origin: str) -> "pa.Schema":
    """Return the columns of a file of events: the members of the content, and the content."""
    pa = _import_pyarrow()
    types = {"created_at": pa.timestamp("us", tz="UTC"), "duration_ms": pa.int64()}
    return pa.schema(
        [
            pa.field("position", pa.int64(), nullable=False),
            *((name, types.get(name, pa.string())) for name in CONTENT_COLUMNS),
            pa.field("content", pa.string(), nullable=False),
        ],
        {_ORIGIN: origin.encode()},
    )


def seal_schema(origin: str) -> "pa.Schema":
    """Return the columns of a file of seals, which are those of the table `audit_seals`."""
    pa = _import_pyarrow()
    types = {
        "number": pa.int64(),
        "statement": pa.string(),
        "signature": pa.binary(),
        "digests": pa.binary(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, {_ORIGIN: origin.encode()})


def event_row(event: Event) -> Row:
    position, content = event
    identity, created_at, *values = map(text_of, split_members(content))
    duration = CONTENT_COLUMNS.index("duration_ms") - 2
    number = values[duration]
    row: list[object] = [position, identity, _time(created_at), *values, content]
    row[duration + 3] = int(number) if number is not None else None
    return tuple(row)


def _time(text: str | None) -> datetime | None:
    """Parse a time. A time that is infinite or not in the years 1 to 9999 becomes None."""
    try:
        return datetime.fromisoformat(text or "")
    except ValueError:
        return None


class ParquetFile:
    """A Parquet file that is written under a temporary name, in row groups.

    The attribute `digest` is the SHA-256 digest of all bytes that were written.
    """

    def __init__(self, archive: Archive, month: str, schema: "pa.Schema") -> None:
        parquet = _import_pyarrow().parquet
        self.archive = archive
        self.unfinished = f"month={month}/{UNFINISHED}{secrets.token_hex(8)}"
        self.rows = 0
        self._hash = hashlib.sha256()
        self._schema = schema
        self._stack = contextlib.ExitStack()
        stream = self._stack.enter_context(archive.write(self.unfinished))
        is_events = "content" in schema.names
        filters = ("tiger_account_id", "api_key_id")
        self._writer: Any = parquet.ParquetWriter(
            _HashingStream(stream, self._hash.update),
            schema,
            compression="zstd",
            use_dictionary=[n for n in schema.names if n not in ("position", "content", "id")],
            write_page_index=True,
            bloom_filter_options=dict.fromkeys(filters, _BLOOM_FILTER) if is_events else None,
            sorting_columns=[parquet.SortingColumn(0)],
        )

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, rows: Sequence[Row]) -> None:
        """Write a row group."""
        pa = _import_pyarrow()
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*rows, strict=True), self._schema, strict=True)
        ]
        with archive_errors(self.unfinished):
            self._writer.write_batch(pa.record_batch(columns, self._schema))
        self.rows += len(rows)

    def close(self) -> None:
        """Write the end of the file, and release the memory of the writer."""
        writer, self._writer = self._writer, None
        with self._stack, archive_errors(self.unfinished):
            if writer is not None:
                writer.close()


class _HashingStream:
    """A stream that passes all bytes to a second function, too."""

    closed = False

    def __init__(self, stream: IO[bytes], update: Callable[[bytes], object]) -> None:
        self._stream, self._update = stream, update

    def write(self, data: bytes) -> int:
        self._update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        """Leave the stream open."""


def origin_of(file: IO[bytes]) -> str | None:
    """Return the origin of the trail in the metadata of a file, or None if there is none."""
    metadata = _open_parquet(file).schema_arrow.metadata or {}
    found = metadata.get(_ORIGIN)
    return None if found is None else found.decode(errors="replace")


def read_events(file: IO[bytes]) -> Iterator[Event]:
    """Yield the position and the content of each event of a file."""
    yield from _read(file, ("position", "content"), ROWS_PER_GROUP // 4)


def read_event_rows(file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows of a file of events, with all columns, in the order of `event_schema`."""
    names = event_schema("").names
    if _open_parquet(file).schema_arrow.names != names:
        raise InvalidValue("the file does not have the columns of an archived file")
    yield from _read(file, tuple(names), ROWS_PER_GROUP // 4)


def read_seals(file: IO[bytes]) -> Iterator[Seal]:
    for number, statement, signature, digests in _read(
        file, tuple(seal_schema("").names), _SEALS_PER_BATCH
    ):
        yield Seal(statement, signature, digests, number)


def seal_bytes(seal: Seal) -> bytes:
    """Return all columns of a seal as bytes, from which a digest of several seals is made."""
    statement = seal.payload_json.encode()
    head = f"{seal.row_number} {len(statement)} {len(seal.signature)} {len(seal.digests)} "
    return head.encode() + statement + seal.signature + seal.digests


def _read(file: IO[bytes], columns: tuple[str, ...], batch: int) -> Iterator[tuple[Any, ...]]:
    parquet_file = _open_parquet(file)
    declared = {field.name: field for field in (*event_schema(""), *seal_schema(""))}
    for name in columns:
        try:
            found = parquet_file.schema_arrow.field(name)
        except KeyError:  # the file has no such column, or several
            raise InvalidValue(f"the file has no column {name}") from None
        if not found.equals(declared[name]):
            raise InvalidValue(f"the column {name} of the file has another type")
    batches = parquet_file.iter_batches(batch, columns=list(columns))
    while True:
        with _parquet_errors():
            if (rows := next(batches, None)) is None:
                return
            values = [rows.column(name).to_pylist() for name in columns]
        yield from zip(*values, strict=True)


def _open_parquet(file: IO[bytes]) -> Any:  # noqa: ANN401  # pyarrow has no types
    pyarrow = _import_pyarrow()
    file.seek(0)
    with _parquet_errors():
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False)


@contextlib.contextmanager
def _parquet_errors() -> Iterator[None]:
    """Convert the errors of pyarrow about the content of a file to InvalidValue."""
    pyarrow = _import_pyarrow()
    try:
        yield
    except (OSError, UnicodeDecodeError, OverflowError, pyarrow.ArrowException) as error:
        raise InvalidValue("the file is not a valid Parquet file") from error
