"""Rows for the dashboard: more accounts, API keys, events and refreshes than one page shows."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from tests.support import factories
from tiger_db import (
    AccountStatus,
    APIKeyScope,
    AsyncSession,
    Database,
    MarketPermission,
    RefreshTrigger,
    TigerEnvironment,
    TigerLicense,
    crud,
)

SECRETS = ("tiger-id-777", "private-key-777", "access-token-777")
NAMES = [
    f"{tree} {kind}"
    for kind in ("Paper", "Income", "Growth")
    for tree in ("Alder", "Birch", "Cedar", "Elm", "Fir", "Larch", "Maple", "Oak", "Pine")
]
KEYS = {
    "assistant": [APIKeyScope.MCP_WRITE, APIKeyScope.TRADE_WRITE],
    "nightly-report": [APIKeyScope.ACCOUNT_READ, APIKeyScope.DASHBOARD_READ],
    "rebalancer": [APIKeyScope.TRADE_ADMIN],
    "quotes": [APIKeyScope.MCP_READ],
    "grafana": [APIKeyScope.SYSTEM_READ],
}
USAGE = """
INSERT INTO api_key_usage (api_key_id, hour, count)
SELECT :key, date_trunc('hour', now(), 'UTC') - n * interval '1 hour',
    (CAST(:rate AS int)
        * (0.35 + 1.5 * abs(sin(n / 70.0 + :phase)) + abs(hashint8(n)) % 100 / 160.0))::int + 1
FROM generate_series(0, 24 * 29) AS n
"""
REFRESHES = """
INSERT INTO token_statuses (id, created_at, updated_at, tiger_account_id, status, trigger,
    scheduled_at, started_at, completed_at, duration_ms, retry_count, max_retries, fencing_token,
    worker, error_code, error_message)
SELECT (left(uuid7_floor(at)::text, 24) || lpad(to_hex(n), 12, '0'))::uuid, at, at,
    CAST(:account AS uuid), outcome::token_refresh_status, 'expiry_soon', at, at, at,
    180 + abs(hashint8(n)) % 900, CASE outcome WHEN 'failed' THEN 3 ELSE 0 END, 3, 1, 'worker-1',
    CASE outcome WHEN 'failed' THEN 'refresh_failed' END,
    CASE outcome WHEN 'failed' THEN 'The gateway did not answer.' END
FROM (
    SELECT n, now() - n * interval '5 hours' AS at,
        CASE WHEN n % 9 = 4 THEN 'failed' ELSE 'success' END AS outcome
    FROM generate_series(1, 30) AS n
) AS made
"""
USES = """
UPDATE api_keys SET last_used_at = now() - interval '4 minutes',
    usage_count = (SELECT sum(count) FROM api_key_usage WHERE api_key_id = :key) WHERE id = :key
"""
EVENTS = """
INSERT INTO audit_logs
    (id, created_at, action, result, severity, user_id, user_type, ip_address, request_id,
     tiger_account_id, api_key_id, error_code, error_message, duration_ms, details, tags)
SELECT (left(uuid7_floor(at)::text, 24) || lpad(to_hex(n), 12, '0'))::uuid, at,
    (ARRAY['data:query', 'mcp:tool_call', 'trade:place_order', 'dashboard:view'])[1 + n % 4],
    outcome::audit_result, (CASE outcome WHEN 'success' THEN 'low' WHEN 'error' THEN 'high'
        ELSE 'medium' END)::audit_severity,
    (ARRAY['alice', 'bob', 'carol'])[1 + n % 3], 'trader',
    ('192.0.2.' || n % 9)::inet, 'request-' || n / 3,
    CAST(:account AS uuid), CAST(:key AS uuid),
    CASE WHEN outcome <> 'success' THEN 'no_buying_power' END,
    CASE WHEN outcome <> 'success' THEN 'The order exceeds the buying power.' END,
    n % 140, jsonb_build_object('symbol', '<b>AAPL</b>', 'quantity', n % 9 + 1),
    '{"desk": "eu"}'::jsonb
