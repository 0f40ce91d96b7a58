import asyncio
import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.support import factories
from tests.support.contexts import change_context
from tests.support.encryption_keys import store_unbound, without_mark
from tests.support.factories import plain
from tests.support.recording import recorded
from tests.support.trail import exported
from tiger_db import AccountStatus, AuditAction, AuditResult, Database, Settings, audit, crud
from tiger_db.audit.exporting import read_export
from tiger_db.audit.seal_format import Seal
from tiger_db.connections import connect, maintenance_engine
from tiger_db.database import AsyncSession
from tiger_db.errors import AlreadyExists, MigrationError, MissingReference, SchemaMismatch
from tiger_db.migrations import (
    MONTHS_AHEAD,
    SchemaState,
    downgrade,
    drift,
    history,
    upgrade,
)
from tiger_db.models.accounts import normalize_account_number
from tiger_db.models.secrets import key_provider
from tiger_db.signing import parse_public_key
from tiger_db.sqlstates import classify

EVERYTHING = """
SELECT 'relation', relname::text, relkind::text FROM pg_class
    WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT 'type', typname, typtype::text FROM pg_type
    WHERE typnamespace = 'public'::regnamespace
UNION ALL SELECT 'function', proname, prosrc FROM pg_proc
    WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'schema', nspname, '' FROM pg_namespace WHERE nspname !~ '^pg_'
"""


async def everything(engine: AsyncEngine) -> set[tuple[Any, ...]]:
    """Return all objects of the database except the table of Alembic."""
    async with engine.connect() as connection:
        rows = await connection.execute(text(EVERYTHING))
        return {tuple(row) for row in rows if "tiger_db_alembic_version" not in row[1]}


# Upgrades and downgrades


@pytest.mark.slow
async def test_a_downgrade_to_base_removes_all_objects(empty_database: Settings) -> None:
    async with maintenance_engine(empty_database) as engine:
        nothing = await everything(engine)
        state = await upgrade(engine)
        assert (state.current, state.problem) == (state.head, None)
        whole = await everything(engine)
        assert len(whole) > len(nothing) + 50
        assert (await downgrade(engine, "base")).current is None
        assert await everything(engine) == nothing
        await upgrade(engine)
        assert await everything(engine) == whole
        assert await drift(engine) == []


async def test_upgrading_again_changes_nothing(clone_settings: Settings) -> None:
    async with maintenance_engine(clone_settings) as engine:
        before = await everything(engine)
        assert (await upgrade(engine)).problem is None
        assert await everything(engine) == before


@pytest.mark.slow
async def test_concurrent_upgrades_wait_for_each_other(empty_database: Settings) -> None:
    async def one() -> SchemaState:
        async with maintenance_engine(empty_database) as engine:
            return await upgrade(engine)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(4)]
    assert [task.result().problem for task in tasks] == [None] * 4


@pytest.mark.parametrize("revision", ["nonsense", "+70", "-99"])
async def test_an_unknown_revision_is_refused(clone_settings: Settings, revision: str) -> None:
    async with maintenance_engine(clone_settings) as engine:
        before = await everything(engine)
        with pytest.raises(MigrationError):
            await upgrade(engine, revision)
        with pytest.raises(MigrationError):
            await downgrade(engine, revision)
        assert await everything(engine) == before
        assert (await upgrade(engine)).problem is None  # the lock was released


async def test_migrations_have_no_query_timeout(clone: Database) -> None:
    hurried = clone.settings.model_copy(update={"db_query_timeout": 0.001})
    async with maintenance_engine(hurried) as engine, engine.connect() as connection:
        assert await connection.scalar(text("SHOW statement_timeout")) == "0"


# 0002

ACCOUNT_AT_0001 = text("""
INSERT INTO tiger_accounts (
    id, account_name, account_number, account_type, status, tiger_id, tiger_id_fingerprint,
    private_key, private_key_format, secret_key, environment, access_token, refresh_token,
    token_expires_at, is_default_trading, is_default_data, market_permissions, quote_permissions,
    error_count, tags
) VALUES (
    gen_random_uuid(), 'Main', cast(:number AS text), 'standard', cast(:status AS account_status),
    'id', 'print', 'private', 'PK8', 'secret', 'PROD', 'access', 'refresh', '2030-01-01',
    :is_default, :is_default, '{US}', '[]', 3, '{}'
)
""")


async def accounts_in(engine: AsyncEngine) -> dict[str, dict[str, Any]]:
    """Return the stored accounts by account number."""
    async with engine.connect() as connection:
        rows = await connection.execute(text("SELECT * FROM tiger_accounts"))
        return {row["account_number"]: dict(row) for row in rows.mappings()}


@pytest.mark.slow
async def test_0002_removes_the_credentials_of_closed_accounts(empty_database: Settings) -> None:
    statuses = ["active", "inactive", "suspended", "pending_verification", "closed"]
    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0001")
        async with engine.begin() as connection:
            for status in statuses:
                values = {"number": status, "status": status, "is_default": status == "closed"}
                await connection.execute(ACCOUNT_AT_0001, values)
        before = await accounts_in(engine)
        await upgrade(engine, "0002")
        after = await accounts_in(engine)
        await upgrade(engine)
        assert await drift(engine) == []
    added: dict[str, object] = {"client_options": {}, "auto_suspended": False}
    closed, was = after.pop("closed"), before.pop("closed")
    assert after == {number: row | added for number, row in before.items()}
    assert closed.pop("updated_at") > was.pop("updated_at")
    assert closed == was | added | {
        "private_key": None,
        "secret_key": None,
        "access_token": None,
        "refresh_token": None,
        "token_expires_at": None,
        "is_default_trading": False,
        "is_default_data": False,
    }


