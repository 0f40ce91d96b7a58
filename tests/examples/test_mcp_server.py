import asyncio
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from mcp import MCPError
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

from tests.support import factories
from tests.support.serving import Serve
from tiger_db import APIKeyScope, Database, crud
from tiger_db.crud.api_keys.key_format import new_key


async def names(url: str, raw_key: str) -> object:
    """What the tool says to a client with this key."""
    headers = {"Authorization": f"Bearer {raw_key}"}
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
    ):
        tools = await client.list_tools()
        assert [tool.name for tool in tools.tools] == ["account_names"]
        result = await client.call_tool("account_names", {})
        return result.structured_content


async def refusal(url: str, raw_key: str | None) -> tuple[int, str]:
    """What a request without the SDK gets, before any MCP: the SDK's client hides the status."""
    headers = {"Authorization": f"Bearer {raw_key}"} if raw_key is not None else {}
    async with httpx2.AsyncClient(headers=headers) as http:
        answer = await http.post(f"{url}/mcp", json={})
    return answer.status_code, answer.text


@pytest.mark.slow
async def test_a_client_needs_a_key(clone: Database, serve: Serve) -> None:
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
        for text in ("nonsense", new_key("test").raw_key, scopeless):
            assert await refusal(url, text) == (status, body)
        headers = {"Authorization": f"Bearer {raw_key}"}
        async with (
            httpx2.AsyncClient(headers=headers) as http,
            Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
        ):
            assert (await client.call_tool("account_names", {})).structured_content
            async with clone.session() as session:
                await crud.api_keys.revoke(session, key.id)
            with pytest.raises(MCPError):
                async with asyncio.timeout(1):
                    while True:  # it is honoured within milliseconds, but not within none
                        await client.call_tool("account_names", {})
        assert await refusal(url, raw_key) == (status, body)


@pytest.mark.slow
async def test_a_key_of_one_account_sees_no_other(clone: Database, serve: Serve) -> None:
    async with clone.session() as session:
        mine = await factories.account(session, account_name="Mine")
        await factories.account(session, account_name="Another")
        _, raw_key = await factories.api_key(session, tiger_account_id=mine.id)
    async with serve("mcp_server.py") as url:
        assert await names(url, raw_key) == {"result": ["Mine"]}
