"""LISTEN after the loss of its connection."""

import asyncio

import pytest

from tests.support.waiting import until
from tiger_db import Settings
from tiger_db.connections import connect, listener
from tiger_db.connections.listener import listen
from tiger_db.errors import DatabaseUnavailable

CHANNEL = "tiger_db_test"
TERMINATE = """
SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'LISTEN%'
"""


@pytest.mark.slow
async def test_a_lost_connection_is_replaced_and_logged_once(
    clone_settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str | None] = []
    refused: list[Settings] = []

    async def refuse(settings: Settings) -> None:
        refused.append(settings)
        raise DatabaseUnavailable("not now")

    listening = asyncio.create_task(listen(clone_settings, CHANNEL, heard.append))
    other = await connect(clone_settings)
    try:
        await until(lambda: heard)
        assert heard == [None]
        with monkeypatch.context() as patch:
            patch.setattr(listener, "connect_directly", refuse)
            assert await other.fetchval(TERMINATE)
            await until(lambda: len(refused) == 3)
            missed = len(heard)
            assert missed > 1
        await until(lambda: len(heard) > missed)
        await other.execute("SELECT pg_notify($1, 'something')", clone_settings.channel(CHANNEL))
        await until(lambda: heard[-1])
        assert heard == [None] * (missed + 1) + ["something"]
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        await other.close()
    assert [record.getMessage() for record in caplog.records if record.name == "tiger_db"] == [
        f"LISTEN on the channel {CHANNEL} failed: the connection to the database was closed"
    ]