@pytest.mark.slow
async def test_0002_can_be_undone_and_repeated_with_data(clone: Database) -> None:
    async with clone.session() as session:
        used = await factories.account(session, access_token="t", client_options={"timeout": 7})
        failed = await factories.account(session)
        change_context(session, suspend_after=1)
        await crud.accounts.record_error(session, failed.id, message="no answer")
        closed = await factories.account(session)
        await crud.accounts.close(session, closed.id)
    before = await accounts_in(clone.engine)
    await clone.close()
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0001")
        down = await accounts_in(engine)
        assert down[closed.account_number]["private_key"] == b""  # no key decrypts it
        assert down[closed.account_number]["status"] == "closed"
        await upgrade(engine)
        after = await accounts_in(engine)
        assert await drift(engine) == []
    # Values without a column in 0001 are lost.
    before[used.account_number]["client_options"] = {}
    before[failed.account_number]["auto_suspended"] = False
    for row in (before[closed.account_number], after[closed.account_number]):
        del row["updated_at"]
    assert after == before
    async with clone.session() as session:
        read = await crud.accounts.get(session, used.id)
        assert read is not None
        assert plain(read.private_key) == "test_key"
        await crud.accounts.reset_errors(session, failed.id)
        still = await crud.accounts.get(session, failed.id)
        assert still is not None
        assert still.status == AccountStatus.SUSPENDED
        await crud.accounts.reopen(session, closed.id, private_key="new")


# 0005


@pytest.mark.slow
async def test_0005_sets_the_refresh_time_to_an_hour_before_expiry(
    empty_database: Settings,
) -> None:
    expiry, due = datetime(2030, 1, 1, tzinfo=UTC), datetime(2029, 12, 31, 23, tzinfo=UTC)
    values = {"status": "active", "is_default": False}
    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0001")
        async with engine.begin() as connection:
            await connection.execute(ACCOUNT_AT_0001, values | {"number": "expires"})
            await connection.execute(ACCOUNT_AT_0001, values | {"number": "lasts"})
            await connection.execute(
                text("UPDATE tiger_accounts SET token_expires_at = NULL WHERE account_number = :n"),
                {"n": "lasts"},
            )
        await upgrade(engine, "0004")
        before = await accounts_in(engine)
        for _ in range(2):
            await upgrade(engine, "0005")
            after = await accounts_in(engine)
            assert after["expires"].pop("token_refresh_at") == due
            assert after["lasts"].pop("token_refresh_at") is None
            assert after["expires"]["token_expires_at"] == expiry
            assert undated(after) == undated(before)
            await downgrade(engine, "0004")
            assert undated(await accounts_in(engine)) == undated(before)
            assert await functions(engine, "notify_refresh") == 0
        await upgrade(engine)
        assert await drift(engine) == []
        assert await functions(engine, "notify_refresh") == 2


# 0007

KEY_AT_0005 = text("""
INSERT INTO api_keys (id, name, key_prefix, key_hash, status, scopes, usage_count, allowed_ips,
    allowed_user_agents, tags)
SELECT ('0190a000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid, name, 'tdb_test_' || n, 'hash',
    'active', '{mcp:read}', 0, '{}', '{}', '{}'
FROM unnest(cast(:names AS text[])) WITH ORDINALITY AS key (name, n)
""")
ROTATED_AT_0005 = text("""
INSERT INTO audit_logs (id, action, result, severity, api_key_id, new_values)
SELECT gen_random_uuid(), 'api_key:rotate', 'success', 'low', k.id,
    jsonb_build_object('successor', coalesce(s.id::text, cast(:to AS text)))
FROM api_keys AS k LEFT JOIN api_keys AS s ON s.name = cast(:to AS text) WHERE k.name = :key
""")
COUNT_AT_0005 = text("""
INSERT INTO api_key_limits (api_key_id, hour, hour_count, day, day_count)
SELECT id, '2026-11-28 12:00Z'::timestamptz - make_interval(hours => :hours_ago), :hour_count,
    '2026-11-28 00:00Z'::timestamptz - make_interval(days => :days_ago), :day_count
FROM api_keys WHERE name = :key
""")
LINES = """
SELECT k.name, r.name AS root, s.name AS successor, k.root_id IS NULL AS first
FROM api_keys AS k LEFT JOIN api_keys AS r ON r.id = k.root_id
LEFT JOIN api_keys AS s ON s.id = k.successor_id
"""
COUNTS = """
SELECT coalesce(k.name, 'gone') AS name, to_char(l.hour AT TIME ZONE 'UTC', 'DD HH24'),
    l.hour_count, to_char(l.day AT TIME ZONE 'UTC', 'DD'), l.day_count
FROM api_key_limits AS l LEFT JOIN api_keys AS k ON k.id = l.api_key_id
"""


@pytest.mark.slow
async def test_0007_finds_the_lines_of_keys_and_sums_their_counts(
    empty_database: Settings,
) -> None:
    async def rows(engine: AsyncEngine, query: str) -> set[tuple[Any, ...]]:
        async with engine.connect() as connection:
            return {tuple(row) for row in await connection.execute(text(query))}

    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0005")
        async with engine.begin() as connection:
            names = ["a", "b", "c", "d", "gone", "last", "alone", "x", "y"]
            await connection.execute(KEY_AT_0005, {"names": names})
            for key, successor in (
                ("a", "b"), ("b", "c"), ("a", "d"),  # a was rotated twice
                ("gone", "last"),
                # Applications can write such events.
                ("alone", "no id"), ("alone", ""), ("alone", None),
                ("x", "y"), ("y", "x"),
            ):  # fmt: skip
                await connection.execute(ROTATED_AT_0005, {"key": key, "to": successor})
            for key, hours_ago, hour_count, days_ago, day_count in (
                ("a", 3, 7, 0, 9), ("b", 0, 2, 0, 4), ("c", 0, 1, 0, 1), ("d", 30, 5, 1, 6),
                ("last", 1, 3, 0, 5), ("alone", 0, 1, 0, 1),
            ):  # fmt: skip
                await connection.execute(
                    COUNT_AT_0005,
                    {
                        "key": key, "hours_ago": hours_ago, "hour_count": hour_count,
                        "days_ago": days_ago, "day_count": day_count,
                    },
                )  # fmt: skip
            await connection.execute(text("DELETE FROM api_keys WHERE name = 'gone'"))
        await upgrade(engine, "0007")
        lines = {
            ("a", None, "d", True), ("b", "a", "c", False), ("c", "a", None, False),
            ("d", "a", None, False), ("last", None, None, False), ("alone", None, None, True),
            ("x", None, "y", True), ("y", None, "x", True),
        }  # fmt: skip
        assert await rows(engine, LINES) == lines
        counts = {
            ("a", "28 12", 3, "28", 14), ("gone", "28 11", 3, "28", 5),
            ("alone", "28 12", 1, "28", 1),
        }  # fmt: skip
        assert await rows(engine, COUNTS) == counts
        await downgrade(engine, "0005")
        assert await rows(engine, COUNTS) == {
            ("d", "28 12", 3, "28", 14), ("last", "28 11", 3, "28", 5),
            ("alone", "28 12", 1, "28", 1),
        }  # fmt: skip
        await upgrade(engine, "0007")
        assert await rows(engine, LINES) == lines
        assert await rows(engine, COUNTS) == counts


