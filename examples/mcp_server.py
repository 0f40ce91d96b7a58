"""An MCP server whose clients need an API key. Run `PORT=8000 python examples/mcp_server.py`.

Clients connect to http://127.0.0.1:8000/mcp with `Authorization: Bearer tdb_test_...`. Two users
with a key each, which are bound to their accounts, see and trade their own account only:

    tiger-db create-api-key --name ann --account ACCOUNT_ID --scopes mcp:read,trade:write
    tiger-db create-api-key --name bob --account ANOTHER_ID --scopes mcp:read,trade:write
    tiger-db pause --reason "the assistant sells everything"
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from mcp.server import MCPServer

from tiger_db import APIKeyScope, Database, KeyVerifier, crud
from tiger_db.integrations.mcp import APIKeyMiddleware, record_tool_calls, require_api_key

database = Database()
verifier = KeyVerifier(database)


@asynccontextmanager
async def lifespan(_server: object) -> AsyncIterator[None]:
    async with database, verifier:
        yield


server = MCPServer("tiger", lifespan=lifespan)
record_tool_calls(server, database)


@server.tool()
async def account_names() -> list[str]:
    """Return the names of the broker accounts that the API key can access."""
    key = await require_api_key()
    async with database.session() as session:
        page = await crud.accounts.list_accounts(session)
    return [account.account_name for account in page if key.can_access_account(account.id)]


@server.tool()
async def place_order(symbol: str, quantity: int) -> str:
    """Place an order. The API key needs the scope trade:write."""
    await require_api_key(APIKeyScope.TRADE_WRITE)
    # Send the order to the broker here.
    return f"accepted: {quantity} {symbol}"


if __name__ == "__main__":
    app = APIKeyMiddleware(server.streamable_http_app(), verifier)
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
