import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from tests.support import factories
from tests.support.mcp_servers import ACCEPT, CLIENTS, KINDS, Tools, new_app, served
from tiger_db import APIKey, APIKeyScope, Database, crud, errors
from tiger_db.redaction import MASK

READ, TRADE = APIKeyScope.MCP_READ, APIKeyScope.TRADE_WRITE
ACCOUNTS = APIKeyScope.ACCOUNT_READ
pytestmark = pytest.mark.parametrize("kind", KINDS)


@asynccontextmanager
async def serving(
    kind: str, database: Database, *, recorded: bool = False, **options: Any
) -> AsyncIterator[tuple[str, Tools]]:
    app, tools = new_app(kind, database, recorded=recorded, **options)
    async with served(app) as url:
        yield url, tools


async def make_key(database: Database, **values: Any) -> tuple[APIKey, str]:
    values = {"scopes": [READ, TRADE, ACCOUNTS]} | values
    async with database.session() as session:
        return await factories.api_key(session, **values)


async def used(database: Database, key: APIKey) -> int:
    async with database.session() as session:
        limits = await crud.api_keys.limits(session, key.id)
    assert limits.day is not None
    return key.rate_limit_per_day - limits.day.remaining if key.rate_limit_per_day else 0


async def call(client: Any, tool: str, **arguments: object) -> tuple[bool, str]:
    """Call a tool. Return whether the answer is an error, and its text."""
    raising = {} if type(client).__module__.startswith("mcp") else {"raise_on_error": False}
    result = await client.call_tool(tool, arguments, **raising)
    return bool(result.is_error), result.content[0].text if result.content else ""


