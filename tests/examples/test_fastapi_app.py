import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from tests.support import factories
from tests.support.serving import Serve
from tiger_db import APIKeyScope, Database, crud
from tiger_db.crud.api_keys.key_format import new_key


@pytest.mark.slow
async def test_a_route_needs_a_key_with_its_scope(clone: Database, serve: Serve) -> None:
    async with clone.session() as session:
        mine = await factories.account(session, account_name="Mine")
        await factories.account(session, account_name="Another")
        key, raw_key = await factories.api_key(
            session, scopes=[APIKeyScope.ACCOUNT_READ], tiger_account_id=mine.id
        )
        _, limited = await factories.api_key(
            session, scopes=[APIKeyScope.TRADE_ADMIN], rate_limit_per_day=1
        )
        _, expired = await factories.api_key(
            session, expires_at=datetime.now(UTC) - timedelta(seconds=1)
        )
    async with serve("fastapi_app.py") as url, httpx.AsyncClient(base_url=url) as client:

        async def get(raw_key: str) -> httpx.Response:
            return await client.get("/accounts", headers={"Authorization": f"Bearer {raw_key}"})

        found = await get(raw_key)
        assert (found.status_code, found.json()) == (200, ["Mine"])
        unknown = new_key("test").raw_key
        wrong = [await get(text) for text in ("nonsense", raw_key[:-1], unknown, expired)]
        wrong.append(await client.get("/accounts"))
        assert {(answer.status_code, answer.json()["detail"]) for answer in wrong} == {
            (401, "The API key is not valid.")
        }
        assert {answer.headers["www-authenticate"] for answer in wrong} == {"Bearer"}

        trade = {"Authorization": f"Bearer {raw_key}"}
        assert (await client.post("/orders", headers=trade)).status_code == 403
        async with clone.session() as session:
            await crud.api_keys.pause(session, reason="stop")
        paused = await client.post("/orders", headers={"Authorization": f"Bearer {limited}"})
        assert (paused.status_code, paused.json()["detail"]) == (403, "trading is paused: stop")
        async with clone.session() as session:
            await crud.api_keys.resume(session)
        trade = {"Authorization": f"Bearer {limited}"}
        assert (await client.post("/orders", headers=trade)).status_code == 200
        again = await client.post("/orders", headers=trade)
        assert again.status_code == 429
        assert 0 < int(again.headers["retry-after"]) <= 86400

        assert (await get(raw_key)).status_code == 200
        async with clone.session() as session:
            await crud.api_keys.revoke(session, key.id)
        assert await _soon(get, raw_key) == "The API key is not valid."


async def _soon(get: Callable[[str], Awaitable[httpx.Response]], raw_key: str) -> str:
    """The first refusal: a revocation is honoured within milliseconds, but not within none."""
    async with asyncio.timeout(1):
        while (answer := await get(raw_key)).status_code == 200:
            pass
    assert answer.status_code == 401
    return str(answer.json()["detail"])