# 0008

UNLEASED = text("""
INSERT INTO token_statuses (id, tiger_account_id, status, trigger, retry_count, max_retries,
    fencing_token, worker, lease_expires_at, details)
SELECT gen_random_uuid(), id, cast(:status AS token_refresh_status), 'manual', 1, 3, 7, :worker,
    cast(:lease AS timestamptz), cast(:details AS jsonb)
FROM tiger_accounts WHERE account_number = cast(:number AS text)
""")
REFRESHES = text("""
SELECT account_number, t.status::text, worker,
    lease_expires_at <= now() AS expired, retry_count, details
FROM token_statuses t JOIN tiger_accounts a ON a.id = tiger_account_id
""")
LEASED = "ck_token_statuses_in_progress_is_leased"


@pytest.mark.slow
async def test_0008_adds_a_lease_to_refreshes_that_cannot_be_claimed(
    empty_database: Settings,
) -> None:
    lease = datetime(2030, 1, 1, tzinfo=UTC)
    stored: dict[str, tuple[str, str | None, datetime | None, str | None]] = {
        "no lease": ("in_progress", "w", None, None),
        "no worker": ("in_progress", None, lease, '{"a": 1}'),
        "neither": ("in_progress", None, None, None),
        "claimed": ("in_progress", "w", lease, None),
        "failed": ("failed", None, None, None),
    }

    async def rows(engine: AsyncEngine) -> dict[str, tuple[Any, ...]]:
        async with engine.connect() as connection:
            return {row[0]: tuple(row[1:]) for row in await connection.execute(REFRESHES)}

    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0001")
        async with engine.begin() as connection:
            for number, (status, worker, until, details) in stored.items():
                account = {"number": number, "status": "active", "is_default": False}
                await connection.execute(ACCOUNT_AT_0001, account)
                values = {"status": status, "worker": worker, "lease": until, "details": details}
                await connection.execute(UNLEASED, values | {"number": number})
        for _ in range(2):
            await upgrade(engine)
            assert await drift(engine) == []
            after = await rows(engine)
            assert after == {
                "no lease": ("in_progress", "w", True, 1, None),
                "no worker": ("in_progress", "unknown", False, 1, {"a": 1}),
                "neither": ("in_progress", "unknown", True, 1, None),
                "claimed": ("in_progress", "w", False, 1, None),
                "failed": ("failed", None, None, 1, None),
            }
            await downgrade(engine, "0005")
            assert await rows(engine) == after
        # After an interrupted validation, the whole migration runs again.

        async with engine.begin() as connection:
            await connection.execute(
                text(f"ALTER TABLE token_statuses ADD CONSTRAINT {LEASED} CHECK (true) NOT VALID")
            )
        await upgrade(engine)
        assert await drift(engine) == []
        async with engine.connect() as connection:
            assert await connection.scalar(
                text(f"SELECT convalidated FROM pg_constraint WHERE conname = '{LEASED}'")
            )


# 0011

FORM_CONSTRAINT = "ck_tiger_accounts_account_number_form"


@pytest.mark.slow
async def test_0011_normalizes_numbers_as_the_model_does(clone: Database) -> None:
    (module,) = (script.module for script in history() if script.revision == "0011")
    points = [*range(1, 0xD800), *range(0xE000, 0x1CCD6), *range(0x1CCFA, 0x20000)]
    points += range(0xE0000, 0xE1000)  # without U+1CCD6 to U+1CCF9, which Unicode 16 added
    texts = [
        text for n in points for text in (f"u1{chr(n)}2345", f"{chr(n)}12345", f"12345{chr(n)}")
    ]
    normal = {}
    for number in texts:
        with suppress(ValueError):
            normal[number] = normalize_account_number(number)
    assert len(normal) > 3000
    statement = text(
        f"SELECT account_number, normal FROM (SELECT account_number, {module.NORMAL} AS normal"
        " FROM unnest(CAST(:texts AS text[])) AS t (account_number)) AS n WHERE normal ~ :form"
    )
    async with clone.session() as session:
        found = await session.execute(statement, {"texts": texts, "form": module.FORM})
        assert dict(map(tuple, found)) == normal


async def numbered(database: Database, *numbers: str) -> list[UUID]:
    """Store accounts with numbers that only revision 0010 accepts."""
    async with database.session() as session:
        ids = []
        for _ in numbers:
            account = await factories.account(session, access_token="t")
            await store_unbound(session, account, key_provider(session.sync_session))
            ids.append(account.id)
    await database.close()
    async with maintenance_engine(database.settings) as engine:
        await downgrade(engine, "0010")
        async with engine.begin() as connection:
            for account_id, number in zip(ids, numbers, strict=True):
                await connection.execute(
                    text("UPDATE tiger_accounts SET account_number = :number WHERE id = :id"),
                    {"number": number, "id": account_id},
                )
        await upgrade(engine)
        assert await drift(engine) == []
    return ids


