"""Sessions, API keys and problem details (RFC 9457) for FastAPI. Needs the extra `fastapi`."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any
from uuid import UUID

from tiger_db.actor import Actor, acting_as
from tiger_db.database import AsyncSession, Database
from tiger_db.errors import ConfigurationError, InvalidFields, TigerDBError
from tiger_db.integrations.http import (
    STATUSES,
    Network,
    PublicError,
    parse_proxies,
    public_error,
    raw_key_of,
    request_actor,
    user_agent_of,
)
from tiger_db.key_verifier import KeyVerifier
from tiger_db.models import APIKey, APIKeyScope

try:
    from fastapi import Depends, FastAPI, Path, Request, WebSocket
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response
    from fastapi.security import APIKeyHeader, HTTPBearer
    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.websockets import WebSocketState
except ModuleNotFoundError:
    raise ImportError(
        "tiger_db.integrations.fastapi needs FastAPI: install tiger_db with the extra `fastapi`"
    ) from None

__all__ = [
    "PROBLEM_RESPONSES",
    "SessionDep",
    "actor_of",
    "install",
    "lifespan",
    "problem",
    "require_api_key",
]
_logger = logging.getLogger("tiger_db")
_ACTOR, _KEY = "tiger_db_actor", "tiger_db_key"  # attributes of `request.state`
PROBLEM_JSON = "application/problem+json"
_INVALID = "some values are not valid: see errors"
_TEXT = {"type": "string"}
_ERROR = {
    "type": "object",
    "properties": {
        "loc": {"type": "array", "items": {"anyOf": [_TEXT, {"type": "integer"}]}},
        "msg": _TEXT,
    },
    "required": ["loc", "msg"],
}
_REQUIRED = ("title", "status", "detail", "code", "instance")
_SCHEMA = {
    "type": "object",
    "properties": dict.fromkeys(_REQUIRED, _TEXT)
    | {"status": {"type": "integer"}, "errors": {"type": "array", "items": _ERROR}},
    "required": list(_REQUIRED),
}
# The responses with problem details in OpenAPI, for `FastAPI(responses=PROBLEM_RESPONSES)`.
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM_JSON: {"schema": _SCHEMA}},
    }
    for status in sorted(set(STATUSES.values()))
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open a Database and a KeyVerifier with the settings of the environment for an application.

    Use it as `FastAPI(lifespan=lifespan)`. An application with a lifespan of its own sets
    `app.state.database` and `app.state.verifier` itself.

    Raises:
        ConfigurationError, DatabaseUnavailable, SchemaMismatch: as `Database` and `KeyVerifier`.
    """
    async with Database() as database, KeyVerifier(database) as verifier:
        app.state.database, app.state.verifier = database, verifier
        yield


def install(app: FastAPI, *, trusted_proxies: Iterable[str] = ()) -> None:
    """Attribute audit events to the request of the application, and answer errors of tiger_db.

    `trusted_proxies` are the IP addresses and networks of the proxies in front of the application.
    The client's address is taken from `X-Forwarded-For` or `Forwarded` only if a trusted proxy has
    sent the header. Each `TigerDBError` becomes a response with problem details (RFC 9457). A
    `RequestValidationError` of FastAPI gets the response of an `InvalidFields`, without the input.

    Raises:
        ConfigurationError: `trusted_proxies` has an invalid address or network.
    """
    app.add_middleware(_ActorMiddleware, trusted=parse_proxies(trusted_proxies))
    app.add_exception_handler(TigerDBError, _on_error)  # type: ignore[arg-type]  # for both kinds
    app.add_exception_handler(RequestValidationError, _on_invalid_request)


class _ActorMiddleware:
    """ASGI middleware that sets the actor of each request for `acting_as`."""

    def __init__(self, app: ASGIApp, trusted: tuple[Network, ...]) -> None:
        self.app = app
        self.trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        actor = request_actor(scope, self.trusted)
        scope["state"] = {**scope.get("state", {}), _ACTOR: actor}
        with acting_as(actor):
            await self.app(scope, receive, send)


def actor_of(
    connection: HTTPConnection, *, user_id: str | None = None, user_type: str | None = None
) -> Actor:
    """Return the actor of a request, with the client's IP address, the user agent and a request id.

    The request id is the same in all calls for one request.

    Raises:
        ConfigurationError: `install` was not called for the application.
    """
    actor: Actor | None = getattr(connection.state, _ACTOR, None)
    if actor is None:
        raise ConfigurationError("call tiger_db.integrations.fastapi.install(app)")
    return replace(actor, user_id=user_id, user_type=user_type)


def _state(connection: HTTPConnection, name: str) -> Any:  # noqa: ANN401  # app.state has no types
    value = getattr(connection.app.state, name, None)
    if value is None:
        raise ConfigurationError(f"the lifespan of the application must set app.state.{name}")
    return value


async def _session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    database: Database = _state(connection, "database")
    async with database.session() as session:
        yield session


