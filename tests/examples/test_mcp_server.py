import httpx2
import pytest
from mcp import MCPError
from mcp.client.client import Client
from mcp.client.streamable_http import streamable_http_client

from tests import factories
from tests.examples.conftest import Serve
from tiger_db import Database, crud


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


async def test_a_client_needs_a_key(clone: Database, serve: Serve) -> None:
    async with clone.session() as session:
        await factories.account(session, account_name="Main")
        key, raw_key = await factories.api_key(session)
    async with serve("mcp_server.py") as url:
        assert await names(url, raw_key) == {"result": ["Main"]}
        with pytest.RaisesGroup(MCPError, flatten_subgroups=True):
            await names(url, raw_key[:-1])
        headers = {"Authorization": f"Bearer {raw_key}"}
        async with (
            httpx2.AsyncClient(headers=headers) as http,
            Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
        ):
            assert (await client.call_tool("account_names", {})).structured_content
            async with clone.session() as session:
                await crud.api_keys.revoke(session, key.id)
            with pytest.raises(MCPError):
                for _ in range(100):  # it is honoured within milliseconds, but not within none
                    await client.call_tool("account_names", {})