async def form_is_valid(database: Database) -> bool:
    statement = f"SELECT convalidated FROM pg_constraint WHERE conname = '{FORM_CONSTRAINT}'"
    async with database.session() as session:
        return bool(await session.scalar(text(statement)))


@pytest.mark.slow
async def test_0011_normalizes_account_numbers(clone: Database) -> None:
    spellings = ["51230321", "u1 ", "U2\N{ZERO WIDTH SPACE}", "\N{FULLWIDTH DIGIT SEVEN}7777"]
    ids = await numbered(clone, *spellings)
    async with clone.session() as session:
        for account_id, number in zip(ids, ["51230321", "U1", "U2", "77777"], strict=True):
            account = await crud.accounts.get(session, account_id)
            assert account is not None
            assert account.account_number == number
    assert await form_is_valid(clone)


@pytest.mark.slow
async def test_0011_keeps_numbers_that_would_collide_and_their_accounts_stay_usable(
    clone: Database,
) -> None:
    same = ["U1", "U1 ", "u2", "U2\N{NO-BREAK SPACE}"]
    ids = await numbered(clone, *same, "DEMO", "u3")
    assert not await form_is_valid(clone)
    async with Database(without_mark(clone.settings)) as older, older.session() as session:
        stored = [await crud.accounts.get(session, account_id) for account_id in ids]
        numbers = [account.account_number for account in stored if account is not None]
        assert numbers == [*same, "DEMO", "U3"]
        for account_id, number in zip(ids, numbers, strict=True):
            found = await crud.accounts.get_by_account_number(session, number)
            assert found is not None
            assert found.id == (ids[0] if number == "U1 " else account_id)
            await crud.accounts.update_tokens(session, account_id, access_token="new")
            await crud.accounts.record_error(session, account_id, message="no answer")
        assert await crud.accounts.get_by_account_number(session, "U2") is None
        await crud.accounts.close(session, ids[1])
        with pytest.raises(AlreadyExists):
            await crud.accounts.update(session, ids[1], account_number="u1")
        await crud.accounts.update(session, ids[2], account_number="u2")
        with pytest.raises(DBAPIError, match=FORM_CONSTRAINT):
            await session.execute(
                text("UPDATE tiger_accounts SET account_number = 'u3' WHERE account_number = 'U3'")
            )


@pytest.mark.slow
async def test_0011_can_be_undone_and_repeated(clone: Database) -> None:
    await numbered(clone, "U1", "u1")
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0010")
        await upgrade(engine)
        assert await drift(engine) == []
        # After an interrupted validation, the whole migration runs again.
        await downgrade(engine, "0011")
        async with engine.begin() as connection:
            await connection.execute(
                text("UPDATE tiger_db_alembic_version SET version_num = '0010'")
            )
            await connection.execute(text("DELETE FROM tiger_accounts WHERE account_number = 'u1'"))
        await upgrade(engine)
        assert await drift(engine) == []
    assert await form_is_valid(clone)