# A session that commits after the route function, before the response is sent. With the default
# scope "request", the client would get the response before a commit that can fail.
SessionDep = Annotated[AsyncSession, Depends(_session, scope="function")]


class _Bearer(HTTPBearer):
    """The header `Authorization` in OpenAPI. `require_api_key` itself reads the header."""

    async def __call__(self, _connection: HTTPConnection) -> None:
        return None


class _Header(APIKeyHeader):
    """The header `X-API-Key` in OpenAPI. `require_api_key` itself reads the header."""

    async def __call__(self, _connection: HTTPConnection) -> None:
        return None


_bearer = _Bearer(scheme_name="APIKeyBearer", description="An API key")
_header = _Header(name="X-API-Key", scheme_name="APIKeyHeader", description="An API key")


def require_api_key(
    *scopes: APIKeyScope, account: str | Callable[..., object] | None = None
) -> Callable[..., AsyncIterator[APIKey]]:
    """Return a dependency that authorizes the API key of a request, and returns the APIKey.

    The key is in the header `Authorization: Bearer` or `X-API-Key`. `account` is the name of the
    path parameter with the id of the requested account, or a dependency that returns the id. The
    audit events of the request are attributed to the API key. If several of these dependencies
    authorize one request, the request is one use of the API key.

    The dependency raises the errors of `KeyVerifier.authorize`.
    """

    async def authorize(
        connection: HTTPConnection, account_id: UUID | None, *, count_use: bool
    ) -> APIKey:
        verifier: KeyVerifier = _state(connection, "verifier")
        return await verifier.authorize(
            raw_key_of(connection.scope),
            scopes=scopes,
            account_id=account_id,
            ip_address=actor_of(connection).ip_address,
            user_agent=user_agent_of(connection.scope),
            count_use=count_use,
        )

    async def check_key(
        connection: HTTPConnection,
        _by_bearer: Annotated[None, Depends(_bearer)],
        _by_header: Annotated[None, Depends(_header)],
    ) -> None:
        # FastAPI calls dependencies in their order. A caller without a valid key must not learn
        # from the dependency `account` which accounts exist.
        if account is not None:
            await authorize(connection, None, count_use=False)

    async def authorized(
        connection: HTTPConnection,
        _checked: Annotated[None, Depends(check_key)],
        account_id: Annotated[UUID | None, Depends(_account(account))],
    ) -> AsyncIterator[APIKey]:
        count_use = not hasattr(connection.state, _KEY)
        key = await authorize(connection, account_id, count_use=count_use)
        setattr(connection.state, _KEY, key)
        user = replace(
            actor_of(connection),
            user_id=key.key_prefix,
            user_type="api_key",
            api_key_id=key.id,
        )
        with acting_as(user):
            yield key

    return authorized


def _account(account: str | Callable[..., object] | None) -> Callable[..., object]:
    """Return a dependency that returns the id of the requested account, or None."""

    async def no_account() -> None:
        return None

    if account is None:
        return no_account
    if callable(account):
        return account

    async def from_path(account_id: Annotated[UUID, Path(alias=account)]) -> UUID:
        return account_id

    return from_path


async def _on_error(connection: Request | WebSocket, error: Exception) -> Response | None:
    assert isinstance(error, TigerDBError)
    response = problem(connection, error)
    if isinstance(connection, Request):
        return response
    connecting = connection.application_state is WebSocketState.CONNECTING
    if connecting and "websocket.http.response" in connection.scope.get("extensions", {}):
        await connection.send_denial_response(response)
    else:
        is_internal = response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
        await connection.close(1011 if is_internal else 1008)
    return None  # Starlette would send a response a second time


async def _on_invalid_request(connection: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(
        connection,
        PublicError(STATUSES[InvalidFields.code], InvalidFields.code, _INVALID, {}),
        error.errors(),
    )


def problem(connection: HTTPConnection, error: TigerDBError) -> JSONResponse:
    """Return a response with the problem details (RFC 9457) of an error.

    An error with a status from 500 on is logged with its message, which the response does not
    contain. `instance` is the request id, which the audit events of the request have as well.
    """
    shown = public_error(error)
    if shown.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _logger.error("the request %s failed", actor_of(connection).request_id, exc_info=error)
    if isinstance(error, InvalidFields):  # its message has several lines
        return _response(connection, shown._replace(message=_INVALID), error.errors())
    return _response(connection, shown)


def _response(
    connection: HTTPConnection,
    shown: PublicError,
    invalid: Iterable[Mapping[str, Any]] | None = None,
) -> JSONResponse:
    """Return problem details. Of the `invalid` fields, a client sees no input."""
    details: dict[str, object] = {
        "title": HTTPStatus(shown.status).phrase,
        "status": shown.status,
        "detail": shown.message,
        "code": shown.code,
        "instance": f"urn:uuid:{actor_of(connection).request_id}",
    }
    if invalid is not None:
        details["errors"] = [{"loc": each["loc"], "msg": each["msg"]} for each in invalid]
    return JSONResponse(details, shown.status, shown.headers, PROBLEM_JSON)
