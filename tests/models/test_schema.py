"""The database enforces the rules of the models for raw SQL too."""

import re
from collections.abc import AsyncIterator
from datetime import datetime
from enum import StrEnum
from typing import Any, get_args
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import Enum, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.types import TypeEngine
from sqlmodel import col

from tests.models.examples import ENTITIES, FIELDS, LIMITS, label, made, table_of
from tests.support import factories
from tests.support.recording import recorded
from tiger_db import APIKey, AuditLog, Database, TigerAccount, TokenStatus
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.models import Entity, metadata
from tiger_db.out_of_band import asyncpg_connection


@pytest.fixture
async def raw(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Yield an asyncpg connection whose transaction is rolled back."""
    async with asyncpg_connection(database.engine) as connection:
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()


COLUMNS = """
    SELECT relname AS table, attname AS column, attnotnull AS not_null,
        format_type(atttypid, atttypmod) AS type, col_description(attrelid, attnum) AS comment
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
        AND attnum > 0 AND NOT attisdropped AND relname <> 'tiger_db_alembic_version'
"""
CONSTRAINTS = """
    SELECT relname AS table, conname AS name, contype AS kind, pg_get_constraintdef(c.oid) AS rule
    FROM pg_constraint AS c JOIN pg_class ON pg_class.oid = conrelid
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
        AND contype <> 'n' AND relname <> 'tiger_db_alembic_version'
"""


async def columns(raw: asyncpg.Connection) -> dict[tuple[str, str], asyncpg.Record]:
    return {(row["table"], row["column"]): row for row in await raw.fetch(COLUMNS)}


async def test_the_database_has_the_models_columns_and_no_other(raw: asyncpg.Connection) -> None:
    modelled = {(table.name, column.name) for table in metadata.sorted_tables for column in table.c}
    assert (await columns(raw)).keys() == modelled


async def test_the_database_has_the_models_constraints_and_no_other(
    raw: asyncpg.Connection,
) -> None:
    modelled = {
        (table.name, constraint.name)
        for table in metadata.sorted_tables
        for constraint in table.constraints
    }
    rows = await raw.fetch(CONSTRAINTS)
    assert {(row["table"], row["name"]) for row in rows} == modelled


async def test_text_in_unique_indexes_is_compared_by_code_point(raw: asyncpg.Connection) -> None:
    """The order of another collation can change, and a unique index then accepts duplicates."""
    found = await raw.fetch("""
        SELECT attrelid::regclass::text AS index, attcollation::regcollation::text AS collation
        FROM pg_index JOIN pg_class ON pg_class.oid = indrelid JOIN pg_attribute
            ON attrelid = indexrelid AND attcollation <> 0
        WHERE indisunique AND relnamespace = 'public'::regnamespace
            AND relname <> 'tiger_db_alembic_version'
    """)
    assert {row["index"] for row in found} >= {"uq_api_keys_key_prefix"}
    assert [row["index"] for row in found if row["collation"] != '"C"'] == []


async def test_every_column_carries_a_comment(raw: asyncpg.Connection) -> None:
    assert not [place for place, column in (await columns(raw)).items() if not column["comment"]]


async def test_a_comment_is_the_field_s_description(raw: asyncpg.Connection) -> None:
    found = await columns(raw)
    for entity, name in FIELDS:
        description = entity.model_fields[name].description
        assert table_of(entity).c[name].comment == description
        assert found[table_of(entity).name, name]["comment"] == description


async def test_every_integer_has_64_bits_and_every_timestamp_a_zone(
    raw: asyncpg.Connection,
) -> None:
    types = {column["type"] for column in (await columns(raw)).values()}
    assert {"bigint", "timestamp with time zone", "jsonb", "inet", "cidr[]", "uuid"} <= types
    forbidden = r"integer|smallint|timestamp without.*|time.* without.*|json|character.*|numeric"
    assert not [type_ for type_ in types if re.fullmatch(forbidden, type_)]


@pytest.mark.parametrize("entity", ENTITIES, ids=label)
async def test_every_row_has_an_id_and_times(raw: asyncpg.Connection, entity: type[Entity]) -> None:
    found = await columns(raw)
    table = table_of(entity).name
    wanted = {"id": "uuid", "created_at": "timestamp with time zone"}
    if entity is not AuditLog:  # which is append-only
        wanted["updated_at"] = "timestamp with time zone"
    for name, type_ in wanted.items():
        assert (found[table, name]["type"], found[table, name]["not_null"]) == (type_, True)
    assert ((table, "updated_at") in found) == (entity is not AuditLog)


@pytest.mark.parametrize("entity", ENTITIES, ids=label)
async def test_a_required_field_has_a_not_null_column(
    raw: asyncpg.Connection, entity: type[Entity]
) -> None:
    found = await columns(raw)
    for name, field in entity.model_fields.items():
        optional = type(None) in get_args(field.annotation)
        by_the_database = name in {"created_at", "updated_at", "scheduled_at", "position"}
        not_null = found[table_of(entity).name, name]["not_null"]
        assert not_null == (not optional or by_the_database), name


def enums() -> list[tuple[str, Any]]:
    def enum_in(type_: TypeEngine[Any]) -> TypeEngine[Any]:
        return type_.item_type if isinstance(type_, ARRAY) else type_

    types = [enum_in(column.type) for entity in ENTITIES for column in table_of(entity).c]
    native = [getattr(t, "impl", t) for t in types]
    found = {str(t.name): t.enum_class for t in native if isinstance(t, Enum)}
    return sorted(found.items())


@pytest.mark.parametrize(("name", "enum"), enums(), ids=label)
async def test_an_enum_holds_the_members_values_in_their_order(
    raw: asyncpg.Connection, name: str, enum: type[StrEnum]
) -> None:
    labels = await raw.fetchval("SELECT enum_range(NULL::%s)::text[]" % name)  # noqa: UP031
    assert labels == [member.value for member in enum]


async def test_there_are_no_other_enums(raw: asyncpg.Connection) -> None:
    rows = await raw.fetch("SELECT typname FROM pg_type WHERE typtype = 'e'")
    assert {row["typname"] for row in rows} == {name for name, _ in enums()}


async def test_constraints_are_named_by_the_convention(raw: asyncpg.Connection) -> None:
    prefixes = {b"c": "ck", b"p": "pk", b"u": "uq", b"f": "fk"}
    rows = await raw.fetch(CONSTRAINTS)
    assert {row["kind"] for row in rows} == prefixes.keys()
    for row in rows:
        prefix = f"{prefixes[row['kind']]}_{row['table']}"
        assert row["name"] == prefix or row["name"].startswith(f"{prefix}_")
    indexes = await raw.fetch(
        "SELECT indexname, tablename FROM pg_indexes WHERE schemaname = 'public'"
        " AND tablename !~ '^(audit_logs_|tiger_db_alembic_version)'"
    )
    for row in indexes:
        assert re.match(f"(ix|uq|pk)_{row['tablename']}", row["indexname"])


async def stored(session: AsyncSession, entity: type[Entity]) -> Entity:
    """Insert a row of the entity."""
    of_account = entity.model_fields.get("tiger_account_id")
    values = {}
    if of_account is not None and of_account.is_required():
        values["tiger_account_id"] = (await factories.account(session)).id
    row = made(entity, **values)
    session.add(row)
    await session.flush()
    return row


@pytest.mark.parametrize(("entity", "name", "rule", "within", "beyond"), LIMITS, ids=label)
async def test_the_database_enforces_the_limit_of_a_field(
    session: AsyncSession,
    entity: type[Entity],
    *,
    name: str,
    rule: str,
    within: object,
    beyond: object,
) -> None:
    row = await stored(session, entity)
    if entity is AuditLog:  # whose trigger refuses every change
        await session.execute(text("SET LOCAL session_replication_role = replica"))
    table = table_of(entity).name
    value = "CAST(:value AS api_key_scope[])" if name == "scopes" else ":value"
    statement = text(f"UPDATE {table} SET {name} = {value} WHERE id = :id")
    await session.execute(statement, {"value": within, "id": row.id})
    with pytest.raises(IntegrityError) as caught:
        await session.execute(statement, {"value": beyond, "id": row.id})
    violated: Any = caught.value.orig.__cause__  # type: ignore[union-attr]
    assert violated.constraint_name == f"ck_{table}_{name}_{rule}"


@pytest.mark.parametrize(
    ("entity", "change", "error"),
    [
        (TigerAccount, "account_number = 'u1'", "ck_tiger_accounts_account_number_form"),
        (TigerAccount, "account_number = '51230321 '", "ck_tiger_accounts_account_number_form"),
        (TigerAccount, "account_number = E'51230321\\n'", "ck_tiger_accounts_account_number_form"),
        (TigerAccount, "account_number = '5123'", "ck_tiger_accounts_account_number_form"),
        (TigerAccount, "account_number = '51230321512'", "ck_tiger_accounts_account_number_form"),
        (TigerAccount, "account_number = 'A51230321'", "ck_tiger_accounts_account_number_form"),
        (TigerAccount, "tags = '[]'", "ck_tiger_accounts_tags_object"),
        (TigerAccount, "tags = 'null'", "ck_tiger_accounts_tags_object"),
        (TigerAccount, "quote_permissions = '{}'", "ck_tiger_accounts_quote_permissions_array"),
        (APIKey, "tags = '1'", "ck_api_keys_tags_object"),
        (APIKey, "scopes = NULL", 'null value in column "scopes"'),
        (APIKey, "status = 'ACTIVE'", "invalid input value for enum api_key_status"),
        (APIKey, "allowed_ips = '{10.0.0.1/8}'", "invalid cidr value"),
        (APIKey, "tiger_account_id = gen_random_uuid()", "fk_api_keys_tiger_account_id"),
        (TokenStatus, "tiger_account_id = gen_random_uuid()", "fk_token_statuses_tiger_account"),
        (TokenStatus, "retry_count = 9223372036854775808", "bigint out of range"),
        (AuditLog, "ip_address = 'localhost'", "invalid input syntax for type inet"),
        (AuditLog, "action = 'place_order'", "ck_audit_logs_action_form"),
        (AuditLog, "action = 'Trade:place_order'", "ck_audit_logs_action_form"),
        (AuditLog, "action = E'trade:place_order\\n'", "ck_audit_logs_action_form"),
        (AuditLog, "action = 'trade:place:order'", "ck_audit_logs_action_form"),
    ],
)
async def test_the_database_refuses_values_that_the_models_refuse(
    session: AsyncSession, entity: type[Entity], change: str, error: str
) -> None:
    row = await stored(session, entity)
    if entity is AuditLog:  # whose trigger refuses every change
        await session.execute(text("SET LOCAL session_replication_role = replica"))
    with pytest.raises(DBAPIError, match=re.escape(error)):
        await session.execute(
            text(f"UPDATE {table_of(entity).name} SET {change} WHERE id = :id"), {"id": row.id}
        )


@pytest.mark.parametrize("column", ["is_default_trading", "is_default_data"])
async def test_at_most_one_account_is_a_default(session: AsyncSession, column: str) -> None:
    first, second, third = [await factories.account(session) for _ in range(3)]
    statement = text(f"UPDATE tiger_accounts SET {column} = :value WHERE id = :id")
    await session.execute(statement, {"value": True, "id": first.id})
    with pytest.raises(IntegrityError, match=f"uq_tiger_accounts_{column}"):
        async with session.begin_nested():
            await session.execute(statement, {"value": True, "id": second.id})
    await session.execute(statement, {"value": False, "id": first.id})
    await session.execute(statement, {"value": True, "id": third.id})
    rows = await session.scalars(select(col(TigerAccount.id)).where(text(column)))
    assert rows.all() == [third.id]


async def test_an_account_number_is_unique(session: AsyncSession) -> None:
    account = await factories.account(session)
    session.add(made(TigerAccount, account_number=account.account_number))
    with pytest.raises(IntegrityError, match="uq_tiger_accounts_account_number"):
        await session.flush()


async def times(raw: asyncpg.Connection, table: str, row_id: UUID) -> tuple[datetime, datetime]:
    row = await raw.fetchrow(f"SELECT created_at, updated_at FROM {table} WHERE id = $1", row_id)
    return row["created_at"], row["updated_at"]


@pytest.mark.parametrize("entity", [TigerAccount, APIKey, TokenStatus], ids=label)
async def test_the_database_sets_the_times_for_raw_sql(
    clone: Database, entity: type[Entity]
) -> None:
    async with clone.session() as session:
        row = await stored(session, entity)
    table = table_of(entity).name
    raw = await connect(clone.settings)
    try:
        made_at, changed_at = await times(raw, table, row.id)
        assert made_at == changed_at == row.created_at
        # Each statement is a transaction of its own, and now() moves on from one to the next.
        await raw.execute(f"UPDATE {table} SET id = id, updated_at = '2000-01-01'")
        assert (await times(raw, table, row.id))[0] == made_at
        assert (changed_at := (await times(raw, table, row.id))[1]) > made_at

        other = UUID(int=row.id.int + 1)
        names = [c for c in table_of(entity).c.keys() if not c.endswith("_at")]  # noqa: SIM118
        new = {"id": "$1", "account_number": "'77777'", "key_prefix": "'other'"} | (
            {"status": "'success'"} if entity is TokenStatus else {}
        )
        await raw.execute(
            f"INSERT INTO {table} ({', '.join(names)})"
            f" SELECT {', '.join(new.get(name, name) for name in names)} FROM {table}",
            other,
        )
        inserted_at, updated_at = await times(raw, table, other)
        assert inserted_at == updated_at > changed_at
    finally:
        await raw.close()


async def test_an_update_returns_the_new_time_in_the_same_statement(
    clone: Database,
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    made_at = account.updated_at
    async with clone.session() as session:
        session.add(account)
        with recorded(clone) as statements:
            account.account_name = "Other"
            await session.flush()
            assert account.updated_at is not None
            assert made_at is not None
            assert account.updated_at > made_at == account.created_at
        lock, update, event = statements
        assert lock.endswith("FOR NO KEY UPDATE")
        assert update.startswith("UPDATE tiger_accounts")
        assert event.startswith("INSERT INTO audit_logs")


async def test_the_database_sets_time_and_position_of_an_event_for_raw_sql(
    raw: asyncpg.Connection,
) -> None:
    first, second = [
        await raw.fetchrow(
            "INSERT INTO audit_logs (id, action, result, severity)"
            " VALUES (gen_random_uuid(), 'data:query', 'success', 'low')"
            " RETURNING created_at, position"
        )
        for _ in range(2)
    ]
    assert first["position"] < second["position"]
    # When each was written, not when the transaction began.
    began, now = await raw.fetchrow("SELECT now(), clock_timestamp()")
    assert began < first["created_at"] < second["created_at"] < now
