import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, Request, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support import factories
from tests.support.mcp_servers import served
from tiger_db import (
    APIKey,
    APIKeyScope,
    AuditLog,
    Database,
    KeyVerifier,
    acting_as,
    crud,
    errors,
)
from tiger_db.actor import actor_in_force
from tiger_db.integrations.fastapi import (
    PROBLEM_RESPONSES,
    SessionDep,
    actor_of,
    install,
    require_api_key,
)
from tiger_db.integrations.http import STATUSES

READ, TRADE = APIKeyScope.ACCOUNT_READ, APIKeyScope.TRADE_WRITE
Connect = Callable[..., httpx.AsyncClient]


async def other_account(x_account: Annotated[UUID, Header()]) -> UUID:
    return x_account


router = APIRouter(dependencies=[Depends(require_api_key())])


@router.get("/key")
async def show_key(key: Annotated[APIKey, Depends(require_api_key(READ))]) -> str:
    return key.name


@router.post("/notes/{kind}", status_code=201)
async def note(session: SessionDep, kind: str) -> dict[str, bool]:
    await crud.audit_logs.log_event(session, action=f"note:{kind}")
    return {"saved": True}


@router.get("/thread")
def user_of_a_route_in_a_thread() -> str | None:
    return actor_in_force().user_id


@router.get("/accounts/{account_id}", dependencies=[Depends(require_api_key(account="account_id"))])
async def account(account_id: UUID, session: SessionDep) -> str:
    found = await crud.accounts.get(session, account_id)
    if found is None:
        raise errors.NotFound(f"there is no account {account_id}")
    return found.account_name


@router.post("/orders", dependencies=[Depends(require_api_key(TRADE, account=other_account))])
async def order() -> str:
    return "accepted"


@router.get("/stream")
async def stream(request: Request) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(3):
            async with request.app.state.database.session() as session:
                await crud.audit_logs.log_event(session, action="note:stream")
            yield f"{number}\n"

    return StreamingResponse(lines())


open_routes = APIRouter()


@open_routes.post("/duplicate", status_code=201)
async def duplicate(session: SessionDep, number: str) -> dict[str, bool]:
    session.add(factories.new_account(account_number=number))  # refused by the commit's flush
    return {"saved": True}


@open_routes.post("/lost", status_code=201)
async def lost(request: Request, session: SessionDep) -> dict[str, bool]:
    await crud.audit_logs.log_event(session, action="note:lost")
    process = await session.scalar(text("SELECT pg_backend_pid()"))
    async with request.app.state.database.session() as other:
        await other.execute(text("SELECT pg_terminate_backend(:p, 5000)"), {"p": process})
    return {"saved": True}


@open_routes.get("/invalid")
async def invalid(session: SessionDep) -> None:
    await crud.accounts.list_accounts(session, limit="10")  # type: ignore[arg-type]


@open_routes.post("/user")
async def own_authentication(request: Request, session: SessionDep) -> str | None:
    actor = actor_of(request, user_id="ann", user_type="user")
    with acting_as(actor):
        await crud.audit_logs.log_event(session, action="note:user")
    return actor.request_id


@open_routes.websocket("/socket")
async def socket(
    websocket: WebSocket, key: Annotated[APIKey, Depends(require_api_key(READ))]
) -> None:
    await websocket.accept()
    await websocket.send_text(key.name)
    await websocket.close()


@open_routes.websocket("/socket/failing")
async def failing_socket(websocket: WebSocket) -> None:
    await websocket.accept()
    raise errors.NotFound


def application(database: Database | None, **options: Any) -> FastAPI:
    app = FastAPI()
    install(app, **options)
    app.include_router(router)
    app.include_router(open_routes)
    if database is not None:
        app.state.database, app.state.verifier = database, KeyVerifier(database)
    return app


