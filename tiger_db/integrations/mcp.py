"""API keys and audit events for MCP servers over streamable HTTP. Needs the extra `mcp`.

The servers are `MCPServer` of the MCP SDK, and `FastMCP` of the package fastmcp.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import UUID

import anyio
import anyio.lowlevel
from pydantic_core import from_json

from tiger_db.actor import Actor, acting_as
from tiger_db.crud.audit_logs.recording import recorded
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, TigerDBError
from tiger_db.integrations.http import (
    header_values,
    parse_proxies,
    public_error,
    raw_key_of,
    request_actor,
    user_agent_of,
)
from tiger_db.key_verifier import KeyVerifier
from tiger_db.models import APIKey, APIKeyScope, AuditAction, AuditResult
from tiger_db.models.event_sanitizer import bounded_json

try:
    from mcp.server import MCPServer
    from mcp.server.auth.middleware.auth_context import AuthContextMiddleware
    from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
    from mcp.server.auth.provider import AccessToken
    from mcp.server.mcpserver import Context
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp.server.transport_security import (
        DEFAULT_MAX_REQUEST_BODY_SIZE,
        RequestBodyLimitMiddleware,
    )
    from mcp_types import INTERNAL_ERROR, INVALID_REQUEST, CallToolResult, InputRequiredResult
    from starlette.authentication import AuthCredentials
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError:
    raise ImportError(
        "tiger_db.integrations.mcp needs the MCP SDK: install tiger_db with the extra `mcp`"
    ) from None

if TYPE_CHECKING:
    from fastmcp import FastMCP
    from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext

__all__ = ["APIKeyMiddleware", "record_tool_calls", "require_api_key"]
T = TypeVar("T")
_logger = logging.getLogger("tiger_db")
_MAX_ARGUMENT_CHARACTERS = 50_000  # of a tool call, in its audit events
_MAX_ID_CHARACTERS = 100  # maximum length of a message id that an answer repeats
# Requests that run no code of the application. All others are uses of the API key.
_FREE_METHODS = {
    "initialize", "ping", "server/discover", "logging/setLevel", "subscriptions/listen",
    "tools/list", "resources/list", "resources/templates/list", "prompts/list",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Caller:
    """The API key of a request, and what is needed to authorize it again."""

    verifier: KeyVerifier
    raw_key: str = field(repr=False)
    ip_address: str | IPv4Address | IPv6Address | None
    user_agent: str | None
    key: APIKey | None = None

    async def authorize(
        self,
        scopes: Iterable[APIKeyScope],
        *,
        account_id: UUID | None = None,
        count_use: bool = False,
    ) -> APIKey:
        return await self.verifier.authorize(
            self.raw_key,
            scopes=scopes,
            account_id=account_id,
            ip_address=self.ip_address,
            user_agent=self.user_agent,
            count_use=count_use,
        )


_caller: ContextVar[_Caller | None] = ContextVar("tiger_db_mcp_caller", default=None)


class APIKeyMiddleware:
    """ASGI middleware that requires an API key for each request of an MCP server.

    The client sends the key as `Authorization: Bearer` or `X-API-Key`. Each request needs a valid
    key with `scopes`. A request that can run code of the application, such as a tool call, is one
    use of the key. `initialize`, `ping`, `logging/setLevel`, lists and notifications are no uses.
    An MCP session can be used with the key that opened it only. A stream of the server's messages
    ends when its key is refused.

    `trusted_proxies` are the IP addresses and networks of the proxies in front of the server.

    Raises:
        ConfigurationError: `trusted_proxies` has an invalid address or network.
    """

    def __init__(
        self,
        app: ASGIApp,
        verifier: KeyVerifier,
        *,
        scopes: Iterable[APIKeyScope] = (APIKeyScope.MCP_READ,),
        trusted_proxies: Iterable[str] = (),
    ) -> None:
        self.app = AuthContextMiddleware(app)  # for `get_access_token` of the MCP SDK
        self.verifier = verifier
        self.scopes = tuple(scopes)
        self.trusted = parse_proxies(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._authorize(scope, receive, send)
        else:  # MCP has no WebSockets
            await send({"type": "websocket.close", "code": 1008})

    async def _authorize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request whose key is not valid before its body is read, which can be slow."""
        actor = request_actor(scope, self.trusted)
        caller = _Caller(self.verifier, raw_key_of(scope), actor.ip_address, user_agent_of(scope))
        try:
            key = await caller.authorize(self.scopes)
        except TigerDBError as error:
            await _refuse(error, None, scope, receive, send)
            return
        actor = replace(
            actor,
            user_id=key.key_prefix,
            user_type="api_key",
            api_key_id=key.id,
            session_id=next(iter(header_values(scope, "mcp-session-id")), None),
        )
        user = _user(key)
        scope = {**scope, "user": user, "auth": AuthCredentials(user.scopes)}
        serve = partial(self._serve, actor, replace(caller, key=key))
        # It reads the whole body, so that `_serve` receives the body in one message.
        limited = RequestBodyLimitMiddleware(serve, DEFAULT_MAX_REQUEST_BODY_SIZE)
        await limited(scope, receive, send)

    async def _serve(
        self, actor: Actor, caller: _Caller, scope: Scope, receive: Receive, send: Send
    ) -> None:
        messages = deque([await receive()])
        message = _parse(messages[0].get("body", b"")) if scope["method"] == "POST" else {}
        method = message.get("method")
        if scope["method"] == "POST" and _is_use(message):
            try:
                await caller.authorize(self.scopes, count_use=True)
            except TigerDBError as error:
                await _refuse(error, message.get("id"), scope, receive, send)
                return

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        async def recheck() -> None:
            await caller.authorize(self.scopes)

        token = _caller.set(caller)
        try:
            with acting_as(actor):
                if scope["method"] == "GET" or method == "subscriptions/listen":
                    await _stream(self.app, scope, replay, send, recheck)
                else:
                    await self.app(scope, replay, send)
        finally:
            _caller.reset(token)


