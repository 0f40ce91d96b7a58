"""Fixtures: a primary with a standby for each test."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clusters import Cluster, Server, first_server, free_port, run, standby_of
from tiger_db.connections import maintenance_engine
from tiger_db.migrations import upgrade
from tiger_db.testing import servers


@pytest.fixture(scope="module")
def seed() -> Iterator[Path]:
    """The data folder of a migrated server that is stopped."""
    home = servers.short_folder()
    server = first_server(home)

    async def migrate() -> None:
        settings = Cluster(server, server).settings()
        async with maintenance_engine(settings) as engine:
            await upgrade(engine)

    asyncio.run(migrate())
    run("pg_ctl", "-D", str(server.data), "-m", "fast", "-w", "stop")
    yield server.data
    shutil.rmtree(home)


@pytest.fixture
def cluster(seed: Path) -> Iterator[Cluster]:
    """A primary and its asynchronous standby."""
    home = servers.short_folder()
    primary = Server(home / "primary", free_port())
    shutil.copytree(seed, primary.data)
    for path in (home, primary.data, *primary.data.rglob("*")):
        shutil.chown(path, seed.owner())
    servers_here = [primary]
    try:
        primary.start()
        servers_here.append(standby_of(primary))
        yield Cluster(*servers_here)
    finally:
        for server in servers_here:
            server.stop()
        shutil.rmtree(home)
