import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests.support import factories
from tests.support.serving import Serve
from tiger_db import APIKeyScope, AuditAction, Database, crud
from tiger_db.crud.api_keys.key_format import new_key

if TYPE_CHECKING:
    from mcp.client.client import Client


@asynccontextmanager
async def connected(url: str, raw_key: str) -> AsyncIterator["Client"]:
    """A client of the MCP SDK with this key."""
    from mcp.client.client import Client  # noqa: PLC0415  # takes a second, which `make test` saves
    from mcp.client.streamable_http import streamable_http_client  # noqa: PLC0415

    headers = {"Authorization": f"Bearer {raw_key}"}
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
    ):
        yield client


async def names(url: str, raw_key: str) -> object:
    """What the tool says to a client with this key."""
    async with connected(url, raw_key) as client:
        tools = await client.list_tools()
        assert [tool.name for tool in tools.tools] == ["account_names", "place_order"]
        result = await client.call_tool("account_names", {})
        return result.structured_content


async def order(url: str, raw_key: str) -> tuple[bool | None, str]:
    """Whether the order tool answers with an error, and its text."""
    async with connected(url, raw_key) as client:
        result = await client.call_tool("place_order", {"symbol": "AAPL", "quantity": 1})
        assert result.content[0].type == "text"
        return result.is_error, result.content[0].text


async def refusal(url: str, raw_key: str | None) -> tuple[int, str]:
    """What a request without the SDK gets, before any MCP: the SDK's client hides the status."""
    headers = {"Authorization": f"Bearer {raw_key}"} if raw_key is not None else {}
    async with httpx2.AsyncClient(headers=headers) as http:
        answer = await http.post(f"{url}/mcp", json={})
    return answer.status_code, answer.text


@pytest.mark.slow
async def test_a_client_needs_a_key(clone: Database, serve: Serve) -> None:
    from mcp import MCPError  # noqa: PLC0415

    async with clone.session() as session:
        await factories.account(session, account_name="Main")
        key, raw_key = await factories.api_key(
            session, expires_at=datetime.now(UTC) + timedelta(hours=1)
        )
        _, scopeless = await factories.api_key(session, scopes=[APIKeyScope.TRADE_ADMIN])
    async with serve("mcp_server.py") as url:
        assert await names(url, raw_key) == {"result": ["Main"]}
        with pytest.RaisesGroup(MCPError, flatten_subgroups=True):
            await names(url, raw_key[:-1])
        status, body = await refusal(url, None)
        assert status == 401
        for text in ("nonsense", new_key("test").raw_key):
            assert await refusal(url, text) == (status, body)
        assert (await refusal(url, scopeless))[0] == 403
        async with connected(url, raw_key) as client:
            assert (await client.call_tool("account_names", {})).structured_content
            async with clone.session() as session:
                await crud.api_keys.revoke(session, key.id)
            with pytest.raises(MCPError):
                async with asyncio.timeout(1):
                    while True:  # it is honoured within milliseconds, but not within none
                        await client.call_tool("account_names", {})
        assert await refusal(url, raw_key) == (status, body)


@pytest.mark.slow
async def test_two_users_see_and_trade_their_own_accounts(clone: Database, serve: Serve) -> None:
    users = {}
    async with clone.session() as session:
        for name in ("Ann", "Bob"):
            account = await factories.account(session, account_name=name)
            _, users[name] = await factories.api_key(
                session,
                scopes=[APIKeyScope.MCP_READ, APIKeyScope.TRADE_WRITE],
                tiger_account_id=account.id,
            )
    async with serve("mcp_server.py") as url:
        for name, raw_key in users.items():
            assert await names(url, raw_key) == {"result": [name]}
            assert await order(url, raw_key) == (False, "accepted: 1 AAPL")
        async with clone.session() as session:
            await crud.api_keys.pause(session, reason="stop")
        for name, raw_key in users.items():
            assert await names(url, raw_key) == {"result": [name]}
            assert await order(url, raw_key) == (True, "trading is paused: stop")


@pytest.mark.slow
async def test_a_pause_stops_orders(clone: Database, serve: Serve) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(
            session, scopes=[APIKeyScope.MCP_READ, APIKeyScope.TRADE_WRITE]
        )
        _, reader = await factories.api_key(session, scopes=[APIKeyScope.MCP_READ])
    async with serve("mcp_server.py") as url:
        assert await order(url, raw_key) == (False, "accepted: 1 AAPL")
        failed, text = await order(url, reader)
        assert failed
        assert "trade:write" in text
        async with clone.session() as session:
            await crud.api_keys.pause(session, reason="stop")
        failed, text = await order(url, raw_key)
        assert failed
        assert "trading is paused: stop" in text
        async with clone.session() as session:
            await crud.api_keys.resume(session)
        assert await order(url, raw_key) == (False, "accepted: 1 AAPL")
    async with clone.session() as session:
        events = await crud.audit_logs.search(
            session, action=AuditAction.MCP_TOOL_CALL, user_id=key.key_prefix
        )
    assert {event.api_key_id for event in events} == {key.id}
    assert [(event.result, event.error_code) for event in events] == [
        ("success", None),
        ("pending", None),
        ("error", "TradingPaused"),
        ("pending", None),
        ("success", None),
        ("pending", None),
    ]
