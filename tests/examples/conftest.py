"""The examples, each as a process of its own."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.serving import Serve
from tiger_db.settings import Settings
from tiger_db.testing import environment_of

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def serve(clone_settings: Settings, tmp_path: Path) -> Serve:
    """Starts an example; what is yielded is its address."""

    @asynccontextmanager
    async def serving(example: str) -> AsyncIterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(  # noqa: ASYNC220  # starting one takes no time
                [sys.executable, EXAMPLES / example],
                env=os.environ | environment_of(clone_settings) | {"PORT": str(port)},
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                await _until_it_listens(port, process)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()

    return serving


async def _until_it_listens(port: int, process: "subprocess.Popen[bytes]") -> None:
    async with asyncio.timeout(30):
        while process.poll() is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return
    pytest.fail("the example has ended")