FROM (
    SELECT n, now() - power(n, 1.1) * interval '13 days' / power(CAST(:count AS int), 1.1) AS at,
        CASE WHEN n % 23 = 5 THEN 'error' WHEN n % 11 = 3 THEN 'failure' ELSE 'success' END
            AS outcome
    FROM generate_series(1, CAST(:count AS int)) AS n
) AS made
"""


@dataclass(frozen=True)
class Rows:
    """The ids of some rows, and the raw keys with which the tests log in."""

    account: UUID
    key: UUID
    reader: str
    writer: str
    bound: str
    other: str
    limited: str


async def fill(database: Database, *, events: int = 300) -> Rows:
    async with database.session() as session:
        return await _fill(session, events)


async def _fill(session: AsyncSession, events: int) -> Rows:
    chance = random.Random(18)
    now = datetime.now(UTC)
    accounts = []
    for number, name in enumerate(NAMES):
        paper = name.endswith("Paper")
        account = await factories.account(
            session,
            account_name=name,
            account_number=f"{20260000000000000 + number}" if paper else f"{51230400 + number}",
            tiger_id=SECRETS[0],
            private_key=SECRETS[1],
            access_token=SECRETS[2],
            token_expires_at=now + timedelta(hours=chance.randrange(-5, 24 * 20)),
            license=chance.choice(list(TigerLicense)),
            environment=TigerEnvironment.SANDBOX if number % 9 == 4 else TigerEnvironment.PROD,
            market_permissions=chance.sample(list(MarketPermission), 2),
            description="Rebalanced each quarter",
            tags={"desk": chance.choice(["eu", "asia"])},
            status=AccountStatus.PENDING_VERIFICATION if number % 8 == 5 else AccountStatus.ACTIVE,
        )
        accounts.append(account)
    await crud.accounts.set_default_trading_account(session, accounts[-1].id)
    for account, times in ((accounts[-4], 4), (accounts[-5], 10), (accounts[11], 1)):
        for _ in range(times):
            await crud.accounts.record_error(session, account.id, message="timeout of the gateway")
    await crud.accounts.close(session, accounts[2].id)
    keys = []
    for number in range(22):
        name = list(KEYS)[number % len(KEYS)]
        key, _ = await factories.api_key(
            session,
            name=name if number < len(KEYS) else f"{name}-{number // len(KEYS) + 1}",
            scopes=KEYS[name],
            tiger_account_id=accounts[-1 - number].id if number % 3 == 0 else None,
            created_by=chance.choice(["alice", "bob"]),
            rate_limit_per_hour=1000 if number == 0 else None,
            rate_limit_per_day=20_000 if number == 0 else None,
        )
        keys.append(key)
    for key, rate in zip(keys[:7], (420, 95, 260, 150, 30, 12, 7), strict=True):
        await session.execute(text(USAGE), {"key": key.id, "rate": rate, "phase": rate / 7})
        await session.execute(text(USES), {"key": key.id})
    await crud.api_keys.revoke(session, keys[8].id, reason="leaked")
    await session.execute(text(REFRESHES), {"account": accounts[-1].id})
    for number, account in enumerate(accounts[-12:-1]):
        if account.status == AccountStatus.ACTIVE:
            await crud.token_status.create_refresh_operation(
                session,
                tiger_account_id=account.id,
                trigger=chance.choice(list(RefreshTrigger)),
                scheduled_at=now + timedelta(hours=number),
            )
    await session.execute(
        text(EVENTS), {"account": accounts[-1].id, "key": keys[0].id, "count": events}
    )
    raw = {}
    logins: dict[str, dict[str, Any]] = {
        "reader": {"scopes": [APIKeyScope.DASHBOARD_READ]},
        "writer": {"scopes": [APIKeyScope.DASHBOARD_WRITE]},
        "bound": {"scopes": [APIKeyScope.DASHBOARD_READ], "tiger_account_id": accounts[0].id},
        "other": {"scopes": [APIKeyScope.MCP_ADMIN]},
        "limited": {"scopes": [APIKeyScope.DASHBOARD_READ], "rate_limit_per_hour": 1},
    }
    for name, options in logins.items():
        _, raw[name] = await factories.api_key(session, name=name, **options)
    return Rows(account=accounts[-1].id, key=keys[0].id, **raw)
