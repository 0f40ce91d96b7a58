"""Attempts to connect to several hosts at once leave no connection open."""

import asyncio
from typing import Any

import pytest

from tiger_db import Database, Settings, connections


async def test_a_caller_cancelled_after_the_first_answer_leaves_no_connection_open(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = await connections.connect(clone.settings)
    ending, ended = asyncio.Event(), asyncio.Event()

    # With real hosts, the moment between the first answer and the end of the others is too short.
    async def to_host(_: Settings, arguments: dict[str, Any]) -> object:
        if arguments["host"] == "primary":
            return connected
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await ended.wait()  # as a TLS connection that is closed slowly
        return None

    monkeypatch.setattr(connections, "_connect_to_host", to_host)
    arguments: Any = {"host": ["silent", "primary"], "port": [1, 2]}
    connecting = asyncio.create_task(connections._connect_to_first(clone.settings, arguments))
    await ending.wait()
    connecting.cancel()
    ended.set()
    await asyncio.wait([connecting])
    assert connected.is_closed() if connecting.cancelled() else connecting.result() is connected
    connected.terminate()