def undated(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {number: {**row, "updated_at": None} for number, row in rows.items()}


async def functions(engine: AsyncEngine, name: str) -> int:
    """Return the number of functions and triggers with a name."""
    async with engine.connect() as connection:
        found = await connection.scalar(
            text(
                "SELECT (SELECT count(*) FROM pg_proc WHERE proname = :name)"
                " + (SELECT count(*) FROM pg_trigger WHERE tgname = :name)"
            ),
            {"name": name},
        )
    return int(found)


# 0012

# A whole trail of 61 sealed events, one of each action, and one that is not sealed: the code of
# revision 0010 sealed and exported it.
TRAIL_OF_0010 = Path(__file__).with_name("trail_of_0010.jsonl")
ACTIONS_OF_0010 = list(
    dict.fromkeys(
        json.loads(item[1])["action"]
        for item, _ in read_export(TRAIL_OF_0010)
        if not isinstance(item, Seal)
    )
)
KEY_OF_0010 = parse_public_key("VaIRs8S6d1IhzwBb+eKT9dgZfqbMSI4tRQvVGxPi5/Y=")
EVENT_AT_0010 = "INSERT INTO audit_logs SELECT * FROM json_populate_record(NULL::audit_logs, $1)"
SEAL_AT_0010 = (
    "INSERT INTO audit_seals (number, statement, signature, digests) VALUES ($1, $2, $3, $4)"
)
TYPES_OF_ACTION = """
SELECT DISTINCT format_type(atttypid, NULL) FROM pg_partition_tree('audit_logs')
JOIN pg_attribute ON attrelid = relid WHERE attname = 'action'
"""


async def load_trail_of_0010(settings: Settings) -> None:
    connection = await connect(settings)
    try:
        await connection.execute("SELECT make_audit_months(1)")
        for item, _ in read_export(TRAIL_OF_0010):
            if isinstance(item, Seal):
                seal = item.payload().number, item.payload_json, item.signature, item.digests
                await connection.execute(SEAL_AT_0010, *seal)
            else:
                position, content = item
                event = f'{{"position":{position},{content[1:]}'
                await connection.execute(EVENT_AT_0010, event)
        await connection.execute("SELECT setval('audit_logs_position_seq', 100)")
    finally:
        await connection.close()


@pytest.mark.slow
async def test_a_trail_sealed_before_0012_verifies_after_it(empty_database: Settings) -> None:
    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0010")
        await load_trail_of_0010(empty_database)
        for _ in range(2):
            await upgrade(engine)
            assert await drift(engine) == []
            async with Database(empty_database) as database:
                found = await audit.verify(database, keys=[KEY_OF_0010])
                assert (found.sound, found.seals, found.rows, found.unsealed) == (True, 3, 61, 1)
                assert "".join(await exported(database)) == TRAIL_OF_0010.read_text("utf-8")
                async with database.session() as session:
                    actions = [event.action for event in await factories.events(session)]
                    assert list(dict.fromkeys(actions)) == ACTIONS_OF_0010
                    assert {type(action) for action in actions} == {AuditAction}
                    assert (await session.scalars(text(TYPES_OF_ACTION))).all() == ["text"]
            await downgrade(engine, "0010")
            async with engine.connect() as connection:
                types = await connection.scalars(text(TYPES_OF_ACTION))
                assert types.all() == ["audit_action"]


async def test_an_export_sealed_before_0012_verifies() -> None:
    found = await audit.verify_export(TRAIL_OF_0010, keys=[KEY_OF_0010])
    assert (found.sound, found.seals, found.rows, found.unsealed) == (True, 3, 61, 1)


@pytest.mark.parametrize(
    "query", ["action = $1::audit_action", "action IN ($1::audit_action, $2::audit_action)"]
)
async def test_queries_of_0011_work_after_0012(clone: Database, query: str) -> None:
    async with clone.session() as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
        await crud.audit_logs.log_event(session, action=AuditAction.MCP_CONNECT)
    connection = await connect(clone.settings)
    try:
        arguments = ["data:query", "trade:place_order"][: query.count("$")]
        found = await connection.fetch(f"SELECT action FROM audit_logs WHERE {query}", *arguments)
        assert [row["action"] for row in found] == ["data:query"]
    finally:
        await connection.close()


@pytest.mark.slow
async def test_a_downgrade_of_0012_keeps_all_events(clone: Database) -> None:
    async with clone.session() as session:
        for action in ("backup:run", AuditAction.DATA_QUERY, "trade:close_all", "backup:run"):
            await crud.audit_logs.log_event(session, action=action, result=AuditResult.PENDING)
    before = await exported(clone)
    await clone.close()
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0010")
        async with engine.connect() as connection:
            labels = (
                await connection.scalars(text("SELECT unnest(enum_range(NULL::audit_action))"))
            ).all()
        assert labels == [*ACTIONS_OF_0010, "backup:run", "trade:close_all"]
        await upgrade(engine)
        assert await drift(engine) == []
    assert await exported(clone) == before


# 0013

FOREIGN_KEYS = """
SELECT conrelid::regclass::text, confdeltype, convalidated FROM pg_constraint
WHERE contype = 'f' AND confrelid = 'tiger_accounts'::regclass
"""


@pytest.mark.slow
async def test_0013_restricts_the_deletion_of_accounts_and_changes_no_row(clone: Database) -> None:
    async def keys(engine: AsyncEngine) -> set[tuple[Any, ...]]:
        async with engine.connect() as connection:
            return {tuple(row) for row in await connection.execute(text(FOREIGN_KEYS))}

    async def rows() -> str:
        async with clone.session() as session:
            return (await factories.everything(session)).replace("0012", "0013")

    async with clone.session() as session:
        account = await factories.account_with_token(session)
        await factories.api_key(session, tiger_account_id=account.id)
        await factories.refresh(session, account)
    delete = text("DELETE FROM tiger_accounts")
    tables = ("api_keys", "token_statuses")
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0013")
        before = await rows()
        for _ in range(2):
            await downgrade(engine, "0012")
            assert await keys(engine) == {(table, b"c", True) for table in tables}
            assert await rows() == before
            await upgrade(engine, "0013")
            assert await keys(engine) == {(table, b"r", True) for table in tables}
            assert await rows() == before
        await upgrade(engine)
        assert await drift(engine) == []
        for table in tables:
            async with engine.begin() as connection:
                with pytest.raises(DBAPIError, match=f"fk_{table}_tiger_account_id") as refused:
                    await connection.execute(delete)
                assert isinstance(classify(refused.value), MissingReference)
            async with engine.begin() as connection:
                await connection.execute(text(f"DELETE FROM {table}"))
        async with engine.begin() as connection:
            await connection.execute(delete)


@pytest.mark.slow
async def test_an_interrupted_0013_is_repeated(clone: Database) -> None:
    name = "fk_api_keys_tiger_account_id_tiger_accounts"
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0013")
        async with engine.begin() as connection:
            await connection.execute(
                text("UPDATE tiger_db_alembic_version SET version_num = '0012'")
            )
            await connection.execute(
                text(
                    f"ALTER TABLE api_keys DROP CONSTRAINT {name}, ADD CONSTRAINT {name}"
                    " FOREIGN KEY (tiger_account_id) REFERENCES tiger_accounts"
                    " ON DELETE RESTRICT NOT VALID"
                )
            )
        await upgrade(engine)
        assert await drift(engine) == []
        async with engine.connect() as connection:
            found = (await connection.execute(text(FOREIGN_KEYS))).all()
    assert [row.convalidated for row in found] == [True, True]


# 0015


@pytest.mark.slow
async def test_0015_keeps_failing_accounts_out_of_service(clone: Database) -> None:
    minutes_ago = {(2, 1): None, (3, 1): 4, (9, 4): 1, (9, 6): None, (3, None): None}
    async with clone.session() as session:
        made = [await factories.account(session) for _ in minutes_ago]
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0014")
        async with engine.begin() as connection:
            for account, (errors, minutes) in zip(made, minutes_ago, strict=True):
                await connection.execute(
                    text(
                        "UPDATE tiger_accounts SET error_count = :errors,"
                        " last_error_at = now() - make_interval(mins => :minutes) WHERE id = :id"
                    ),
                    {"errors": errors, "minutes": minutes, "id": account.id},
                )
        await upgrade(engine)
        assert await drift(engine) == []
        after = await accounts_in(engine)
    for account, expected in zip(made, minutes_ago.values(), strict=True):
        row = after[account.account_number]
        if expected is None:
            assert row["failing_until"] is None
        else:
            assert row["failing_until"] == row["last_error_at"] + timedelta(minutes=5)
            left = row["failing_until"] - datetime.now(UTC)
            assert left - timedelta(minutes=expected) < timedelta(seconds=10)


# 0019 and 0020

KEPT = text("""
SELECT pg_get_functiondef('notify_api_key_change()'::regprocedure) AS function,
    ARRAY(SELECT tgenabled::text FROM pg_trigger
        WHERE tgfoid = 'notify_api_key_change()'::regprocedure) AS enabled,
    ARRAY(SELECT DISTINCT attcollation::regcollation::text FROM pg_attribute
        WHERE (attrelid, attname) IN (('api_keys'::regclass, 'key_prefix'),
            ('tiger_accounts'::regclass, 'account_number'))) AS collations,
    pg_relation_filenode('tiger_accounts') AS file
""")


@pytest.mark.slow
async def test_0019_and_0020_can_be_undone_and_repeated(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session)
    await clone.close()
    found = []
    async with maintenance_engine(clone.settings) as engine:
        for move in (upgrade, lambda engine: downgrade(engine, "0018"), upgrade):
            await move(engine)
            async with engine.connect() as connection:
                found.append((await connection.execute(KEPT)).one())
        assert await drift(engine) == []
    assert found[0] == found[2]
    assert ["TG_TABLE_NAME" in row.function for row in found] == [False, True, False]
    assert [row.enabled for row in found] == [["A"] * 6] * 3
    assert [row.collations for row in found] == [['"C"'], ['"default"'], ['"C"']]
    assert len({row.file for row in found}) == 1, "the table is not rewritten"
    async with clone.session() as session:
        assert await crud.accounts.get_by_account_number(session, account.account_number)
        assert await crud.api_keys.get_by_prefix(session, key.key_prefix)


# 0022

SEAL = (
    "INSERT INTO audit_seals (number, statement, signature, digests) VALUES (:number, '', '', '')"
)
VALIDATED = "SELECT convalidated FROM pg_constraint WHERE conname = 'ck_audit_seals_number'"


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 0])
async def test_0022_refuses_seals_below_number_1(clone: Database, number: int) -> None:
    """A seal that is there already stays, because it is evidence."""
    await clone.close()
    async with maintenance_engine(clone.settings) as engine:
        await downgrade(engine, "0021")
        async with engine.begin() as connection:
            await connection.execute(text(SEAL), {"number": number})
        await upgrade(engine)
        assert await drift(engine) == []
        async with engine.begin() as connection:
            assert await connection.scalar(text(VALIDATED)) is (number == 1)
            assert await connection.scalar(text("SELECT number FROM audit_seals")) == number
            with pytest.raises(IntegrityError, match="ck_audit_seals_number"):
                await connection.execute(text(SEAL), {"number": -1})