def client(app: FastAPI, peer: str = "192.0.2.1", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(peer, 4711), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


async def make_key(database: Database, **values: Any) -> tuple[APIKey, str]:
    async with database.session() as session:
        return await factories.api_key(session, **values)


async def found(database: Database, action: str) -> list[AuditLog]:
    async with database.session() as session:
        return list(await crud.audit_logs.search(session, action=action))


async def test_the_commit_is_before_the_response(clone: Database) -> None:
    async with clone.session() as session:
        stored = await factories.account(session)
    async with client(application(clone)) as http:
        params = {"number": stored.account_number}
        refused = await http.post("/duplicate", params=params)
        gone = await http.post("/lost")
    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["code"] == "already_exists"
    assert refused.json()["detail"] == "an account with this account number already exists"
    assert gone.status_code >= 500
    assert gone.json()["code"] in {"outcome_unknown", "database_unavailable"}
    assert not await found(clone, "note:lost")


async def test_events_are_attributed_to_the_key_and_the_client(clone: Database) -> None:
    key, raw_key = await make_key(clone)
    app = application(clone, trusted_proxies=["10.0.0.0/8"])
    headers = {
        "X-API-Key": raw_key,
        "User-Agent": "tests/1",
        "X-Forwarded-For": "9.9.9.9, 192.0.2.7",
    }
    async with client(app, "10.1.2.3", **headers) as http:
        assert (await http.post("/notes/async")).status_code == 201
        assert (await http.get("/thread")).json() == key.key_prefix
        assert (await http.get("/stream")).text == "0\n1\n2\n"
        request_id = (await http.post("/user")).json()
    async with client(app, "192.0.2.8", **headers) as http:
        assert (await http.post("/notes/direct")).status_code == 201
    (event,) = await found(clone, "note:async")
    assert (event.user_id, event.user_type) == (key.key_prefix, "api_key")
    assert event.api_key_id == key.id
    assert (event.request_method, event.request_path) == ("POST", "/notes/async")
    assert (str(event.ip_address), event.user_agent) == ("192.0.2.7", "tests/1")
    streamed = await found(clone, "note:stream")
    assert [line.user_id for line in streamed] == [key.key_prefix] * 3
    assert len({line.request_id for line in streamed} | {event.request_id}) == 2
    (event,) = await found(clone, "note:user")
    assert (event.user_id, event.user_type, event.request_id) == ("ann", "user", request_id)
    assert str(event.ip_address) == "192.0.2.7"
    (event,) = await found(clone, "note:direct")
    assert str(event.ip_address) == "192.0.2.8"


async def test_a_request_is_one_use_of_its_key(clone: Database) -> None:
    key, raw_key = await make_key(clone, scopes=[READ], rate_limit_per_hour=2)
    async with client(application(clone), Authorization=f"Bearer {raw_key}") as http:
        assert (await http.get("/key")).json() == key.name  # authorized by two dependencies
        assert (await http.get("/key")).status_code == 200
        limited = await http.get("/key")
    assert limited.status_code == 429
    assert 0 < int(limited.headers["retry-after"]) <= 3600
    assert limited.json()["code"] == "rate_limited"


async def test_the_key_is_checked_before_the_account(clone: Database) -> None:
    _, raw_key = await make_key(clone, scopes=[READ], rate_limit_per_hour=1)
    app, asked = application(clone), list[str]()

    async def account_of(name: str) -> UUID:
        asked.append(name)
        raise errors.NotFound(f"there is no account {name}")

    by_name, by_id = require_api_key(account=account_of), require_api_key(account="account_id")

    @app.get("/by-name", dependencies=[Depends(by_name)])
    @app.get("/by-id/{account_id}", dependencies=[Depends(by_id)])
    async def nothing() -> None: ...

    async with client(app) as http:
        for path in ("/by-name?name=Nope", "/by-id/nonsense"):
            assert (await http.get(path)).status_code == 401
    assert asked == []
    async with client(app, Authorization=f"Bearer {raw_key}") as http:
        assert (await http.get("/by-name?name=Nope")).status_code == 404
        assert (await http.get("/by-id/nonsense")).status_code == 422
        assert (await http.get(f"/by-id/{uuid4()}")).status_code == 200  # the first use
        assert (await http.get(f"/by-id/{uuid4()}")).status_code == 429
    assert asked == ["Nope"]


async def test_refusals_are_problem_details(clone: Database) -> None:
    async with clone.session() as session:
        mine = await factories.account(session, account_name="Mine")
        another = await factories.account(session)
    _, raw_key = await make_key(
        clone, scopes=[READ, TRADE], tiger_account_id=mine.id, allowed_ips=["192.0.2.0/24"]
    )
    app = application(clone)

    async def get(path: str, *keys: str, peer: str = "192.0.2.1") -> httpx.Response:
        names = ("Authorization", "X-API-Key")
        async with client(app, peer) as http:
            return await http.get(path, headers=dict(zip(names, keys, strict=False)))

    assert (await get(f"/accounts/{mine.id}", f"Bearer {raw_key}")).json() == "Mine"
    assert (await get("/key", f"Bearer {raw_key}", raw_key)).status_code == 200
    refused = [
        await get("/key"),
        await get("/key", "Bearer nonsense"),
        await get("/key", f"Basic {raw_key}"),
        await get("/key", f"Bearer {raw_key}", f"{raw_key}x"),
        await get("/key", f"Bearer {raw_key}", peer="198.51.100.1"),
    ]
    bodies = [response.json() for response in refused]
    instances = {body.pop("instance") for body in bodies}
    assert len(instances) == len(refused)
    assert bodies == [
        {
            "title": "Unauthorized",
            "status": 401,
            "detail": "The API key is not valid.",
            "code": "invalid_api_key",
        }
    ] * len(refused)
    assert {response.headers["www-authenticate"] for response in refused} == {"Bearer"}

    assert (await get(f"/accounts/{another.id}", f"Bearer {raw_key}")).json()["code"] == (
        "account_not_allowed"
    )
    invalid_request = await get("/accounts/x-secret", f"Bearer {raw_key}")
    assert invalid_request.status_code == 422
    assert invalid_request.headers["content-type"] == "application/problem+json"
    assert invalid_request.json()["errors"][0]["loc"] == ["path", "account_id"]
    assert "x-secret" not in invalid_request.text
    async with client(app, Authorization=f"Bearer {raw_key}") as http:
        mine_header, another_header = {"X-Account": str(mine.id)}, {"X-Account": str(another.id)}
        assert (await http.post("/orders", headers=mine_header)).status_code == 200
        assert (await http.post("/orders", headers=another_header)).status_code == 403
        async with clone.session() as session:
            await crud.api_keys.pause(session, reason="stop")
        paused = await http.post("/orders", headers=mine_header)
        assert (paused.status_code, paused.json()["detail"]) == (403, "trading is paused: stop")
        unknown = await http.get("/invalid")
    assert unknown.status_code == 422
    assert unknown.json()["errors"][0]["loc"] == ["limit"]
    shared = {name: unknown.json()[name] for name in ("title", "status", "detail", "code")}
    assert invalid_request.json() | shared == invalid_request.json()
    assert "\n" not in shared["detail"]


async def test_an_outage_is_503_without_internal_text(
    clone: Database, caplog: pytest.LogCaptureFixture
) -> None:
    _, raw_key = await make_key(clone)
    url = clone.settings.database_url
    assert url is not None
    gone = url.get_secret_value().rpartition("/")[0] + f"/{uuid4().hex}"
    settings = clone.settings.model_copy(update={"database_url": type(url)(gone)})
    async with (
        Database(settings) as database,
        client(application(database), Authorization=f"Bearer {raw_key}") as http,
    ):
        response = await http.get("/key")
    assert response.status_code == 503
    body = response.json()
    assert body["code"] == "database_unavailable"
    assert body["detail"] == errors.DatabaseUnavailable.__doc__
    assert body["instance"].removeprefix("urn:uuid:") in caplog.text  # the log has the reason


def test_openapi_has_both_ways_to_send_a_key() -> None:
    schema = application(None).openapi()
    schemes = schema["components"]["securitySchemes"]
    assert {(s["type"], s.get("scheme"), s.get("name")) for s in schemes.values()} == {
        ("http", "bearer", None),
        ("apiKey", None, "X-API-Key"),
    }
    alternatives = schema["paths"]["/key"]["get"]["security"]
    assert sorted(name for each in alternatives for name in each) == sorted(schemes)
    assert all(len(each) == 1 for each in alternatives)
    assert "security" not in schema["paths"]["/invalid"]["get"]
    parameters = schema["paths"]["/accounts/{account_id}"]["get"]["parameters"]
    assert [p["name"] for p in parameters] == ["account_id"]


def test_openapi_has_the_problem_details() -> None:
    app = FastAPI(responses=PROBLEM_RESPONSES)
    app.include_router(router)
    responses = app.openapi()["paths"]["/accounts/{account_id}"]["get"]["responses"]
    assert set(responses) == {"200", *map(str, STATUSES.values())}
    for status in ("401", "422"):
        (schema,) = (media["schema"] for media in responses[status]["content"].values())
        assert {"code", "detail", "errors"} <= set(schema["properties"])


async def test_two_applications_in_one_process_have_their_own_state(clone: Database) -> None:
    _, raw_key = await make_key(clone, scopes=[READ])
    first, second = application(clone), application(None)
    async with client(first, Authorization=f"Bearer {raw_key}") as http:
        assert (await http.get("/key")).status_code == 200
    async with client(second, Authorization=f"Bearer {raw_key}") as http:
        response = await http.get("/key")
    assert (response.status_code, response.json()["code"]) == (500, "configuration_error")


async def test_concurrent_requests_have_their_own_actors(clone: Database) -> None:
    keys = [await make_key(clone) for _ in range(4)]
    async with client(application(clone)) as http:
        await asyncio.gather(
            *(
                http.post(f"/notes/n{number}", headers={"X-API-Key": raw_key})
                for number, (_, raw_key) in enumerate(keys)
            )
        )
    for number, (key, _) in enumerate(keys):
        (event,) = await found(clone, f"note:n{number}")
        assert event.user_id == key.key_prefix


async def test_a_websocket_needs_a_key(clone: Database, caplog: pytest.LogCaptureFixture) -> None:
    key, raw_key = await make_key(clone, scopes=[READ])
    async with served(application(clone), path="/socket", log_config=None) as url:

        async def read(path: str = "", **headers: str) -> str:
            async with connect(
                url.replace("http", "ws") + path, additional_headers=headers
            ) as socket:
                return str(await socket.recv())

        assert await read(Authorization=f"Bearer {raw_key}") == key.name
        with pytest.raises(InvalidStatus) as refused:
            await read(Authorization="Bearer nonsense")
        with pytest.raises(ConnectionClosed) as closed:
            await read("/failing")
    response = refused.value.response
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.body is not None
    assert json.loads(response.body)["code"] == "invalid_api_key"
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    # uvicorn itself logs this line after each denial response, of any application.
    lines = [line.getMessage() for line in caplog.records if line.levelno >= logging.ERROR]
    assert set(lines) <= {"ASGI callable returned without completing handshake."}


async def test_a_server_without_denial_responses_closes_a_refused_websocket(
    clone: Database,
) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/socket", "headers": [], "query_string": b""}
    await application(clone)(scope, receive, send)  # type: ignore[arg-type]
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]
