"""Export of accounts to files for Tiger's SDKs."""

import asyncio
import os
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import javaproperties
import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.private_keys import pem
from tests.support.tiger_files import (
    EVERYTHING,
    NEW,
    OLD,
    PK1,
    PK8,
    REQUIRED,
    actions,
    config,
    mode,
    names,
)
from tiger_db import AuditAction, AuditSeverity, Database, PrivateKeyFormat, TigerAccount, crud
from tiger_db.errors import AlreadyExists, FileError, InvalidState, InvalidValue, NotFound
from tiger_db.tiger import CONFIG_FILE, TOKEN_FILE, export_account, import_account

AWKWARD = (
    "\\",
    "a\\",
    " \u2028é",
    "\\u0041",
    "=",
    ": x",
    "#x",
    "!",
    "a\nb=c",
    "\ta\f",
    "\x85é",
    "😀\x7f",
)
# Makes every export fail at the very end of its transaction.
REFUSING_COMMITS = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'full'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON audit_logs DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.action = 'account:export') EXECUTE FUNCTION refuse();
"""


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


async def stored(database: Database, tmp_path: Path, lines: Mapping[str, str]) -> TigerAccount:
    async with database.session() as session:
        return (await import_account(session, config(tmp_path, lines, "given"))).account


async def test_the_files_are_as_tiger_gives_them_out(clone: Database, tmp_path: Path) -> None:
    lines = dict(reversed(EVERYTHING.items())) | {"token": NEW, "env": "TEST"}
    account = await stored(clone, tmp_path, lines)
    folder = tmp_path / "out"
    assert await export_account(clone, account.id, folder=folder) == [
        folder / CONFIG_FILE, folder / TOKEN_FILE
    ]  # fmt: skip
    wanted = EVERYTHING | {"env": "SANDBOX"}
    assert (folder / CONFIG_FILE).read_bytes().decode() == "".join(
        f"{key}={value}\n" for key, value in wanted.items()
    )
    assert (folder / TOKEN_FILE).read_bytes().decode() == f"token={NEW}\n"
    assert names(folder) == [CONFIG_FILE, TOKEN_FILE]


async def test_what_is_not_stored_has_no_line_and_no_file(clone: Database, tmp_path: Path) -> None:
    account = await stored(clone, tmp_path, REQUIRED)
    await export_account(clone, account.id, folder=tmp_path)
    assert [*javaproperties.loads((tmp_path / CONFIG_FILE).read_text())] == [
        "private_key_pk1", "private_key_pk8", "tiger_id", "account", "env"
    ]  # fmt: skip
    assert not (tmp_path / TOKEN_FILE).exists()


def printable(text: str) -> str:
    """Return the characters of a text that a Tiger id can have."""
    return "".join(re.findall("[!-~]", text)) or "20150001"


@pytest.mark.parametrize(
    "fields",
    [
        {"private_key": PK1, "private_key_format": "PK1"},
        {"private_key": PK8, "private_key_format": "PK8", "access_token": NEW},
        {"private_key": pem(PrivateKeyFormat.PK1)},
        {"private_key": PK1, "license": "TBUS", "environment": "SANDBOX", "account_name": "Other"},
        {"private_key": PK1, "client_options": {"timeout": 20, "use_full_tick": True, "x": [1]}},
        *(
            {
                "private_key": PK1, "tiger_id": printable(odd), "secret_key": f"{odd} x {odd}",
                "access_token": odd, "server_url": odd, "client_options": {"language": odd},
            }
            for odd in AWKWARD
        ),
    ],
)  # fmt: skip
@pytest.mark.slow
async def test_importing_an_export_changes_nothing(
    clone: Database, tmp_path: Path, fields: dict[str, Any]
) -> None:
    async with clone.session() as session:
        account = await factories.account(session, **fields)
    files = await export_account(clone, account.id, folder=tmp_path)
    async with clone.session() as session:
        before = await factories.everything(session)
        for token_file in {None, *files[1:]}:
            done = await import_account(session, files[0], token_file=token_file)
            assert (done.created, done.changed, done.ignored) == (False, [], [])
            assert not done.token_kept
        assert await factories.everything(session) == before


@pytest.mark.usefixtures("no_umask")
async def test_files_and_new_folders_are_for_their_owner_alone(
    clone: Database, tmp_path: Path
) -> None:
    account = await stored(clone, tmp_path, REQUIRED | {"token": NEW})
    folder = tmp_path / "new" / "deep"
    files = await export_account(clone, account.id, folder=folder)
    assert [mode(path) for path in files] == [0o600, 0o600]
    assert (mode(folder), mode(folder.parent)) == (0o700, 0o700)
    (tmp_path / "open").mkdir(mode=0o755)
    files = await export_account(clone, account.id, folder=tmp_path / "open")
    assert [mode(path) for path in files] == [0o600, 0o600]
    assert mode(tmp_path / "open") == 0o755


@pytest.mark.parametrize("name", [CONFIG_FILE, TOKEN_FILE])
@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
async def test_nothing_is_overwritten_unasked(
    clone: Database, tmp_path: Path, name: str, kind: str
) -> None:
    account = await stored(clone, tmp_path, REQUIRED)
    folder = tmp_path / "out"
    folder.mkdir()
    path, target = folder / name, tmp_path / "target"
    match kind:
        case "file":
            path.write_text("mine")
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to(target)
    if kind == "link":
        target.write_text("mine")
    with pytest.raises(AlreadyExists, match=str(path)):
        await export_account(clone, account.id, folder=folder)
    assert names(folder) == [name]
    assert target.exists() == (kind == "link")
    if kind in ("file", "link"):
        assert path.read_text() == "mine"
    async with clone.session() as session:
        assert AuditAction.ACCOUNT_EXPORT not in await actions(session)


async def test_overwriting_replaces_files_and_what_links_lead_to(
    clone: Database, tmp_path: Path
) -> None:
    account = await stored(clone, tmp_path, REQUIRED | {"token": NEW})
    folder, target = tmp_path / "out", tmp_path / "target"
    folder.mkdir()
    target.write_text("mine")
    (folder / CONFIG_FILE).write_text("old")
    (folder / CONFIG_FILE).chmod(0o644)
    (folder / TOKEN_FILE).symlink_to(target)
    files = await export_account(clone, account.id, folder=folder, overwrite=True)
    assert [(mode(path), path.is_symlink()) for path in files] == [(0o600, False), (0o777, True)]
    assert (mode(target), target.read_text()) == (0o600, f"token={NEW}\n")
    assert names(folder) == [CONFIG_FILE, TOKEN_FILE]


async def test_a_pipe_is_written_into(clone: Database, tmp_path: Path) -> None:
    account = await stored(clone, tmp_path, REQUIRED | {"token": NEW})
    folder = tmp_path / "out"
    folder.mkdir()
    os.mkfifo(folder / TOKEN_FILE)
    reading = asyncio.create_task(asyncio.to_thread((folder / TOKEN_FILE).read_text))
    await export_account(clone, account.id, folder=folder)
    assert await reading == f"token={NEW}\n"
    assert (folder / TOKEN_FILE).is_fifo()


@pytest.mark.parametrize(
    ("lines", "with_token"), [(REQUIRED, True), (REQUIRED | {"token": NEW}, False)]
)
async def test_an_old_token_file_goes_where_no_token_is_exported(
    clone: Database, tmp_path: Path, lines: dict[str, str], *, with_token: bool
) -> None:
    account = await stored(clone, tmp_path, lines)
    (tmp_path / TOKEN_FILE).write_text(f"token={OLD}\n")
    with pytest.raises(AlreadyExists):
        await export_account(clone, account.id, folder=tmp_path, with_token=with_token)
    files = await export_account(
        clone, account.id, folder=tmp_path, overwrite=True, with_token=with_token
    )
    assert files == [tmp_path / CONFIG_FILE]
    assert not (tmp_path / TOKEN_FILE).exists()
    assert NEW not in (tmp_path / CONFIG_FILE).read_text()
    async with clone.session() as session:
        event = (await crud.audit_logs.get_recent_events(session)).items[0]
    assert event.details == {"files": [CONFIG_FILE]}


@pytest.mark.parametrize("lines", [REQUIRED, REQUIRED | {"token": NEW}])
async def test_no_half_of_a_pair_is_left_behind(
    clone: Database, tmp_path: Path, lines: dict[str, str]
) -> None:
    account = await stored(clone, tmp_path, lines)
    folder = tmp_path / "out"
    (folder / TOKEN_FILE).mkdir(parents=True)  # no file can take its place
    with pytest.raises(FileError, match=TOKEN_FILE):
        await export_account(clone, account.id, folder=folder, overwrite=True)
    assert names(folder) == [TOKEN_FILE]


async def test_a_full_disk_is_an_error_of_tiger_db(clone: Database, tmp_path: Path) -> None:
    account = await stored(clone, tmp_path, REQUIRED)
    folder = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(FileError, match=f"File too large: {folder}/") as caught:
            await export_account(clone, account.id, folder=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value, OSError)
    assert caught.value.__cause__ is None
    assert names(folder) == []


async def test_an_export_is_recorded(clone: Database, tmp_path: Path) -> None:
    account = await stored(clone, tmp_path, REQUIRED | {"token": NEW})
    await export_account(clone, account.id, folder=tmp_path)
    async with clone.session() as session:
        event = (await factories.events(session))[-1]
    assert event.action == AuditAction.ACCOUNT_EXPORT
    assert (event.severity, event.tiger_account_id) == (AuditSeverity.HIGH, account.id)
    assert event.details == {"files": [CONFIG_FILE, TOKEN_FILE]}


async def test_no_secret_leaves_unrecorded(clone: Database, tmp_path: Path) -> None:
    account = await stored(clone, tmp_path, REQUIRED)
    async with clone.session() as session:
        for statement in REFUSING_COMMITS.replace("$$;", "$$;\0").split("\0"):
            await session.execute(text(statement))
    folder = tmp_path / "out"
    with pytest.raises(Exception, match="full"):
        await export_account(clone, account.id, folder=folder)
    assert names(folder) == []


@pytest.mark.slow
async def test_what_cannot_be_exported(clone: Database, tmp_path: Path) -> None:
    async with clone.session() as session:
        plain_text = await factories.account(session)
        closed = await factories.account(session)
        await crud.accounts.close(session, closed.id)
        written = await actions(session)
    folder = tmp_path / "out"
    for account_id, error, reason in (
        (plain_text.id, InvalidValue, "not an RSA key"),
        (closed.id, InvalidState, "closed"),
        (uuid4(), NotFound, "no TigerAccount"),
    ):
        with pytest.raises(error, match=reason):
            await export_account(clone, account_id, folder=folder)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InvalidValue, match=f"{file} is not a folder"):
        await export_account(clone, plain_text.id, folder=file)
    assert not folder.exists()
    async with clone.session() as session:
        assert await actions(session) == written
