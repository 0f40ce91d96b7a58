"""Views of accounts and API keys: the classes, and responses of a FastAPI application."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from pydantic import TypeAdapter
from sqlalchemy import text
from sqlalchemy.orm import class_mapper

from tests.support import factories
from tiger_db import AccountView, APIKey, APIKeyView, Page, TigerAccount, crud
from tiger_db.database import AsyncSession
from tiger_db.models import Entity
from tiger_db.models.views import EntityView
from tiger_db.redaction import MASK

SECRET = "never-in-a-view"
SECRETS: dict[str, Any] = {
    name: f"{SECRET}-{name}"
    for name in ("tiger_id", "private_key", "secret_key", "access_token", "refresh_token")
}
# Columns that no view shows, because they contain a secret or are derived from a secret.
HIDDEN: dict[type[Entity], set[str]] = {
    TigerAccount: {*SECRETS, "tiger_id_fingerprint", "private_key_format"},
    APIKey: {"key_hash", "pepper_id", "mac", "mac_denied_at"},
}
# Columns that views show. A new column must be added here or to HIDDEN.
SHOWN: dict[type[Entity], set[str]] = {
    TigerAccount: {
        "id", "created_at", "updated_at", "account_name", "account_number", "account_type",
        "status", "license", "environment", "server_url", "token_expires_at", "token_refresh_at",
        "is_default_trading", "is_default_data", "market_permissions", "quote_permissions",
        "client_options", "auto_suspended", "error_count", "last_error", "last_error_at",
        "failing_until", "description", "tags",
    },
    APIKey: {
        "id", "created_at", "updated_at", "name", "key_prefix", "root_id", "successor_id",
        "status", "scopes", "tiger_account_id", "expires_at", "last_used_at", "usage_count",
        "rate_limit_per_hour", "rate_limit_per_day", "allowed_ips", "allowed_user_agents",
        "created_by", "revoked_at", "revocation_reason", "description", "tags",
    },
}  # fmt: skip
VIEWS: list[tuple[type[Entity], type[EntityView]]] = [
    (TigerAccount, AccountView),
    (APIKey, APIKeyView),
]


@pytest.mark.parametrize(("entity", "view"), VIEWS)
def test_every_column_is_shown_or_hidden(entity: type[Entity], view: type[EntityView]) -> None:
    assert view.model_fields.keys() == SHOWN[entity]
    assert SHOWN[entity] ^ HIDDEN[entity] == {*class_mapper(entity).local_table.c.keys()}


@pytest.fixture
async def client(session: AsyncSession) -> AsyncIterator[AsyncClient]:
    app = FastAPI()

    @app.get("/model", response_model=list[AccountView])
    async def model() -> object:
        return (await crud.accounts.list_accounts(session, load=["api_keys"])).items

    @app.get("/sequence")
    async def sequence() -> Sequence[AccountView]:
        return (await crud.accounts.list_accounts(session)).items

    @app.get("/page")
    async def page() -> Page[AccountView]:
        return await crud.accounts.list_accounts(session, count=True)

    @app.get("/one")
    async def one() -> AccountView:
        return (await crud.accounts.list_accounts(session)).items[0]

    @app.get("/keys")
    async def keys() -> Page[APIKeyView]:
        return await crud.api_keys.list_api_keys(session)

    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("path", ["model", "sequence", "page", "one"])
async def test_a_response_has_no_secret_and_no_mask(
    client: AsyncClient, session: AsyncSession, path: str
) -> None:
    account = await factories.account(session, **SECRETS, tags={"team": ["a"]})
    session.expunge_all()
    answer = await client.get(f"/{path}")
    assert answer.status_code == 200
    assert SECRET not in answer.text
    assert MASK not in answer.text
    shown = answer.json()
    if path == "page":
        assert (shown["total"], shown["next_cursor"]) == (1, None)
        shown = shown["items"]
    (row,) = [shown] if path == "one" else shown
    assert row == json.loads(account.model_dump_json(include=SHOWN[TigerAccount]))
    assert row["created_at"] is not None


async def test_a_response_with_keys_has_neither_hash_nor_pepper(
    client: AsyncClient, session: AsyncSession
) -> None:
    key, _ = await factories.api_key(session, allowed_ips=["10.0.0.0/8"])
    answer = await client.get("/keys")
    assert key.key_hash not in answer.text
    assert answer.json()["items"] == [json.loads(key.model_dump_json(include=SHOWN[APIKey]))]


async def test_openapi_has_the_shown_fields_which_are_null_only_where_the_column_can_be(
    client: AsyncClient,
) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for entity, view in VIEWS:
        properties = schemas[view.__name__]["properties"]
        assert properties.keys() == SHOWN[entity]
        columns = class_mapper(entity).local_table.c
        nullable = {name for name in properties if columns[name].nullable}
        assert nullable == {
            name
            for name, described in properties.items()
            if {"type": "null"} in described.get("anyOf", [])
        }
        assert set(schemas[view.__name__]["required"]) == SHOWN[entity]
    assert "TigerAccount" not in str(schemas)
    assert "key_hash" not in str(schemas)


@pytest.mark.parametrize("validate", [AccountView.model_validate,
                                      TypeAdapter(AccountView).validate_python])  # fmt: skip
async def test_the_view_of_an_account_is_no_account_and_shares_no_value(
    session: AsyncSession, validate: Any
) -> None:
    account = await factories.account(session, **SECRETS, tags={"team": ["a"]})
    view = validate(account)
    assert type(view) is AccountView
    assert not hasattr(view, "private_key")
    assert view.model_dump().keys() == SHOWN[TigerAccount]
    assert MASK not in repr(view)
    team: Any = view.tags["team"]
    team.append("b")
    assert account.tags == {"team": ["a"]}
    assert not session.dirty


async def test_a_stored_value_that_is_invalid_now_is_shown(session: AsyncSession) -> None:
    account = await factories.account(session)
    await session.execute(
        text("ALTER TABLE tiger_accounts DROP CONSTRAINT ck_tiger_accounts_account_name_min_1")
    )
    await session.execute(text("UPDATE tiger_accounts SET account_name = ''"))
    await session.refresh(account)
    assert AccountView.model_validate(account).account_name == ""


async def test_a_view_is_read_from_a_response(session: AsyncSession) -> None:
    view = AccountView.model_validate(await factories.account(session, tags={"a": [1]}))
    assert AccountView.model_validate_json(view.model_dump_json()) == view
    assert AccountView.model_validate(view) == view