def message(method: str, number: int = 1, **params: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


INITIALIZE = message(
    "initialize",
    protocolVersion="2025-06-18",
    capabilities={},
    clientInfo={"name": "tests", "version": "1"},
)


@asynccontextmanager
async def raw(url: str, raw_key: str = "", **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Requests as the clients send them, whose statuses the clients hide."""
    bearer = {"Authorization": f"Bearer {raw_key}"} if raw_key else {}
    async with httpx2.AsyncClient(
        base_url=url.removesuffix("/mcp"), headers=ACCEPT | bearer | headers
    ) as http:
        yield http


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
async def test_one_tool_call_is_one_use(clone: Database, kind: str, client: str) -> None:
    async with clone.session() as session:
        mine = await factories.account(session, account_name="Mine")
        await factories.account(session, account_name="Another")
    key, raw_key = await make_key(clone, rate_limit_per_day=3, tiger_account_id=mine.id)
    async with serving(kind, clone) as (url, _):
        for headers in ({"Authorization": f"Bearer {raw_key}"}, {"X-API-Key": raw_key}):
            async with CLIENTS[client](url, **headers) as connected:
                await connected.list_tools()
                failed, text = await call(connected, "account_names")
                assert (failed, "Mine" in text, "Another" in text) == (False, True, False)
        assert await used(clone, key) == 2
        async with CLIENTS[client](url, **headers) as connected:
            assert await call(connected, "place_order", symbol="AAPL") == (False, "AAPL")
            with pytest.raises(Exception, match=r"rate limit. Repeat the request after \d+ s\."):
                await call(connected, "account_names")
            await connected.list_tools()  # no use, so no limit applies
        async with raw(url, raw_key) as http:
            limited = await http.post("/mcp", json=message("tools/call", name="account_names"))
            ids = [1, "a", "x" * 100, "x" * 101, 2**63, 1.5, float("nan"), True, [1], {}]
            for sent in ids:
                content = json.dumps({"id": sent, "method": "tools/call"}).encode()
                refused = await http.post("/mcp", content=content)
                answered = sent if sent in ids[:3] and sent is not True else None
                assert (refused.status_code, refused.json()["id"]) == (429, answered), sent
    assert limited.status_code == 429
    assert 0 < int(limited.headers["retry-after"]) <= 86400
    assert limited.json()["error"]["data"] == {"code": "rate_limited"}
    assert await used(clone, key) == 3
    async with clone.session() as session:
        denials = list(await crud.audit_logs.search(session, action="api_key:deny"))
    assert [denial.error_code for denial in denials] == ["RateLimited"] * 12  # one per request


@pytest.mark.slow
async def test_only_code_of_the_application_is_a_use(clone: Database, kind: str) -> None:
    key, raw_key = await make_key(clone, rate_limit_per_day=100)

    async def uses(content: bytes, headers: dict[str, str]) -> tuple[int, int]:
        before = await used(clone, key)
        response = await http.post("/mcp", content=content, headers=headers | json_type)
        return response.status_code, await used(clone, key) - before

    json_type = {"Content-Type": "application/json"}
    async with serving(kind, clone) as (url, _), raw(url, raw_key) as http:
        opened = await http.post("/mcp", json=INITIALIZE)
        session = {"Mcp-Session-Id": opened.headers["mcp-session-id"]}
        assert await used(clone, key) == 0
        for method in ("ping", "tools/list", "resources/list", "prompts/list"):
            content = json.dumps(message(method)).encode()
            assert await uses(content, session) == (200, 0), method
        for method in ("resources/read", "prompts/get"):
            content = json.dumps(message(method, uri="a://b", name="c")).encode()
            assert await uses(content, session) == (200, 1), method
        completion = message(
            "completion/complete",
            ref={"type": "ref/prompt", "name": "c"},
            argument={"name": "a", "value": "b"},
        )
        for request in (completion, message("unknown"), message("notifications/initialized")):
            assert (await uses(json.dumps(request).encode(), session))[1] == 1, request
        answer = {"jsonrpc": "2.0", "id": 1, "result": {}}
        for free in (answer, {"jsonrpc": "2.0", "method": "notifications/initialized"}):
            assert await uses(json.dumps(free).encode(), session) == (202, 0), free
        # A method that is no text, and an id that JSON cannot express, are no errors of the server.
        for content in (
            b'{"method": []}',
            b'{"jsonrpc": "2.0", "id": NaN, "method": "tools/call"}',
        ):
            status, count = await uses(content, session)
            assert (status < 500, count) == (True, 1), content
        tool_call = message("tools/call", name="place_order", arguments={"symbol": "AAPL"})
        assert await uses(json.dumps(tool_call).encode(), session) == (200, 1)
        # The servers refuse batches and other bodies, which count as uses, as they may be calls.
        assert await uses(json.dumps([tool_call] * 9).encode(), session) == (400, 1)
        for modern in ({}, {"Mcp-Protocol-Version": "2026-07-28"}):
            for content in (json.dumps(tool_call).encode("utf-16"), b"{", b""):
                status, count = await uses(content, session | modern)
                assert (status >= 400, count) == (True, 1)
        deleted = await http.delete("/mcp", headers=session)
        assert deleted.status_code in {200, 204}


@pytest.mark.slow
async def test_each_request_needs_a_valid_key(clone: Database, kind: str) -> None:
    key, raw_key = await make_key(clone)
    _, scopeless = await make_key(clone, scopes=[TRADE])
    async with serving(kind, clone) as (url, _), raw(url) as http:

        async def post(**headers: str) -> httpx2.Response:
            return await http.post("/mcp", json=message("ping"), headers=headers)

        refused = [
            await post(),
            await post(authorization="Bearer nonsense"),
            await post(authorization=f"Basic {raw_key}"),
            await http.get("/mcp", headers={"Authorization": f"Bearer {raw_key[:-1]}"}),
            await http.delete("/mcp"),
        ]
        async with raw(url, raw_key, **{"X-API-Key": raw_key[:-1]}) as different:
            refused.append(await different.post("/mcp", json=message("ping")))
        for response in refused:
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["message"] == "The API key is not valid."
            assert response.json()["id"] is None  # the body was not read
        forbidden = await post(authorization=f"Bearer {scopeless}")
        assert forbidden.status_code == 403
        assert "mcp:read" in forbidden.json()["error"]["message"]
        large = await http.post(
            "/mcp",
            content=b" " * (4 * 1024 * 1024 + 1),
            headers={"Authorization": f"Bearer {raw_key}"},
        )
        assert large.status_code == 413
        async with CLIENTS["sdk"](url, Authorization=f"Bearer {raw_key}") as client:
            assert await call(client, "place_order", symbol="AAPL") == (False, "AAPL")
            async with clone.session() as session:
                await crud.api_keys.revoke(session, key.id)
            with pytest.raises(Exception, match="The API key is not valid"):
                await call(client, "place_order", symbol="AAPL")
            with pytest.raises(Exception, match="The API key is not valid"):
                await client.list_tools()


async def post_unread(app: Any, **headers: str) -> list[Any]:
    """Send the headers of a request without its body. Return the status, or the error."""

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message["status"]) if "status" in message else None

    sent: list[Any] = []
    pairs = [(name.encode().replace(b"_", b"-"), text.encode()) for name, text in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/mcp", "headers": pairs}
    await app(scope | {"client": ("127.0.0.1", 1)}, receive, send)
    return sent


async def test_the_key_is_not_in_a_repr(clone: Database, kind: str) -> None:
    from tiger_db.integrations import mcp  # noqa: PLC0415

    _, raw_key = await make_key(clone)
    shown = []

    async def show(*_: object) -> None:
        shown.append(repr(mcp._caller.get()))  # as a log with local variables shows it

    app, _ = new_app(kind, clone, recorded=False)
    app.app = show
    headers = [(b"x-api-key", raw_key.encode())]
    scope = {"type": "http", "method": "GET", "path": "/mcp", "headers": headers}

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    await app(scope, receive, show)
    (text,) = shown
    assert "_Caller" in text
    assert raw_key not in text


async def test_a_body_is_read_for_a_valid_key_only(clone: Database, kind: str) -> None:
    _, raw_key = await make_key(clone)
    _, scopeless = await make_key(clone, scopes=[TRADE])
    revoked, ended = await make_key(clone)
    async with clone.session() as session:
        await crud.api_keys.revoke(session, revoked.id)
    app, _ = new_app(kind, clone, recorded=False)
    for refused in ("", "nonsense", raw_key[:-1], ended):
        assert await post_unread(app, x_api_key=refused) == [401]
    assert await post_unread(app, x_api_key=scopeless) == [403]
    with pytest.raises(AssertionError, match="was read"):
        await post_unread(app, x_api_key=raw_key)
    async with clone.session() as session:
        denials = list(await crud.audit_logs.search(session, action="api_key:deny"))
    assert sorted(str(denial.error_code) for denial in denials) == ["APIKeyRevoked", "ScopeMissing"]


@pytest.mark.slow
async def test_a_session_belongs_to_the_key_that_opened_it(clone: Database, kind: str) -> None:
    _, mine = await make_key(clone)
    _, another = await make_key(clone)
    async with serving(kind, clone) as (url, _):
        async with raw(url, mine) as http:
            opened = await http.post("/mcp", json=INITIALIZE)
            headers = {"Mcp-Session-Id": opened.headers["mcp-session-id"]}
            assert (
                await http.post("/mcp", json=message("ping"), headers=headers)
            ).status_code == 200
        async with raw(url, another, **headers) as http:
            tool_call = message("tools/call", name="place_order", arguments={"symbol": "AAPL"})
            assert (await http.post("/mcp", json=tool_call)).status_code == 404
            assert (await http.get("/mcp")).status_code == 404
            assert (await http.delete("/mcp")).status_code == 404
        async with raw(url, mine, **headers) as http:
            assert (await http.post("/mcp", json=message("ping"))).status_code == 200


@pytest.mark.slow
async def test_a_stream_ends_when_its_key_is_revoked(clone: Database, kind: str) -> None:
    key, raw_key = await make_key(clone)
    async with serving(kind, clone) as (url, tools), raw(url, raw_key) as http:
        opened = await http.post("/mcp", json=INITIALIZE)
        headers = {"Mcp-Session-Id": opened.headers["mcp-session-id"]}
        initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        assert (await http.post("/mcp", json=initialized, headers=headers)).status_code == 202
        tool_call = message("tools/call", 2, name="remember", arguments={})
        assert "remembered" in (await http.post("/mcp", json=tool_call, headers=headers)).text
        async with http.stream("GET", "/mcp", headers=headers) as stream:
            assert stream.status_code == 200
            lines = stream.aiter_lines()
            (session,) = tools.sessions
            await session.send_tool_list_changed()
            while "tools/list_changed" not in await anext(lines):
                pass
            async with clone.session() as database_session:
                await crud.api_keys.revoke(database_session, key.id)
            await session.send_tool_list_changed()
            rest = [line async for line in lines]
        assert "list_changed" not in "".join(rest)


@pytest.mark.slow
async def test_addresses_are_those_of_the_clients(clone: Database, kind: str) -> None:
    _, local = await make_key(clone, allowed_ips=["127.0.0.1"])
    _, remote = await make_key(clone, allowed_ips=["192.0.2.0/24"])
    header = {"X-Forwarded-For": "127.0.0.1, 192.0.2.1"}

    async def statuses(url: str) -> list[int]:
        found = []
        for raw_key in (local, remote):
            async with raw(url, raw_key, **header) as http:
                found.append((await http.post("/mcp", json=INITIALIZE)).status_code)
        return found

    async with serving(kind, clone) as (url, _):
        assert await statuses(url) == [200, 401]
    async with serving(kind, clone, trusted_proxies=["127.0.0.1"]) as (url, _):
        assert await statuses(url) == [401, 200]
        async with CLIENTS["sdk"](url, Authorization=f"Bearer {remote}", **header) as client:
            assert await call(client, "place_order", symbol="AAPL") == (False, "AAPL")


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
async def test_tool_calls_are_on_record(clone: Database, kind: str, client: str) -> None:
    key, raw_key = await make_key(clone, rate_limit_per_day=9)
    async with (
        serving(kind, clone, recorded=True) as (url, _),
        CLIENTS[client](url, **{"X-API-Key": raw_key}) as connected,
    ):
        arguments = {"symbol": "AAPL", "password": "hunter2"}
        assert await call(connected, "place_order", **arguments) == (False, "AAPL")
        async with clone.session() as session:
            await crud.api_keys.pause(session, reason="stop")
        paused = await call(connected, "place_order", symbol="AAPL")
        assert paused == (True, "trading is paused: stop")
        assert await used(clone, key) == 2
        for error, text in {
            "missing": "there is no account 7",
            "unavailable": errors.DatabaseUnavailable.__doc__,
            "timeout": errors.WaitTimeout.__doc__,
        }.items():
            assert await call(connected, "fail", kind=error) == (True, text)
        assert (await call(connected, "fail", kind="crash"))[0]
    async with clone.session() as session:
        events = list(await crud.audit_logs.search(session, action="mcp:tool_call"))
        denials = list(await crud.audit_logs.search(session, action="api_key:deny"))
    outcomes = [event for event in reversed(events) if event.result != "pending"]
    assert len(events) == 2 * len(outcomes)
    crash = outcomes.pop()
    assert crash.result == "error"
    assert [(e.resource_id, e.result, e.error_code, e.error_message) for e in outcomes] == [
        ("place_order", "success", None, None),
        ("place_order", "error", "TradingPaused", "trading is paused: stop"),
        ("fail", "error", "NotFound", "there is no account 7"),
        ("fail", "error", "DatabaseUnavailable", "db.internal:5432 is gone"),
        ("fail", "error", "WaitTimeout", "db.internal"),
    ]
    for event in outcomes:
        assert (event.user_id, event.api_key_id) == (key.key_prefix, key.id)
        assert (event.user_type, str(event.ip_address)) == ("api_key", "127.0.0.1")
        assert event.duration_ms is not None
    (placed, *_) = outcomes
    assert placed.details is not None
    assert placed.details["arguments"] == {"symbol": "AAPL", "password": MASK}
    assert "hunter2" not in str(events)
    (denial,) = denials  # the scope that a tool requires is checked on record
    assert (denial.error_code, denial.request_id) == ("TradingPaused", outcomes[1].request_id)


@pytest.mark.slow
async def test_a_missing_scope_of_a_tool_is_on_record(clone: Database, kind: str) -> None:
    key, raw_key = await make_key(clone, scopes=[READ], rate_limit_per_day=9)
    async with (
        serving(kind, clone, recorded=True) as (url, _),
        CLIENTS["sdk"](url, **{"X-API-Key": raw_key}) as client,
    ):
        failed, text = await call(client, "place_order", symbol="AAPL")
    assert (failed, text) == (True, "the API key lacks the scope trade:write")
    assert await used(clone, key) == 1
    async with clone.session() as session:
        (denial,) = await crud.audit_logs.search(session, action="api_key:deny")
    assert (denial.error_code, denial.api_key_id) == ("ScopeMissing", key.id)


@pytest.mark.slow
async def test_an_outage_is_503(clone: Database, kind: str) -> None:
    _, raw_key = await make_key(clone)
    url = clone.settings.database_url
    assert url is not None
    gone = url.get_secret_value().rpartition("/")[0] + f"/{uuid4().hex}"
    settings = clone.settings.model_copy(update={"database_url": type(url)(gone)})
    async with (
        Database(settings) as database,
        serving(kind, database) as (address, _),
        raw(address, raw_key) as http,
    ):
        response = await http.post("/mcp", json=INITIALIZE)
    assert response.status_code == 503
    assert response.json()["error"]["message"] == errors.DatabaseUnavailable.__doc__


@pytest.mark.slow
async def test_concurrent_calls_of_two_keys_are_not_mixed_up(clone: Database, kind: str) -> None:
    keys = [await make_key(clone) for _ in range(2)]
    symbols = {"AAPL": keys[0][0], "MSFT": keys[1][0]}
    async with serving(kind, clone, recorded=True) as (url, _):

        async def trade(raw_key: str, symbol: str) -> None:
            async with CLIENTS["sdk, legacy"](url, **{"X-API-Key": raw_key}) as client:
                await asyncio.gather(
                    *(call(client, "place_order", symbol=symbol) for _ in range(5))
                )

        await asyncio.gather(trade(keys[0][1], "AAPL"), trade(keys[1][1], "MSFT"))
    async with clone.session() as session:
        events = list(await crud.audit_logs.search(session, action="mcp:tool_call", limit=50))
    assert len(events) == 20
    for event in events:
        (symbol,) = (s for s in symbols if s in str(event.details))
        assert event.user_id == symbols[symbol].key_prefix
