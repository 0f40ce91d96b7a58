"""Entities as request bodies and responses of a FastAPI application."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from tests.models.examples import SECRET, minimal
from tests.support import factories
from tests.support.factories import plain
from tiger_db import APIKey, TigerAccount, crud
from tiger_db.database import AsyncSession
from tiger_db.redaction import MASK


@pytest.fixture
async def client(session: AsyncSession) -> AsyncIterator[AsyncClient]:
    app = FastAPI()

    @app.post("/accounts", status_code=201)
    async def create(account: TigerAccount) -> TigerAccount:
        return await crud.accounts.create(session, account)

    @app.get("/accounts", response_model=list[TigerAccount])
    async def accounts() -> object:
        return (await crud.accounts.list_accounts(session)).items

    @app.post("/keys")
    async def key(key: APIKey) -> APIKey:
        return key

    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        yield client


def body(**values: Any) -> dict[str, Any]:
    secrets = {"tiger_id": f"{SECRET}-1", "private_key": f"{SECRET}-2", "access_token": SECRET}
    return minimal(TigerAccount, **secrets | values)


@pytest.mark.slow
async def test_a_body_is_stored_and_shown_without_its_secrets(
    client: AsyncClient, session: AsyncSession
) -> None:
    sent = body(tags={"team": ["a"]}, token_expires_at="2027-01-01T00:00:00+08:00")
    answer = await client.post("/accounts", json=sent)
    assert answer.status_code == 201
    shown = answer.json()
    assert SECRET not in answer.text
    assert shown.keys() == TigerAccount.model_fields.keys()
    assert [shown[name] for name in ("tiger_id", "private_key", "access_token")] == [MASK] * 3
    assert (shown["tags"], shown["refresh_token"]) == ({"team": ["a"]}, None)
    assert shown["token_expires_at"] == "2026-12-31T16:00:00Z"
    stored = await crud.accounts.get_by_account_number(session, sent["account_number"])
    assert stored is not None
    assert str(stored.id) == shown["id"]
    assert plain(stored.private_key) == f"{SECRET}-2"


async def test_rows_from_the_database_are_responses(
    client: AsyncClient, session: AsyncSession
) -> None:
    account = await factories.account(session, private_key=SECRET)
    session.expunge_all()
    answer = await client.get("/accounts")
    assert SECRET not in answer.text
    assert answer.json() == [json.loads(account.model_dump_json())]


async def test_the_hash_of_a_key_is_not_in_a_response(client: AsyncClient) -> None:
    answer = await client.post("/keys", json=minimal(APIKey, key_hash=SECRET))
    assert answer.status_code == 200
    assert SECRET not in answer.text
    assert "key_hash" not in answer.json()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("account_name", ""),
        ("account_name", None),
        ("account_name", SECRET + "\0"),
        ("status", SECRET),
        ("id", SECRET),
        ("error_count", -1),
        ("token_expires_at", "2027-01-01T00:00:00"),
        ("tags", {"deep": [SECRET, "\0"]}),
        ("tags", SECRET),
        ("quote_permissions", [{"name": SECRET}]),
        ("private_key", {"value": SECRET}),
        ("private_key", MASK),
        ("nickname", SECRET),
        ("tiger_id_fingerprint", SECRET),
        ("api_keys", [{"name": SECRET}]),
        ("token_statuses", SECRET),
    ],
)
async def test_an_invalid_body_is_not_echoed(
    client: AsyncClient, session: AsyncSession, field: str, value: object
) -> None:
    answer = await client.post("/accounts", json=body(**{field: value}))
    assert answer.status_code == 422
    assert {problem["loc"][1] for problem in answer.json()["detail"]} == {field}
    assert SECRET not in answer.text
    assert (await crud.accounts.list_accounts(session)).items == []


@pytest.mark.parametrize(
    "content", [f'["{SECRET}"]', f'"{SECRET}"', f'{{"tiger_id": "{SECRET}', "null", "", "{}"]
)
async def test_a_malformed_body_is_not_echoed(client: AsyncClient, content: str) -> None:
    headers = {"content-type": "application/json"}
    answer = await client.post("/accounts", content=content, headers=headers)
    assert answer.status_code == 422
    assert SECRET not in answer.text


async def test_the_api_s_description_is_complete(client: AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name in ("TigerAccount-Input", "TigerAccount-Output"):
        assert schemas[name]["properties"].keys() == TigerAccount.model_fields.keys()
    assert schemas["TigerAccount-Input"]["properties"]["private_key"]["anyOf"][0]["writeOnly"]
