"""The private files of the home folder: the password and other secrets."""

import secrets
import stat
from functools import partial
from pathlib import Path

import pytest

from tests.support.embedded_servers import at_once, unfinished
from tiger_db.embedded import load_or_create_secret, start, stop
from tiger_db.errors import EmbeddedError
from tiger_db.files import UNFINISHED
from tiger_db.settings import Settings


@pytest.mark.slow
def test_password_is_never_on_a_command_line(settings: Settings) -> None:
    server = start(settings)
    password = server.connect_args(settings)["password"].get_secret_value()
    assert password
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if password.encode() in path.read_bytes()] == ["password"]


@pytest.mark.slow
def test_lost_password(settings: Settings, home: Path) -> None:
    server = start(settings)
    (home / "password").unlink()
    with pytest.raises(EmbeddedError, match="password"):
        server.connect_args(settings)
    stop(settings)
    with pytest.raises(EmbeddedError, match="password is missing"):
        start(settings)


def _kept_key(settings: Settings) -> str:
    return load_or_create_secret(settings, "key", partial(secrets.token_hex, 32))


@pytest.mark.slow
def test_ten_processes_get_the_same_secret(settings: Settings, home: Path) -> None:
    values = at_once(_kept_key, settings)
    kept = (home / "key").read_text()
    assert set(values) == {kept}
    assert len(kept) == 64
    assert unfinished(home) == []


def test_load_or_create_secret(settings: Settings, home: Path) -> None:
    def fail() -> str:
        raise ValueError("no entropy")

    with pytest.raises(ValueError, match="no entropy"):
        load_or_create_secret(settings, "key", fail)
    assert not (home / "key").exists()
    # A file that a crash left.
    (home / f"{UNFINISHED}key").write_text("hal")

    assert load_or_create_secret(settings, "key", lambda: "whole\nkey ä") == "whole\nkey ä"
    assert load_or_create_secret(settings, "key", fail) == "whole\nkey ä"
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert unfinished(home) == []

    (home / "key").chmod(0o640)
    with pytest.raises(EmbeddedError, match="0600"):
        load_or_create_secret(settings, "key", fail)

    (home / "link").symlink_to(home / "key")
    (home / "binary").write_bytes(b"\xff\xfe")
    (home / "binary").chmod(0o600)
    for name in ("link", "binary", "data"):
        (home / "data").mkdir(exist_ok=True)
        with pytest.raises(EmbeddedError, match=name):
            load_or_create_secret(settings, name, fail)
