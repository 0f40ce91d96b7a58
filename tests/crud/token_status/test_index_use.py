"""The plans of `test_indexes` at full size; minutes, so only in `make soak`."""

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio

from tests.support.plans import Query, plan_of, used_indexes
from tests.support.servers import create_database
from tiger_db import Database
from tiger_db.connections import connect
from tiger_db.crud import token_status
from tiger_db.testing import databases

ACCOUNTS, HISTORY = 1_000_000, 10_000_000
# A thousand refreshes are due, and as many tokens whose accounts have none.
FILL = f"""
SET session_replication_role = replica;
SET statement_timeout = 0;

CREATE FUNCTION id(n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE AS
    $$ SELECT ('0190a000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid $$;

INSERT INTO tiger_accounts (id, account_name, account_number, account_type, status, tiger_id,
    tiger_id_fingerprint, private_key, private_key_format, environment, access_token,
    token_expires_at, token_refresh_at, is_default_trading, is_default_data, market_permissions,
    quote_permissions, error_count, tags)
SELECT id(n), 'Main', 'U' || n, 'standard', 'active', '', int8send(n), '', 'unknown', 'PROD', '',
    at + interval '3 days', at, false, false, '{{}}', '[]', 0, '{{}}'
FROM generate_series(1, {ACCOUNTS}) n,
    LATERAL (SELECT now() + make_interval(secs => n - 2000)) a (at);

INSERT INTO token_statuses (id, tiger_account_id, status, trigger, scheduled_at, retry_count,
    max_retries, fencing_token)
SELECT id(n), id(n % {ACCOUNTS} + 1),
    (CASE WHEN n > {HISTORY} - 1000 THEN 'pending' WHEN n % 200 = 1 THEN 'failed' ELSE 'success' END
        )::token_refresh_status,
    'scheduled', now() - make_interval(secs => ({HISTORY} - n) / 10), 0, 3, 0
FROM generate_series(1, {HISTORY} - 1) n;

UPDATE token_statuses SET tiger_account_id = id(n)
FROM generate_series(1, 999) n WHERE token_statuses.id = id({HISTORY} - 1000 + n);

VACUUM ANALYZE tiger_accounts;

VACUUM ANALYZE token_statuses
"""

pytestmark = pytest.mark.soak


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def huge(server_url: str, template: str) -> AsyncIterator[Database]:
    name = f"tiger_db_huge_{uuid4().hex[:12]}"
    settings = await create_database(server_url, name, template)
    connection = await connect(settings)
    try:
        for statement in FILL.split(";"):
            await connection.execute(statement, timeout=3600)
    finally:
        await connection.close()
    async with Database(settings) as database:
        await database.check()
        yield database
    await databases.drop(server_url, name)


@pytest.mark.parametrize(
    ("query", "indexes"),
    [
        (
            lambda s: token_status.claim_due(s, worker="w"),
            {"ix_token_statuses_due", "pk_tiger_accounts", "pk_token_statuses"},
        ),
        (
            token_status.schedule_due,
            {
                "ix_tiger_accounts_token_refresh_at",
                "uq_token_statuses_tiger_account_id_open",
                "ix_token_statuses_tiger_account_id_id",
            },
        ),
        (token_status.next_due, {"ix_token_statuses_due", "ix_tiger_accounts_token_refresh_at"}),
    ],
    ids=["claim_due", "schedule_due", "next_due"],
)
async def test_refreshes_are_found_by_index_among_millions(
    huge: Database, query: Query, indexes: set[str]
) -> None:
    used = await used_indexes(huge, query)
    # The index of what is due holds what is open, and no more.
    assert indexes <= used <= indexes | {"ix_token_statuses_due"}
    assert "Seq Scan" not in {node["Node Type"] for node in await plan_of(huge, query)}
