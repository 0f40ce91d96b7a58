"""Hydrated rows are equal to those of the ORM loader."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import object_session

from tests.support import factories
from tests.support.tiger_files import PK8
from tiger_db import APIKeyScope, Database, TigerAccount, TokenStatus, crud
from tiger_db.crud.common import fetch_rows
from tiger_db.database import AsyncSession
from tiger_db.models.base import Entity, hydrate, merge_row, row_expression
from tiger_db.models.secrets import key_provider
from tiger_db.models.tracking import Tracked

FULL = {
    "private_key": PK8, "secret_key": "secret", "access_token": "token", "refresh_token": "more",
    "license": "TBHK", "environment": "SANDBOX", "market_permissions": ["US", "HK"],
    "quote_permissions": [{"name": "usQuoteBasic", "expire_at": -1}],
    "client_options": {"timeout": 15}, "tags": {"a": [1, {"b": None}]}, "description": "Ü",
    "token_expires_at": datetime(9999, 1, 1, tzinfo=UTC),
}  # fmt: skip

FULL_KEY = {
    "scopes": [APIKeyScope.TRADE_READ, APIKeyScope.MCP_ADMIN], "tags": {"a": [1, {"b": None}]},
    "allowed_ips": ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7"], "allowed_user_agents": ["a*", "Ü"],
    "expires_at": datetime(9999, 1, 1, tzinfo=UTC), "rate_limit_per_hour": 2**40,
    "rate_limit_per_day": 7, "created_by": "somebody", "description": "Ü",
}  # fmt: skip


async def values_of(session: AsyncSession, row: Entity) -> Any:
    name = row.__tablename__
    statement = f"SELECT {row_expression(type(row), 't')} FROM {name} t WHERE id = $1"
    ((values,),) = await fetch_rows(session, statement, row.id)
    return values


async def rows(session: AsyncSession) -> list[Entity]:
    claim = await factories.claim(session)
    stored = await crud.token_status.get(session, claim.id)
    assert stored is not None
    account = await factories.account(session, **FULL)
    bare = await factories.account(session)
    refresh = await factories.refresh(session, account, details={"why": ["because"]})
    key, _ = await factories.api_key(session)
    full_key, _ = await factories.api_key(session, tiger_account_id=account.id, **FULL_KEY)
    return [account, bare, refresh, stored, key, full_key]


def seen(row: Entity) -> dict[str, Any]:
    """Return names, order, types and values of the fields."""
    return {
        name: (
            type(value),
            value.get_secret_value() if hasattr(value, "get_secret_value") else value,
        )
        for name, value in vars(row).items()
        if name in type(row).model_fields or name == "tiger_id_fingerprint"
    }


async def test_hydrated_rows_are_equal_to_those_of_the_orm(session: AsyncSession) -> None:
    for row in await rows(session):
        values = await values_of(session, row)
        session.expunge_all()
        loaded = await session.get(type(row), row.id)
        assert loaded is not None
        apart = hydrate(type(row), values, key_provider(session.sync_session))
        session.expunge_all()
        taken = merge_row(session.sync_session, type(row), values)
        assert seen(apart) == seen(taken) == seen(loaded)
        assert repr(apart) == repr(taken) == repr(loaded)
        assert list(type(row).model_fields) == [
            n for n in vars(apart) if n in type(row).model_fields
        ]
        assert object_session(apart) is None
        assert taken in session
        assert not session.dirty
        assert await session.get(type(row), row.id) is taken


async def test_merging_updates_a_row_of_the_session(session: AsyncSession) -> None:
    account = await factories.account(session, **FULL)
    await session.execute(text("UPDATE tiger_accounts SET account_name = 'x', tags = '{\"c\": 1}'"))
    assert account.account_name == "Main"
    taken = merge_row(session.sync_session, TigerAccount, await values_of(session, account))
    assert taken is account
    assert (account.account_name, account.tags) == ("x", {"c": 1})
    assert not session.dirty


@pytest.mark.parametrize("known", [True, False])
async def test_changes_of_a_merged_row_are_saved(session: AsyncSession, *, known: bool) -> None:
    account = await factories.account(session, **FULL)
    values = await values_of(session, account)
    if not known:
        session.expunge_all()
    taken = merge_row(session.sync_session, TigerAccount, values)
    assert isinstance(taken.tags["a"], Tracked)
    taken.tags["a"].append("more")
    taken.description = "changed"
    await session.flush()
    session.expunge_all()
    again = await session.get(TigerAccount, account.id)
    assert again is not None
    assert again.tags == {"a": [1, {"b": None}, "more"]}
    assert again.description == "changed"


async def test_a_rollback_discards_merged_values(clone: Database) -> None:
    async with clone.session() as session:
        refresh = await factories.refresh(session)
    async with clone.sessions() as session:
        await session.execute(text("UPDATE token_statuses SET retry_count = 7"))
        taken = merge_row(session.sync_session, TokenStatus, await values_of(session, refresh))
        assert taken.retry_count == 7
        await session.rollback()
        await session.refresh(taken)
        assert taken.retry_count == 0


async def test_infinity_is_the_last_datetime(session: AsyncSession) -> None:
    refresh = await factories.refresh(session)
    await session.execute(text("UPDATE token_statuses SET scheduled_at = 'infinity'"))
    taken = merge_row(session.sync_session, TokenStatus, await values_of(session, refresh))
    assert taken.scheduled_at == datetime.max.replace(tzinfo=UTC)
