"""EXPLAIN shows that every index is used by its query, on tables of realistic size."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from sqlalchemy import text

from tests.support.index_queries import NOW, SERVES, id_of, limited_use
from tests.support.plans import Plan, Query, as_json, nodes, plan_of, used_indexes
from tests.support.servers import create_database
from tiger_db import AuditLog, Database
from tiger_db.checks import accounts, keys, trail
from tiger_db.crud import api_keys, audit_logs, token_status
from tiger_db.crud.api_keys.authorize import FIND_KEY
from tiger_db.crud.api_keys.key_format import checksum
from tiger_db.crud.audit_logs.queries import EVENTS
from tiger_db.crud.pagination import encode_cursor
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidAPIKey
from tiger_db.testing import databases

# Row n has the account number Un, and 0…0n in its ids.
ROWS = """
CREATE FUNCTION id(n bigint) RETURNS uuid LANGUAGE sql AS
    $$ SELECT ('0190a000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid $$;

INSERT INTO tiger_accounts (id, account_name, account_number, account_type, status, tiger_id,
    tiger_id_fingerprint, private_key, private_key_format, environment, access_token,
    token_expires_at, token_refresh_at, is_default_trading, is_default_data, market_permissions,
    quote_permissions, error_count, tags)
SELECT id(n), 'Main', 'U' || n, 'standard', 'active', '', sha256(n::text::bytea), '', 'unknown',
    'PROD', '', now() + make_interval(mins => n::int), now() + make_interval(mins => n::int - 60),
    n = 1, n = 2, '{}', '[]', 0, '{}'
FROM generate_series(1, 10000) n;

INSERT INTO api_keys (id, name, key_prefix, key_hash, status, scopes, tiger_account_id,
    expires_at, usage_count, allowed_ips, allowed_user_agents, tags)
SELECT id(n), 'assistant', 'tdb_test_' || lpad(n::text, 12, '0'),
    '{SSHA256}' || encode(sha256('') || '\\x0011223344556677', 'base64'), 'active', '{mcp:read}',
    id(n), now() + make_interval(hours => n::int), 0, '{}', '{}', '{}'
FROM generate_series(1, 10000) n;

INSERT INTO api_key_limits SELECT id(n), now(), 1, now(), 1 FROM generate_series(1, 10000) n;

INSERT INTO api_key_usage
SELECT id(n), date_trunc('hour', now()) - make_interval(hours => hour), 1
FROM generate_series(1, 1000) n, generate_series(1, 10) hour;

INSERT INTO token_statuses (id, tiger_account_id, status, trigger, scheduled_at, retry_count,
    max_retries, fencing_token)
SELECT id(n), id(n / 2 + 1),
    (CASE WHEN n % 200 = 0 THEN 'pending' WHEN n % 200 = 1 THEN 'failed' ELSE 'success' END
        )::token_refresh_status,
    'manual', now() - make_interval(secs => n), 0, 3, 0
FROM generate_series(1, 15000) n;

INSERT INTO audit_logs (id, action, result, severity, tiger_account_id, api_key_id, user_id,
    session_id, request_id)
SELECT (left(uuid7_floor(date_trunc('month', now(), 'UTC') + make_interval(months => month))::text,
    24) || lpad(n::text, 12, '0'))::uuid,
    'data:query', 'success', 'low', id(n % 500), id(n % 500), n % 500, 's' || n / 5, 'r' || n
FROM generate_series(0, 2) month, generate_series(1, 8000) n;

INSERT INTO audit_seals SELECT n, '', '', '' FROM generate_series(1, 10000) n;

INSERT INTO granted_roles SELECT n, 'app' FROM generate_series(1, 10000) n;

ANALYZE;

SELECT brin_summarize_new_values(pg_class.oid) FROM pg_class JOIN pg_am ON pg_am.oid = relam
WHERE amname = 'brin' AND relkind = 'i'
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def full(server_url: str, template: str) -> AsyncIterator[Database]:
    """A database with about ten thousand rows in each table, and events in three partitions."""
    name = f"tiger_db_full_{uuid4().hex[:12]}"
    settings = await create_database(server_url, name, template)
    async with Database(settings) as database:
        async with database.engine.begin() as connection:
            for statement in ROWS.split(";"):
                await connection.exec_driver_sql(statement)
        await database.check()
        yield database
    await databases.drop(server_url, name)


async def wrong_secret(session: AsyncSession) -> None:
    body = f"tdb_test_{77:012}_{'0' * 43}"
    with pytest.raises(InvalidAPIKey):
        await api_keys.authorize_api_key(session, body + checksum(body))


async def find_key(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.exec_driver_sql(FIND_KEY, (f"tdb_test_{77:012}",))


@pytest.mark.parametrize(("index", "query"), SERVES, ids=str)
async def test_an_index_is_used_by_its_query(full: Database, index: str, query: Query) -> None:
    assert index in await used_indexes(full, query)


@pytest.mark.parametrize(
    ("query", "indexes"),
    [
        (wrong_secret, {"uq_api_keys_key_prefix", "pk_tiger_accounts"}),
        (find_key, {"uq_api_keys_key_prefix", "pk_tiger_accounts"}),
        (limited_use, {"pk_api_keys", "pk_tiger_accounts", "pk_api_key_limits"}),
    ],
)
async def test_authorizing_a_key_reads_by_index_only(
    full: Database, query: Query, indexes: set[str]
) -> None:
    assert await used_indexes(full, query) == indexes
    plan = await plan_of(full, query)
    scanned = {node["Relation Name"] for node in plan if node["Node Type"] == "Seq Scan"}
    assert scanned <= {"trading_pauses"}  # this table has at most one row


@pytest.mark.parametrize(
    "query",
    [
        lambda s: token_status.claim_due(s, worker="w", limit=1),
        lambda s: token_status.claim(s, id_of(200), worker="w"),
        token_status.schedule_due,
        token_status.next_due,
        lambda s: token_status.overview(s, since=NOW),
    ],
)
async def test_work_on_refreshes_reads_by_index_only(full: Database, query: Query) -> None:
    assert "Seq Scan" not in {node["Node Type"] for node in await plan_of(full, query)}


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (trail.UNSEALED_EVENTS, "position"),  # part of the name of an index of a partition
        (accounts.OPEN_REFRESHES, "ix_token_statuses_due|uq_token_statuses_tiger_account_id_open"),
        (accounts.DUE_TOKENS, "ix_tiger_accounts_token_refresh_at"),
        (keys.EXPIRING_KEYS, "ix_api_keys_expires_at_id"),
    ],
)
async def test_the_doctor_scans_no_large_table(full: Database, statement: str, index: str) -> None:
    async with full.session() as session:
        plan = await session.scalar(text(f"EXPLAIN (FORMAT JSON) {statement}"))
        filled = set(
            await session.scalars(
                text("SELECT relname FROM pg_class WHERE relkind = 'r' AND reltuples > 1000")
            )
        )
    found = [*nodes(as_json(plan)[0]["Plan"])]
    assert any(re.search(index, node.get("Index Name", "")) for node in found)
    read = {node["Relation Name"] for node in found if node["Node Type"] == "Seq Scan"}
    assert not read & filled


