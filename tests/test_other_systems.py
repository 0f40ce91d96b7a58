"""Commands and the library on systems without POSIX, such as Windows."""

import asyncio
import json
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import COMMANDS, SECRETS
from tests.support.tiger_files import NUMBER, REQUIRED
from tests.support.without_posix import PROGRAM, USER
from tiger_db import Settings

EMBEDDED = (
    "error: the embedded PostgreSQL runs on Linux and macOS only: set DB_HOST or DATABASE_URL\n"
)


@asynccontextmanager
async def over_tcp(settings: Settings) -> AsyncIterator[dict[str, str]]:
    """Relay a TCP port to the test server. Return the environment of a process that uses it."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.TaskGroup() as both:
            theirs = await (
                asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
                if host.startswith("/")
                else asyncio.open_connection(host, port)
            )
            both.create_task(copy(reader, theirs[1]))
            both.create_task(copy(theirs[0], writer))

    (host, port), *_ = settings.addresses
    assert settings.url is not None
    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        yield {
            **SECRETS,
            "DB_HOST": "127.0.0.1",
            "DB_PORT": str(server.sockets[0].getsockname()[1]),
            "DB_NAME": settings.database,
            "DB_USER": settings.url.user or "",
            "DB_PASSWORD": settings.url.password or "",
        }


async def run(*commands: list[str], **env: str) -> list[tuple[int, str, str]]:
    """Run commands in one new process. Return the exit code, stdout and stderr of each command."""
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(json.dumps(commands).encode()), 60)
    assert process.returncode == 0
    return [(code, out, err) for code, out, err in json.loads(out)]


@pytest.mark.slow
async def test_the_command_line_works_without_posix(clone_settings: Settings) -> None:
    async with over_tcp(clone_settings) as env:
        shown, listed, embedded = await run(
            ["--help"], ["list-accounts", "--json"], ["start-embedded"], **env
        )
    assert (shown[0], shown[2]) == (0, "")
    assert (listed[0], json.loads(listed[1])["items"]) == (0, [])
    assert embedded == (1, "", EMBEDDED)


@pytest.mark.slow
async def test_commands_work_without_posix(clone_settings: Settings, tmp_path: Path) -> None:
    config, exported = tmp_path / "tiger.properties", tmp_path / "events.jsonl"
    config.write_text("".join(f"{name}={value}\n" for name, value in REQUIRED.items()))
    config.chmod(0o666)  # the mode that Windows shows for every file
    events = ["list-events", "--json"]
    commands = [
        ["init"],
        ["import-account", str(config)],
        ["create-api-key", "--name", "assistant", "--scopes", "mcp:read"],
        ["export-account", NUMBER, "--out", str(tmp_path)],
        ["export-events", "--out", str(exported)],
        ["run-refresh-worker", "--once"],
        ["doctor"],
        ["health-check"],
        events,
    ]
    async with over_tcp(clone_settings) as env:
        done = await run(*commands, **env)
    for command, (code, _, err) in zip(commands, done, strict=True):
        assert code == 0, (command, err)
        assert "chmod" not in err
    shown: dict[str, Any] = json.loads(done[commands.index(events)][1])
    assert {event["user_id"] for event in shown["items"]} == {USER}
    assert exported.read_text().count("\n") == len(shown["items"]) > 1


@pytest.mark.slow
async def test_the_help_of_each_command_works_without_posix() -> None:
    for name, (code, out, err) in zip(
        COMMANDS, await run(*([name, "--help"] for name in COMMANDS)), strict=True
    ):
        assert (code, err) == (0, ""), err
        assert f"Usage: tiger-db {name}" in out


@pytest.mark.slow
async def test_without_posix_a_server_must_be_named() -> None:
    folder = "DB_HOST: a path is the folder of a Unix socket, which Python does not support"
    assert await run(["list-accounts"], ["doctor"]) == [(1, "", EMBEDDED)] * 2
    ((code, _, err),) = await run(["list-accounts"], DB_HOST="/tmp")
    assert code == 1
    assert folder in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("run-refresh-worker", signal.SIGTERM, 0),
        ("run-refresh-worker", signal.SIGINT, 0),
        ("list-events --follow", signal.SIGTERM, 143),
    ],
)
async def test_signals_end_commands_without_posix(
    clone_settings: Settings, command: str, number: int, code: int
) -> None:
    """The event loops of Windows have no signal handlers."""
    async with over_tcp(clone_settings) as env:
        process = await asyncio.create_subprocess_exec(
            *PROGRAM, *command.split(), env=env, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        assert b"press Ctrl-C to stop" in await process.stderr.readline()
        process.send_signal(number)
        await asyncio.wait_for(process.wait(), 30)
    assert process.returncode == code