def _parse(body: bytes) -> Mapping[str, Any]:
    """Return the message of a request.

    A body that is no JSON object is treated like a tool call: it is counted as a use, because the
    server can have another parser that accepts the body.
    """
    try:
        message = from_json(body)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else {"method": "tools/call"}


def _is_use(message: Mapping[str, Any]) -> bool:
    """Return whether a message can run code of the application, as a request of the client."""
    method = message.get("method")
    if method is None:  # an answer to a request of the server
        return "result" not in message and "error" not in message
    if not isinstance(method, str):
        return True
    is_notification = method.startswith("notifications/") and "id" not in message
    return not is_notification and method not in _FREE_METHODS


def _user(key: APIKey) -> AuthenticatedUser:
    """Return the user of the MCP SDK, which binds each session to one user."""
    token = AccessToken(
        token=key.key_prefix,  # not the secret
        client_id=str(key.id),
        scopes=[scope.value for scope in APIKeyScope if key.has_scope(scope)],
        expires_at=int(key.expires_at.timestamp()) if key.expires_at else None,
        subject=str(key.tiger_account_id) if key.tiger_account_id else None,
    )
    return AuthenticatedUser(token)


async def _refuse(
    error: TigerDBError, message_id: object, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer a request with an error of JSON-RPC, which clients show to the user."""
    if not _is_short_id(message_id):
        message_id = None
    shown = public_error(error)
    if shown.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _logger.error("an MCP request failed", exc_info=error)
    wait = shown.headers.get("Retry-After")
    details: dict[str, object] = {
        "code": INTERNAL_ERROR if shown.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        else INVALID_REQUEST,
        "message": f"{shown.message} Repeat the request after {wait} s." if wait else shown.message,
        "data": {"code": shown.code},
    }  # fmt: skip
    body = {"jsonrpc": "2.0", "id": message_id, "error": details}
    await JSONResponse(body, shown.status, shown.headers)(scope, receive, send)


def _is_short_id(value: object) -> bool:
    """Return whether the id of a message can be repeated in an answer, as 64 bits or a short text.

    A client can send an id that JSON cannot express, such as NaN, or that is megabytes long.
    """
    if isinstance(value, str):
        return len(value) <= _MAX_ID_CHARACTERS and value.isprintable()
    return type(value) is int and -(2**63) <= value < 2**63


async def _stream(
    app: ASGIApp,
    scope: Scope,
    receive: Receive,
    send: Send,
    recheck: Callable[[], Awaitable[None]],
) -> None:
    """Serve a stream of the server's messages until the API key is refused.

    The key is checked before each message. A silent stream has a ping every 15 seconds.
    """

    async def checked_send(message: Message) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            try:
                await recheck()
            except TigerDBError:
                streaming.cancel()
                await anyio.lowlevel.checkpoint()
        await send(message)

    with anyio.CancelScope() as streaming:
        await app(scope, receive, checked_send)
    if streaming.cancelled_caught:
        await send({"type": "http.response.body", "body": b""})


async def require_api_key(*scopes: APIKeyScope, account_id: UUID | None = None) -> APIKey:
    """Authorize the API key of a tool call for scopes and an account, and return the APIKey.

    No further use is counted. A denial is on record, and is the error of the tool call. Call
    `require_api_key` in an `async` tool of a server with `APIKeyMiddleware`.

    Raises:
        AccessDenied, DatabaseUnavailable: as `KeyVerifier.authorize`.
        ConfigurationError: the tool call has not passed through `APIKeyMiddleware`.
    """
    caller = _caller.get()
    if caller is None:
        raise ConfigurationError("the server needs tiger_db.integrations.mcp.APIKeyMiddleware")
    return await caller.authorize(scopes, account_id=account_id)


def record_tool_calls(server: "MCPServer[Any] | FastMCP[Any]", database: Database) -> None:
    """Put each tool call of a server on record, and show errors of tiger_db to the client.

    Each tool call is an intent and an outcome event `mcp:tool_call`, as with `recorded`: with the
    tool (`resource_id`), the arguments (`details`, secrets are masked), the API key, the outcome
    and the duration. A tool runs only if the intent was recorded. If a tool raises a
    `TigerDBError`, the tool call returns the message as an error that an assistant can read.
    """
    if isinstance(server, MCPServer):
        # The middleware of an MCPServer sees no exceptions of tools, but `call_tool` raises them.
        call_tool = server.call_tool

        async def recorded_call(
            name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
        ) -> CallToolResult | InputRequiredResult:
            async def call() -> CallToolResult | InputRequiredResult:
                return await call_tool(name, arguments, context)

            return await _record(database, name, arguments, call, ToolError)

        server.call_tool = recorded_call  # type: ignore[method-assign]
        return

    from fastmcp.exceptions import ToolError as FastMCPToolError  # noqa: PLC0415  # optional

    async def middleware(
        context: "MiddlewareContext[Any]", call_next: "CallNext[Any, Any]"
    ) -> object:
        if context.method != "tools/call":
            return await call_next(context)
        name, arguments = context.message.name, context.message.arguments
        return await _record(
            database, name, arguments or {}, lambda: call_next(context), FastMCPToolError
        )

    # FastMCP calls each middleware as a function, but its type is a class.
    server.add_middleware(cast("Middleware", middleware))


async def _record(
    database: Database,
    name: str,
    arguments: Mapping[str, object],
    call: Callable[[], Awaitable[T]],
    tool_error: type[Exception],
) -> T:
    """Call a tool between the two events of `recorded`."""
    caller = _caller.get()
    key = caller.key if caller is not None else None
    try:
        async with recorded(
            database,
            action=AuditAction.MCP_TOOL_CALL,
            resource_type="mcp_tool",
            resource_id=name,
            api_key_id=key.id if key is not None else None,
            tiger_account_id=key.tiger_account_id if key is not None else None,
            details=bounded_json(arguments, "arguments", _MAX_ARGUMENT_CHARACTERS),
        ) as outcome:
            try:
                result = await call()
            except Exception as error:
                if isinstance(error.__cause__, TigerDBError):
                    raise error.__cause__ from None
                raise
            if getattr(result, "is_error", False):
                outcome.result = AuditResult.ERROR
            return result
    except TigerDBError as error:
        shown = public_error(error)
        if shown.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            _logger.error("a tool call failed", exc_info=error)  # noqa: TRY400
        raise tool_error(shown.message) from None