async def test_every_index_has_its_query(full: Database) -> None:
    async with full.session() as session:
        indexes = await session.scalars(
            text(
                "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'"
                " AND tablename <> 'tiger_db_alembic_version' AND tablename !~ '^audit_logs_'"
            )
        )
        assert set(indexes) == {index for index, _ in SERVES}


# Partitions


def partitions(plan: Plan) -> set[str]:
    return {node["Relation Name"] for node in plan if "Relation Name" in node}


def month(ahead: int) -> datetime:
    """Return the start of the month, this many months ahead."""
    years, months = divmod(NOW.month - 1 + ahead, 12)
    return datetime(NOW.year + years, months + 1, 1, tzinfo=UTC)


async def test_an_event_id_is_looked_up_in_its_month_only(full: Database) -> None:
    milliseconds = int(month(2).timestamp() * 1000)
    event_id = UUID(int=milliseconds << 80 | 5)
    plan = await plan_of(full, lambda s: s.get(AuditLog, event_id))
    assert partitions(plan) == {f"audit_logs_{month(2):%Y_%m}"}


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        (month(1), month(2), {month(1)}),
        (month(1) + timedelta(days=3), month(1) + timedelta(days=4), {month(1)}),
        (month(1) + timedelta(days=3), month(2) + timedelta(days=3), {month(1), month(2)}),
    ],
)
async def test_a_time_window_reads_only_its_months(
    full: Database, since: datetime, until: datetime, expected: set[datetime]
) -> None:
    plan = await plan_of(full, partial(audit_logs.search, since=since, until=until))
    assert partitions(plan) == {f"audit_logs_{start:%Y_%m}" for start in expected}


async def test_security_events_read_no_earlier_month(full: Database) -> None:
    async with full.engine.begin() as connection:
        await connection.exec_driver_sql(
            "CREATE TABLE audit_logs_2020_01 PARTITION OF audit_logs"
            " FOR VALUES FROM (uuid7_floor('2020-01-01Z')) TO (uuid7_floor('2020-02-01Z'))"
        )
    plan = await plan_of(full, audit_logs.get_security_events)
    assert f"audit_logs_{month(0):%Y_%m}" in partitions(plan)
    assert "audit_logs_2020_01" not in partitions(plan)


async def test_a_deep_page_reads_no_later_month(full: Database) -> None:
    after = encode_cursor(EVENTS, UUID(int=int(month(1).timestamp() * 1000) << 80 | 10**6))
    plan = await plan_of(full, partial(audit_logs.get_recent_events, after=after))
    assert f"audit_logs_{month(2):%Y_%m}" not in partitions(plan)
    assert not [node for node in plan if node["Node Type"] in {"Seq Scan", "Sort"}]
