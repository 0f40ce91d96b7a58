"""Output files at paths of files, links, pipes and devices. The tests create the devices."""

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devices import device
from tests.support.tiger_files import mode, names
from tiger_db.errors import AlreadyExists, InvalidValue
from tiger_db.files import output_files


def write(*paths: Path, overwrite: bool = False, text: str = "new") -> None:
    with output_files(*paths, overwrite=overwrite) as files:
        for file in files:
            file.write(text)


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


# Files


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_file_appears_when_it_is_complete(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "out"
    with output_files(path, overwrite=overwrite) as (file,):
        file.write("é\n")
        file.flush()
        assert not path.exists()
        assert [mode(unfinished) for unfinished in tmp_path.iterdir()] == [0o600]
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert (mode(path), names(tmp_path)) == (0o600, ["out"])


def test_a_file_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    path.chmod(0o644)
    with pytest.raises(AlreadyExists, match=f"{path} already exists"):
        write(path)
    assert path.read_text() == "old"
    write(path, overwrite=True)
    assert (path.read_text(), mode(path), names(tmp_path)) == ("new", 0o600, ["out"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_failure_or_cancellation_leaves_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    old, new = tmp_path / "old", tmp_path / "fresh"
    old.write_text("old")
    with pytest.raises(error), output_files(old, new, overwrite=True) as (file, _):
        file.write("half")
        file.flush()
        raise error
    assert (old.read_text(), names(tmp_path)) == ("old", ["old"])


def test_a_file_created_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        pytest.raises(AlreadyExists, match=str(second)),
        output_files(first, second, overwrite=False),
    ):
        second.write_text("mine")
    assert (second.read_text(), names(tmp_path)) == ("mine", ["second"])
    for overwrite in (False, True):
        path = tmp_path / f"pipe {overwrite}"
        with pytest.raises(AlreadyExists, match=str(path)), output_files(path, overwrite=overwrite):
            os.mkfifo(path)
        assert path.is_fifo()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As FAT is, which cannot be mounted everywhere."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "out"
    write(path)
    assert path.read_text() == "new"
    path.unlink()
    with pytest.raises(AlreadyExists), output_files(path, overwrite=False):
        path.write_text("mine")
    assert (path.read_text(), names(tmp_path)) == ("mine", ["out"])


def test_the_removed_file_exists_until_the_new_files_exist(tmp_path: Path) -> None:
    new, stale, pipe = (tmp_path / name for name in ("new", "stale", "pipe"))
    stale.write_text("old")
    with pytest.raises(AlreadyExists), output_files(new, overwrite=False, obsolete=stale):
        new.write_text("mine")
    assert stale.read_text() == "old"
    with output_files(new, overwrite=True, obsolete=stale):
        pass
    os.mkfifo(pipe)
    with output_files(new, overwrite=True, obsolete=pipe):
        pass
    assert names(tmp_path) == ["new", "pipe"]


def test_an_error_names_the_path_that_was_given(tmp_path: Path) -> None:
    for path, overwrite in ((tmp_path / "none" / "out", False), (tmp_path, True)):
        with pytest.raises(OSError) as caught:  # noqa: PT011  # what it names is looked at
            write(path, overwrite=overwrite)
        assert caught.value.filename == str(path)
    with pytest.raises(AlreadyExists):
        write(tmp_path)


# Links


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far/target", tmp_path / "link"
    target.write_text("old")
    (tmp_path / "far/middle").symlink_to("target")
    link.symlink_to("far/middle")
    with pytest.raises(AlreadyExists, match=str(link)):
        write(link)
    write(link, overwrite=True)
    assert (target.read_text(), mode(target)) == ("new", 0o600)
    assert (link.is_symlink(), names(tmp_path), names(tmp_path / "far")) == (
        True, ["far", "link"], ["middle", "target"],
    )  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_broken_or_circular_link_is_refused(tmp_path: Path, overwrite: bool) -> None:
    link, circle = tmp_path / "link", tmp_path / "circle"
    link.symlink_to("target")
    circle.symlink_to("circle")
    with pytest.raises(AlreadyExists, match=f"{link} is a symbolic link whose target is missing"):
        write(link, overwrite=overwrite)
    with pytest.raises(OSError, match="symbolic links"):
        write(circle, overwrite=overwrite)
    assert names(tmp_path) == ["circle", "link"]


# What is no file


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_device_is_written_to(tmp_path: Path, *, overwrite: bool, linked: bool) -> None:
    null, full = (device(tmp_path / str(n), stat.S_IFCHR, 1, n) for n in (3, 7))
    before = {path: path.lstat() for path in (null, full)}
    if linked:
        (tmp_path / "link").symlink_to(full)
    write(null, overwrite=overwrite)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "link" if linked else full, overwrite=overwrite)
    assert {path: path.lstat()[:3] for path in before} == {p: s[:3] for p, s in before.items()}
    assert names(tmp_path) == ["3", "7", "link"][: 2 + linked]


def test_a_disk_is_never_replaced_and_written_to_only_with_overwrite(tmp_path: Path) -> None:
    disk = device(tmp_path / "disk", stat.S_IFBLK, 240, 77)  # for experiments: there is none
    with pytest.raises(AlreadyExists, match=str(disk)):
        write(disk)
    with pytest.raises(OSError, match=r"No such device|not permitted|denied"):
        write(disk, overwrite=True)
    assert disk.is_block_device()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_is_written_to_when_it_has_a_reader(tmp_path: Path, overwrite: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = threading.Thread(target=write, args=[pipe], kwargs={"overwrite": overwrite})
    writing.start()
    assert pipe.read_text() == "new"
    writing.join(10)
    assert (pipe.is_fifo(), names(tmp_path)) == (True, ["pipe"])


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its path may be longer than a socket's
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for overwrite in (False, True):
            with pytest.raises(InvalidValue, match="socket is a socket"):
                write(Path("socket"), overwrite=overwrite)
    assert Path("socket").is_socket()


def test_an_inherited_descriptor_is_written_to(tmp_path: Path) -> None:
    """Where it stands, even if it is a file's: as `>>` has opened it."""
    link = tmp_path / "link"
    reader, pipe = os.pipe()
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"mine ")
    try:
        for number in (pipe, file):
            link.symlink_to(f"/dev/fd/{number}")
            for path in (Path(f"/dev/fd/{number}"), Path(f"/proc/self/fd/{number}"), link):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    write(path)  # this process's own, by which it may talk to a database
                fcntl.fcntl(number, fcntl.F_SETFD, 0)
                write(path)
                fcntl.fcntl(number, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            link.unlink()
        assert os.read(reader, 100) == b"new" * 3
        assert (tmp_path / "file").read_text() == "mine newnewnew"
    finally:
        for number in (reader, pipe, file):
            os.close(number)
    with pytest.raises(OSError, match=r"Bad file descriptor.*/dev/fd/999"):
        write(Path("/dev/fd/999"))
    assert names(tmp_path) == ["file"]
