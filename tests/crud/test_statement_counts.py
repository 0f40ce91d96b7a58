"""The number of SQL statements that CRUD functions send."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest

from tests.support import factories
from tests.support.lists import ACCOUNT, LISTS, cursor_of, one_row_for
from tests.support.recording import recorded
from tiger_db import Database
from tiger_db.crud import accounts, api_keys, audit_logs, token_status
from tiger_db.database import AsyncSession

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
Read = Callable[[AsyncSession], Awaitable[object]]
LOOKUPS: dict[str, Read] = {
    "accounts.get": lambda s: accounts.get(s, ACCOUNT),
    "get_by_account_number": lambda s: accounts.get_by_account_number(s, "U1"),
    "list_by_tiger_id": lambda s: accounts.list_by_tiger_id(s, "1"),
    "get_default_trading_account": accounts.get_default_trading_account,
    "get_default_data_account": accounts.get_default_data_account,
    "get_accounts_needing_token_refresh": accounts.get_accounts_needing_token_refresh,
    "api_keys.get": lambda s: api_keys.get(s, ACCOUNT),
    "get_by_prefix": lambda s: api_keys.get_by_prefix(s, "tdb_1"),
    "usage": lambda s: api_keys.usage(s, ACCOUNT, since=SINCE),
    "statistics of events": lambda s: audit_logs.statistics(s, by=("day", "user_id"), since=SINCE),
    "usage of all keys": lambda s: api_keys.usage(s, by=("day", "api_key_id"), since=SINCE),
    "audit_logs.get": lambda s: audit_logs.get(s, ACCOUNT),
    "token_status.get": lambda s: token_status.get(s, ACCOUNT),
    "get_latest_status": lambda s: token_status.get_latest_status(s, ACCOUNT),
}


@pytest.fixture
async def seeded(session: AsyncSession) -> AsyncSession:
    """A session with one account, three API keys and three cancelled refreshes."""
    await factories.account_with_token(
        session, id=ACCOUNT, account_number="U1", tiger_id="1", is_default_trading=True
    )
    for _ in range(3):
        await one_row_for("get_keys_for_account", session)
        await one_row_for("history", session)
    return session


async def test_a_lookup_sends_one_statement(database: Database, seeded: AsyncSession) -> None:
    for name, look_up in LOOKUPS.items():
        with recorded(database) as sent:
            await look_up(seeded)
        assert len(sent) == 1, name
        assert sent[0].startswith("SELECT"), name


@pytest.mark.slow
async def test_a_page_sends_one_statement_without_count_or_offset(
    database: Database, seeded: AsyncSession
) -> None:
    calls = [(name, cursor) for name in LISTS for cursor in (None, cursor_of(name, ACCOUNT))]
    for name, after in calls:
        with recorded(database) as sent:
            await LISTS[name](seeded, after=after, limit=2)
        assert len(sent) == 1, name
        assert "count(" not in sent[0].lower(), name
        assert "OFFSET" not in sent[0], name


@pytest.mark.parametrize(
    "load", [(), ("api_keys",), ("token_statuses",), ("api_keys", "token_statuses")]
)
async def test_each_loaded_relationship_sends_one_more_statement(
    database: Database, seeded: AsyncSession, load: tuple[str, ...]
) -> None:
    with recorded(database) as sent:
        account = await accounts.get(seeded, ACCOUNT, load=load)
        same = await accounts.get_by_account_number(seeded, "U1", load=load)
        assert account is same is not None
        for name in load:
            assert getattr(account, name)
    assert len(sent) == 2 * (1 + len(load))


@pytest.mark.slow
async def test_one_event_sends_one_statement_and_a_batch_at_most_two(
    database: Database, session: AsyncSession
) -> None:
    events = [factories.new_event() for _ in range(1000)]
    await audit_logs.get_recent_events(session)
    with recorded(database) as sent:
        await audit_logs.log_event(session, action=events[0].action)
    assert len(sent) == 1
    with recorded(database) as sent:
        await audit_logs.log_events(session, events)
    assert len(sent) <= 2


async def test_a_claim_looks_for_lost_refreshes_only_when_no_more_are_due(
    database: Database, session: AsyncSession
) -> None:
    """The search reads all due refreshes, which is slow with a backlog."""
    for _ in range(3):
        await factories.refresh(session)
    counts = []
    for limit in (2, 2):
        with recorded(database) as statements:
            claims = await token_status.claim_due(session, worker="w", limit=limit)
        counts.append((len(claims), len([s for s in statements if "token_statuses" in s])))
    assert counts == [(2, 1), (1, 2)]