# 0023

BAD_ROWS = (
    """UPDATE token_statuses SET next_refresh_at = '20000-01-01', details = '[1]',
    completed_at = 'infinity'""",
    "UPDATE tiger_accounts SET last_error_at = '4000-01-01 BC'",
    """INSERT INTO audit_logs (id, action, result, severity, details, created_at)
    VALUES (gen_random_uuid(), 'data:query', 'success', 'low', '[1]', '12000-01-01')""",
)
REPAIRED = """
SELECT next_refresh_at::text, details::text, completed_at::text, last_error_at::text
FROM token_statuses, tiger_accounts
"""
BAD_EVENT = "SELECT details::text FROM audit_logs WHERE created_at = '12000-01-01'"
NOT_VALID = """
SELECT string_agg(DISTINCT conname, ' ' ORDER BY conname) FROM pg_constraint
WHERE NOT convalidated AND coninhcount = 0
"""


@pytest.mark.slow
async def test_0023_repairs_rows_and_leaves_events_as_they_are(clone: Database) -> None:
    async with clone.session() as session:
        await factories.refresh(session)
    await clone.close()
    async with maintenance_engine(clone.settings) as engine:
        for bad in (BAD_ROWS, ()):
            await downgrade(engine, "0022")
            async with engine.begin() as connection:
                await connection.execute(text("SET LOCAL timezone = 'UTC'"))
                for statement in bad:
                    await connection.execute(text(statement))
            await upgrade(engine)
            assert await drift(engine) == []
            async with engine.begin() as connection:
                await connection.execute(text("SET LOCAL timezone = 'UTC'"))
                repaired = (await connection.execute(text(REPAIRED))).one()
                assert repaired == (
                    "9999-12-31 23:59:59.999999+00",
                    '{"_unreadable": [1]}',
                    "infinity",
                    "0001-01-01 00:00:00+00",
                )
                assert await connection.scalar(text(BAD_EVENT)) == "[1]"
                # An event that violates one constraint leaves all of the table's constraints so.
                names = await connection.scalar(text(NOT_VALID))
                assert {name.rpartition("ck_audit_logs_")[2] for name in names.split()} == {
                    "created_at_years_1_to_9999", "details_object", "new_values_object",
                    "old_values_object", "tags_object",
                }  # fmt: skip
                with pytest.raises(IntegrityError, match="ck_audit_logs"):
                    await connection.execute(text(BAD_ROWS[-1]))


# 0024

BAD_LISTS = (
    "UPDATE api_keys SET scopes = '{NULL}', allowed_ips = '{{10.0.0.0/8,::1/128}}'",
    """UPDATE tiger_accounts SET market_permissions = '{{US,HK},{NULL,SG}}',
    quote_permissions = '[1, {"name": "x", "expire_at": -1}, [{}]]'""",
)
REPAIRED_LISTS = """
SELECT k.status::text, scopes::text, allowed_ips::text, k.tags->'_unreadable'->>'scopes',
    market_permissions::text, quote_permissions::text
FROM api_keys AS k, tiger_accounts
"""


