"""MCP servers of the SDK and of FastMCP, served by uvicorn in this process, and their clients."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.support.waiting import until
from tiger_db import APIKeyScope, Database, KeyVerifier, crud, errors

KINDS = ["sdk", "fastmcp"]
ACCEPT = {"Accept": "application/json, text/event-stream"}


@dataclass
class Tools:
    """The tools of a server, and what they saw."""

    database: Database
    sessions: list[Any] = field(default_factory=list)

    async def account_names(self) -> list[str]:
        """Return the names of the accounts that the key can access."""
        from tiger_db.integrations.mcp import require_api_key  # noqa: PLC0415

        key = await require_api_key(APIKeyScope.ACCOUNT_READ)
        async with self.database.session() as session:
            page = await crud.accounts.list_accounts(session)
        return [account.account_name for account in page if key.can_access_account(account.id)]

    async def place_order(self, symbol: str, password: str = "") -> str:  # noqa: ARG002  # for the record
        """Place an order."""
        from tiger_db.integrations.mcp import require_api_key  # noqa: PLC0415

        await require_api_key(APIKeyScope.TRADE_WRITE)
        return symbol

    async def fail(self, kind: str) -> str:
        """Raise an error."""
        if kind == "crash":
            raise RuntimeError("SELECT secret FROM db.internal")
        if kind == "unavailable":
            raise errors.DatabaseUnavailable("db.internal:5432 is gone")
        if kind == "timeout":
            raise errors.WaitTimeout("db.internal")
        raise errors.NotFound("there is no account 7")


def new_app(kind: str, database: Database, *, recorded: bool, **options: Any) -> tuple[Any, Tools]:
    """Return the ASGI application of a server with the middleware, and its tools."""
    from tiger_db.integrations.mcp import APIKeyMiddleware, record_tool_calls  # noqa: PLC0415

    tools = Tools(database)
    verifier = KeyVerifier(database)
    server: Any
    context: Any
    if kind == "sdk":
        from mcp.server import MCPServer  # noqa: PLC0415
        from mcp.server.mcpserver import Context  # noqa: PLC0415

        server, context = MCPServer("tiger"), Context
    else:
        import fastmcp  # noqa: PLC0415

        server, context = fastmcp.FastMCP("tiger"), fastmcp.Context

    async def remember(ctx: Any) -> str:
        """Remember the session, so that a test can send messages on its stream."""
        tools.sessions.append(ctx.session)
        return "remembered"

    remember.__annotations__["ctx"] = context
    for tool in (tools.account_names, tools.place_order, tools.fail, remember):
        server.tool()(tool)
    if recorded:
        record_tool_calls(server, database)
    app = server.streamable_http_app() if kind == "sdk" else server.http_app()
    return APIKeyMiddleware(app, verifier, **options), tools


@asynccontextmanager
async def served(app: Any, *, path: str = "/mcp", **options: Any) -> AsyncIterator[str]:
    """Serve an application on loopback, and return the URL of `path`, by default of MCP."""
    import uvicorn  # noqa: PLC0415

    config = uvicorn.Config(
        app, log_level="error", proxy_headers=False, timeout_graceful_shutdown=1, **options
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        task = asyncio.create_task(server._serve([listening]))  # `serve` would catch signals
        await until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}{path}"
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def sdk_client(url: str, mode: str = "auto", **headers: str) -> AsyncIterator[Any]:
    from mcp.client.client import Client  # noqa: PLC0415
    from mcp.client.streamable_http import streamable_http_client  # noqa: PLC0415

    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield client


@asynccontextmanager
async def fastmcp_client(url: str, **headers: str) -> AsyncIterator[Any]:
    from fastmcp import Client  # noqa: PLC0415
    from fastmcp.client.transports import StreamableHttpTransport  # noqa: PLC0415

    async with Client(StreamableHttpTransport(url, headers=headers)) as client:
        yield client


CLIENTS: dict[str, Callable[..., Any]] = {
    "sdk": sdk_client,
    "sdk, legacy": lambda url, **headers: sdk_client(url, "legacy", **headers),
    "fastmcp": fastmcp_client,
}
