"""An MCP server whose clients need an API key. Run `PORT=8000 python examples/mcp_server.py`.

Clients connect to http://127.0.0.1:8000/mcp with `Authorization: Bearer tdb_test_...`.
"""

import asyncio
import os

from mcp.server import MCPServer
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import AnyHttpUrl

from tiger_db import (
    Actor,
    APIKeyScope,
    AuditAction,
    Database,
    KeyVerifier,
    acting_as,
    crud,
    errors,
)

PORT = int(os.environ.get("PORT", "8000"))
URL = f"http://127.0.0.1:{PORT}"


class APIKeys:
    """A TokenVerifier of the MCP SDK that verifies API keys."""

    def __init__(self, verifier: KeyVerifier) -> None:
        self.verifier = verifier

    async def verify_token(self, token: str) -> AccessToken | None:
        try:
            key = await self.verifier.authorize(token, scopes=[APIKeyScope.MCP_READ])
        except errors.AccessDenied:
            return None
        # A tool that trades must call verifier.authorize with its scope: a pause changes no scope.
        scopes = [scope.value for scope in APIKeyScope if key.has_scope(scope)]
        return AccessToken(
            token=token,
            client_id=key.key_prefix,
            scopes=scopes,
            expires_at=int(key.expires_at.timestamp()) if key.expires_at else None,
            subject=str(key.tiger_account_id) if key.tiger_account_id else None,
        )


async def main() -> None:
    async with Database() as database, KeyVerifier(database) as verifier:
        server = MCPServer(
            "tiger",
            token_verifier=APIKeys(verifier),
            auth=AuthSettings(
                issuer_url=AnyHttpUrl(URL),
                resource_server_url=AnyHttpUrl(f"{URL}/mcp"),
                required_scopes=[APIKeyScope.MCP_READ.value],
                validate_token_resource=False,  # an API key has no resource
            ),
        )

        @server.tool()
        async def account_names() -> list[str]:
            """Return the names of the broker accounts that the API key can access."""
            access = get_access_token()
            if access is None:  # cannot happen: the server requires an access token
                return []
            async with database.session() as session:
                page = await crud.accounts.list_accounts(session)
            return [
                account.account_name
                for account in page
                if access.subject in (None, str(account.id))
            ]

        @server.tool()
        async def place_order(symbol: str, quantity: int) -> str:
            """Place an order. The API key needs the scope trade:write."""
            access = get_access_token()
            if access is None:  # cannot happen: the server requires an access token
                raise ToolError("no API key")
            order = {"symbol": symbol, "quantity": quantity}
            try:
                with acting_as(Actor(user_id=access.client_id, user_type="api_key")):
                    async with crud.audit_logs.recorded(
                        database, action=AuditAction.TRADE_PLACE_ORDER, details=order
                    ) as event:
                        key = await verifier.authorize(
                            access.token, scopes=[APIKeyScope.TRADE_WRITE]
                        )
                        event.api_key_id, event.tiger_account_id = key.id, key.tiger_account_id
                        # Send the order to the broker here.
            except errors.TigerDBError as error:  # for example, trading is paused
                raise ToolError(str(error)) from None
            return "accepted"

        await server.run_streamable_http_async(port=PORT)


if __name__ == "__main__":
    asyncio.run(main())