@pytest.mark.slow
async def test_0024_repairs_lists_and_revokes_their_keys(clone: Database) -> None:
    async with clone.session() as session:
        await factories.api_key(session)
        await factories.account(session)
    await clone.close()
    async with maintenance_engine(clone.settings) as engine:
        for bad in (BAD_LISTS, ()):
            await downgrade(engine, "0023")
            async with engine.begin() as connection:
                for statement in bad:
                    await connection.execute(text(statement))
            await upgrade(engine)
            assert await drift(engine) == []
            async with engine.begin() as connection:
                assert (await connection.execute(text(REPAIRED_LISTS))).one() == (
                    "revoked",
                    "{mcp:read}",
                    "{10.0.0.0/8,::1/128}",
                    "{NULL}",
                    "{US,HK,SG}",
                    '[{"_unreadable": 1}, {"name": "x", "expire_at": -1}, {"_unreadable": [{}]}]',
                )
                assert await connection.scalar(text(NOT_VALID)) is None
        for statement in BAD_LISTS:
            async with engine.connect() as connection:
                with pytest.raises(IntegrityError, match="ck_"):
                    await connection.execute(text(statement))


# Drift


@pytest.mark.slow
async def test_the_migrated_schema_matches_the_models(clone_settings: Settings) -> None:
    async with maintenance_engine(clone_settings) as engine:
        assert await drift(engine) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("ALTER TABLE api_keys ADD extra int", "remove_column api_keys extra"),
        ("ALTER TABLE api_keys DROP description", "add_column api_keys description"),
        ("ALTER TABLE audit_logs DROP user_id", "add_column audit_logs user_id"),
        ("ALTER TABLE api_keys ALTER usage_count TYPE int", "modify_type api_keys usage_count"),
        ("ALTER TABLE api_keys ALTER name DROP NOT NULL", "modify_nullable api_keys name"),
        (
            "ALTER TABLE api_keys ALTER created_at SET DEFAULT '2026-01-01'",
            "modify_default api_keys created_at",
        ),
        ("COMMENT ON COLUMN api_keys.name IS 'other'", "modify_comment api_keys name"),
        ("COMMENT ON TABLE api_key_usage IS 'other'", "add_table_comment api_key_usage"),
        ("CREATE UNIQUE INDEX extra ON api_keys (name)", "remove_index extra"),
        ("DROP INDEX ix_token_statuses_failed", "add_index ix_token_statuses_failed"),
        (
            "ALTER TABLE api_keys DROP CONSTRAINT ck_api_keys_name_max_100",
            "add_constraint ck_api_keys_name_max_100",
        ),
        (
            "ALTER TABLE api_keys ADD CONSTRAINT extra CHECK (name <> 'x')",
            "remove_constraint extra",
        ),
        (
            "ALTER TABLE api_keys DROP CONSTRAINT uq_api_keys_key_prefix",
            "add_constraint uq_api_keys_key_prefix",
        ),
        (
            "ALTER TABLE api_keys DROP CONSTRAINT fk_api_keys_tiger_account_id_tiger_accounts",
            "add_fk fk_api_keys_tiger_account_id_tiger_accounts",
        ),
        (
            """ALTER TABLE api_keys DROP CONSTRAINT fk_api_keys_tiger_account_id_tiger_accounts,
            ADD CONSTRAINT fk_api_keys_tiger_account_id_tiger_accounts
            FOREIGN KEY (tiger_account_id) REFERENCES tiger_accounts ON DELETE SET NULL""",
            "add_fk fk_api_keys_tiger_account_id_tiger_accounts",
        ),
        ("ALTER TYPE audit_result ADD VALUE 'odd'", "'odd'"),
        (
            "DROP TRIGGER set_updated_at ON api_keys",
            "trigger set_updated_at on api_keys is missing",
        ),
        ("DROP TABLE api_key_usage", "add_table api_key_usage"),
    ],
)
@pytest.mark.slow
async def test_drift_is_found(clone_settings: Settings, change: str, found: str) -> None:
    async with maintenance_engine(clone_settings) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(change)
        assert any(found in line for line in await drift(engine)), await drift(engine)


@pytest.mark.slow
async def test_partitions_are_not_reported_as_drift(clone_settings: Settings) -> None:
    async with maintenance_engine(clone_settings) as engine:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("SELECT make_audit_months(30)")
        assert await drift(engine) == []


async def test_drift_needs_the_head_revision(empty_database: Settings) -> None:
    async with maintenance_engine(empty_database) as engine:
        with pytest.raises(SchemaMismatch, match="no tiger_db schema"):
            await drift(engine)


@pytest.mark.slow
async def test_drift_only_reads(clone: Database) -> None:
    with recorded(clone) as sent:
        await drift(clone.engine)
    assert sent
    assert not [
        sql for sql in sent if not sql.strip().upper().startswith(("SELECT", "SHOW", "WITH"))
    ]


# Partitions of the audit trail


def month_starts(count: int) -> list[datetime]:
    """Return the starts of this month and the following ones, in UTC."""
    now = datetime.now(UTC)
    months = range(now.year * 12 + now.month - 1, now.year * 12 + now.month - 1 + count)
    return [datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC) for month in months]


def floor_of(moment: datetime) -> UUID:
    """Return the smallest UUIDv7 of a time: RFC 9562, section 5.7, without version and variant."""
    milliseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    return UUID(int=min(max(milliseconds, 0), 2**48 - 1) << 80)


async def bounds(session: AsyncSession) -> dict[str, tuple[UUID, UUID]]:
    rows = await session.execute(
        text(
            "SELECT relname, pg_get_expr(relpartbound, oid) FROM pg_class"
            " WHERE relispartition AND relkind = 'r' AND relname <> 'audit_logs_default'"
        )
    )
    return {
        name: (UUID(expression.split("'")[1]), UUID(expression.split("'")[3]))
        for name, expression in rows
    }


async def make_months(session: AsyncSession, ahead: int) -> int:
    made = await session.scalar(text("SELECT make_audit_months(:ahead)"), {"ahead": ahead})
    return int(made)


async def forget_months(session: AsyncSession) -> None:
    for name in await bounds(session):
        await session.execute(text(f"DROP TABLE {name}"))


@pytest.mark.parametrize(
    "zone", ["UTC", "Pacific/Kiritimati", "America/Los_Angeles", "<far>-167", "<far>+167"]
)
@pytest.mark.slow
async def test_months_are_utc_in_any_time_zone(clone: Database, zone: str) -> None:
    async with clone.session() as session:
        await forget_months(session)
        await session.execute(text(f"SET LOCAL timezone = '{zone}'"))
        assert await make_months(session, 25) == 26
        starts = month_starts(27)
        assert await bounds(session) == {
            f"audit_logs_{start:%Y_%m}": (floor_of(start), floor_of(end))
            for start, end in itertools.pairwise(starts)
        }


async def test_upgrade_creates_a_year_of_partitions(clone: Database) -> None:
    async with clone.session() as session:
        assert len(await bounds(session)) == MONTHS_AHEAD + 1
        await forget_months(session)
    await upgrade(clone.engine)
    async with clone.session() as session:
        assert len(await bounds(session)) == MONTHS_AHEAD + 1


async def test_upgrade_releases_its_lock(clone: Database) -> None:
    await upgrade(clone.engine)
    async with clone.session() as session:
        held = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database"
        mine = "datname = current_database() AND locktype = 'advisory'"
        assert await session.scalar(text(f"{held} WHERE {mine}")) == 0


@pytest.mark.parametrize("ahead", [0, 12, -1])
async def test_existing_partitions_stay(clone: Database, ahead: int) -> None:
    async with clone.session() as session:
        before = await bounds(session)
        assert await make_months(session, ahead) == 0
        assert await bounds(session) == before


async def test_events_of_the_default_partition_move_to_their_month(clone: Database) -> None:
    this_month, next_month, later = month_starts(3)
    strays = [
        factories.new_event(id=UUID(int=floor_of(moment).int + n), details={"n": n})
        for n, moment in enumerate(
            (this_month, next_month, later - timedelta(milliseconds=1), later), start=1
        )
    ]
    async with clone.session() as session:
        await forget_months(session)
        await crud.audit_logs.log_events(session, strays)
        before = [event.model_dump() for event in await factories.events(session)]
        assert await make_months(session, 1) == 2
    async with clone.session() as session:
        assert [event.model_dump() for event in await factories.events(session)] == before
        locations = await session.execute(
            text("SELECT id, tableoid::regclass::text FROM audit_logs ORDER BY id")
        )
        months = [f"audit_logs_{this_month:%Y_%m}", *[f"audit_logs_{next_month:%Y_%m}"] * 2]
        assert [partition for _, partition in locations] == [*months, "audit_logs_default"]


@pytest.mark.slow
async def test_concurrent_callers_create_each_partition_once(clone: Database) -> None:
    async with clone.session() as session:
        await forget_months(session)
    gate = asyncio.Barrier(6)

    async def make() -> int:
        async with clone.session() as session:
            await bounds(session)
            await gate.wait()
            return await make_months(session, 5)

    assert sorted(await asyncio.gather(*(make() for _ in range(6)))) == [0, 0, 0, 0, 0, 6]


async def test_a_new_partition_has_every_rule(clone: Database) -> None:
    """Its columns, constraints and indexes are those of the parent."""
    describe = """
        SELECT attname || format_type(atttypid, atttypmod) || attnotnull FROM pg_attribute
            WHERE attrelid = cast(:name as regclass) AND attnum > 0
        UNION ALL SELECT conname || pg_get_constraintdef(oid) FROM pg_constraint
            WHERE conrelid = cast(:name as regclass) AND contype = 'c'
        UNION ALL SELECT split_part(pg_get_indexdef(indexrelid), 'USING', 2) FROM pg_index
            WHERE indrelid = cast(:name as regclass)
        ORDER BY 1
    """

    async def described(session: AsyncSession, name: str) -> Sequence[str]:
        return (await session.scalars(text(describe), {"name": name})).all()

    async with clone.session() as session:
        whole = await described(session, "audit_logs")
        assert len(whole) > 35
        for name in [*await bounds(session), "audit_logs_default"]:
            assert await described(session, name) == whole


# uuid7_floor

LAST = datetime(9999, 12, 31)  # noqa: DTZ001  # for asyncpg, datetime.max is infinity


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moment=st.datetimes(max_value=LAST, timezones=st.just(UTC)))
@example(moment=datetime.min.replace(tzinfo=UTC))
@example(moment=datetime(1970, 1, 1, tzinfo=UTC) - timedelta(microseconds=1))
@example(moment=datetime(2026, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC))
async def test_uuid7_floor(session: AsyncSession, moment: datetime) -> None:
    assert await session.scalar(text("SELECT uuid7_floor(:at)"), {"at": moment}) == floor_of(moment)


@pytest.mark.parametrize(
    ("moment", "floor"),
    [
        ("-infinity", 0),
        ("4713-01-01 BC", 0),
        ("10889-08-02 05:31:50.655+00", (2**48 - 1) << 80),
        ("10889-08-02 05:31:50.654+00", (2**48 - 2) << 80),
        ("294276-12-31", (2**48 - 1) << 80),
        ("infinity", (2**48 - 1) << 80),
    ],
)
async def test_uuid7_floor_beyond_python(session: AsyncSession, moment: str, floor: int) -> None:
    found = await session.scalar(text(f"SELECT uuid7_floor('{moment}'::timestamptz)"))
    assert found == UUID(int=floor)


async def test_the_id_of_a_new_event_is_not_below_the_floor_of_its_time(
    session: AsyncSession,
) -> None:
    before = datetime.now(UTC)
    event = factories.new_event()
    after = datetime.now(UTC) + timedelta(milliseconds=1)
    assert floor_of(before) <= event.id < floor_of(after)
    assert uuid4() > floor_of(datetime(1970, 1, 1, tzinfo=UTC))
