"""Lookups and lists of accounts."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError

from tests.models.examples import minimal
from tests.support import factories
from tests.support.recording import recorded
from tiger_db import (
    AccountStatus,
    AccountType,
    Database,
    TigerAccount,
    TigerEnvironment,
    TigerLicense,
)
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AlreadyExists,
    InvalidCursor,
    InvalidValue,
    TigerDBError,
)

NONSENSE: Any = "nonsense"

S = AccountStatus
HOUR = timedelta(hours=1)


# Lookups


async def test_a_row_replaces_the_values_of_an_entity_that_the_query_itself_inserts(
    session: AsyncSession,
) -> None:
    session.expunge_all()
    account = TigerAccount(**minimal(TigerAccount, account_number="U12300123", tags={"a": 1e16}))
    session.add(account)
    assert await accounts.get_by_account_number(session, "U12300123") is account
    assert type(account.tags["a"]) is int  # PostgreSQL stores 1e+16 as an integer


@pytest.mark.parametrize(
    "spelling",
    ["U12300123", " u12300123\n", "U123\N{ZERO WIDTH SPACE}\N{FULLWIDTH DIGIT ZERO}0123"],
    ids=ascii,
)
async def test_an_account_is_found_by_each_spelling_of_its_number(
    session: AsyncSession, spelling: str
) -> None:
    account = await factories.account(session, account_number="U12300123")
    await factories.account(session)
    assert await accounts.get_by_account_number(session, spelling) is account
    with pytest.raises(AlreadyExists):
        await factories.account(session, account_number=spelling)


@pytest.mark.parametrize(
    "spelling", ["20150007", " 20150007\n", "2015\N{ZERO WIDTH SPACE}\N{FULLWIDTH DIGIT ZERO}007"]
)
async def test_accounts_are_found_by_each_spelling_of_their_tiger_id(
    session: AsyncSession, spelling: str
) -> None:
    account = await factories.account(session, tiger_id="20150007")
    await factories.account(session)
    assert await accounts.list_by_tiger_id(session, spelling) == [account]


async def test_looking_up_an_unknown_account_returns_none(session: AsyncSession) -> None:
    assert await accounts.get(session, uuid4()) is None
    assert await accounts.get_by_account_number(session, "no 'such\" account 🐅") is None
    assert await accounts.get_default_trading_account(session) is None
    assert await accounts.get_default_data_account(session) is None
    assert await accounts.list_by_tiger_id(session, "none") == []
    assert await accounts.list_by_tiger_id(session, "\ud800") == []


async def test_requested_relationships_are_loaded_and_others_raise(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session, tiger_account_id=account.id)
        refresh = await factories.refresh(session, account)
    async with clone.session() as session:
        loaded = await accounts.get(session, account.id, load=["api_keys", "token_statuses"])
        assert loaded is not None
    assert [k.id for k in loaded.api_keys] == [key.id]
    assert [r.id for r in loaded.token_statuses] == [refresh.id]
    async with clone.session() as session:
        bare = await accounts.get_by_account_number(session, account.account_number)
        with pytest.raises(InvalidRequestError, match="lazy='raise'"):
            _ = bare and bare.api_keys


@pytest.mark.parametrize("load", [["nothing"], ["account_name"], "api_keys"])
async def test_an_unknown_relationship_is_refused(
    session: AsyncSession, load: list[str] | str
) -> None:
    with pytest.raises(InvalidValue, match=r"has no relationship|load\n.*not str"):
        await accounts.get(session, uuid4(), load=load)


async def test_list_by_tiger_id_returns_all_accounts_of_the_id(session: AsyncSession) -> None:
    first = await factories.account(session, tiger_id="U1")
    await factories.account(session, tiger_id="U2")
    third = await factories.account(session, tiger_id="U2")
    await accounts.update(session, third.id, tiger_id="U1")
    assert await accounts.list_by_tiger_id(session, "U1") == [first, third]


# Lists


async def found(session: AsyncSession, **filters: Any) -> list[TigerAccount]:
    """Return the listed accounts, whose number is the total of the list."""
    page = await accounts.list_accounts(session, **filters, count=True)
    assert page.total == len(page)
    return page.items


async def test_accounts_are_filtered_by_one_or_several_values(session: AsyncSession) -> None:
    first = await factories.account(session, license="TBNZ", market_permissions=["US", "HK"])
    second = await factories.account(
        session, environment="SANDBOX", market_permissions=["HK"], tags={"desk": "A", "live": None}
    )
    third = await factories.account(
        session, status="suspended", account_number="U1", license="TBSG", tags={"desk": "B"}
    )
    expected: list[tuple[dict[str, Any], list[TigerAccount]]] = [
        ({}, [third, second, first]),
        ({"status": AccountStatus.ACTIVE}, [second, first]),
        ({"status": ["active", AccountStatus.SUSPENDED]}, [third, second, first]),
        ({"status": {"suspended", "closed"}}, [third]),
        ({"account_type": AccountType.GLOBAL}, [third]),
        ({"account_type": ("global", "standard", "paper")}, [third, second, first]),
        ({"environment": TigerEnvironment.SANDBOX}, [second]),
        ({"environment": [*TigerEnvironment]}, [third, second, first]),
        ({"license": "TBNZ"}, [first]),
        ({"license": ["TBNZ", "TBSG"]}, [third, first]),
        ({"license": ["tbnz", TigerLicense.TBHK]}, [first]),
        ({"market_permission": "US"}, [first]),
        ({"market_permission": ["US", "HK"]}, [second, first]),
        ({"market_permission": ["SG", "CN"]}, []),
        ({"tags": "desk"}, [third, second]),
        ({"tags": ["live", "x"]}, [second]),
        ({"tags": {"desk": "A"}}, [second]),
        ({"tags": {"desk": "A", "live": True}}, []),
        ({"tags": [{"desk": "B"}, "live"]}, [third, second]),
        ({"status": None, "license": None}, [third, second, first]),
        ({"status": "active", "market_permission": "HK", "license": "TBNZ"}, [first]),
        ({"status": "suspended", "environment": "SANDBOX"}, []),
    ]
    for filters, matching in expected:
        assert await found(session, **filters) == matching, filters


@pytest.mark.parametrize(
    "name", ["status", "account_type", "environment", "license", "market_permission", "tags"]
)
async def test_an_empty_collection_selects_no_account(session: AsyncSession, name: str) -> None:
    account = await factories.account(
        session, license="TBNZ", market_permissions=["US"], tags={"desk": "A"}
    )
    assert await found(session, **{name: []}) == []
    assert await found(session, **{name: None}) == [account]


async def test_accounts_are_filtered_by_errors_and_expiry(session: AsyncSession) -> None:
    now = datetime.now(UTC)

    async def expiring(minutes: float | None, **fields: Any) -> TigerAccount:
        at = None if minutes is None else now + timedelta(minutes=minutes)
        return await factories.account(
            session, **{"access_token": "t", "token_expires_at": at} | fields
        )

    soon, expired, later = await expiring(30), await expiring(-30), await expiring(90)
    await expiring(None)
    await expiring(30, access_token=None)
    inactive = await expiring(30, status="inactive")
    for account, counts in ((soon, True), (expired, False)):
        await accounts.record_error(session, account.id, message="no answer", counts=counts)
    hour = timedelta(hours=1)
    assert await found(session, token_expires_within=hour) == [inactive, expired, soon]
    assert await found(session, token_expires_within=timedelta(0)) == [expired]
    assert await found(session, token_expires_within=2 * hour) == [inactive, later, expired, soon]
    assert await found(session, with_errors=True) == [soon]
    assert len(await found(session, with_errors=False)) == 5
    assert await found(session, with_errors=False, token_expires_within=hour) == [inactive, expired]


async def test_a_search_finds_a_text_in_names_numbers_and_descriptions(
    session: AsyncSession,
) -> None:
    main = await factories.account(session, account_name="Main_1", account_number="U777")
    other = await factories.account(
        session, account_name="Zürich 老虎", account_number="U778", description="100% back\\slash"
    )
    # The locale of the database decides which letters differ only in case.
    folded = await session.scalar(text("SELECT lower('Ü') = 'ü'"))
    expected = {
        "": [other, main],
        "main": [main],
        "MAIN": [main],
        "n_1": [main],
        "n-1": [],
        "a_n": [],
        "m%1": [],
        "77": [other, main],
        "u777": [main],
        "778": [other],
        "0%": [other],
        "%": [other],
        "_": [main],
        "k\\s": [other],
        "\\": [other],
        "/": [],
        "ZÜRICH": [other] if folded else [],
        "Zürich": [other],
        "zürich": [other],
        "老虎": [other],
        "虎老": [],
        "main_1 ": [],
        "1u": [],
    }
    for text_, matching in expected.items():
        assert await found(session, search=text_) == matching, text_
    assert await found(session, search="77", status="active", account_type="global") == [
        other,
        main,
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "happy"},
        {"status": ["active", "happy"]},
        {"tags": 7},
        {"tags": {"desk": float("nan")}},
        {"with_errors": "yes"},
        {"token_expires_within": 60},
        {"token_expires_within": timedelta.max},
        {"search": ["a"]},
        {"search": "a\0b"},
        {"search": "\ud800"},
        {"colour": "red"},
    ],
    ids=ascii,
)
async def test_an_invalid_filter_is_refused(session: AsyncSession, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        await accounts.list_accounts(session, **wrong)


async def test_names_are_compared_by_code_point_in_any_locale(
    database: Database, session: AsyncSession
) -> None:
    """The locale of the tests' database compares by code point, too."""
    with recorded(database) as sent:
        await accounts.list_accounts(session, order_by="name")
    assert 'account_name COLLATE "C" ASC, ' in sent[-1]


@pytest.mark.slow
async def test_accounts_sorted_by_name_are_paged_in_both_directions(session: AsyncSession) -> None:
    names = ["b", "a", "B", "ä", "a", "🐅", "\N{FULLWIDTH LATIN SMALL LETTER A}", "b"]
    made = [await factories.account(session, account_name=name) for name in names]
    await factories.account(session, account_name="c", status="inactive")
    expected = sorted(made, key=lambda account: (account.account_name, account.id))
    by_name: dict[str, Any] = {"order_by": "name", "status": "active"}
    for limit in (2, 3, 8):
        pages = [await accounts.list_accounts(session, **by_name, limit=limit, count=True)]
        assert pages[0].previous_cursor is None
        while (cursor := pages[-1].next_cursor) is not None:
            pages.append(
                await accounts.list_accounts(
                    session, **by_name, limit=limit, after=cursor, count=True
                )
            )
        assert [account for page in pages for account in page] == expected
        assert {page.total for page in pages} == {8}
        for earlier, later in pairwise(pages):
            previous = await accounts.list_accounts(
                session, **by_name, limit=limit, before=later.previous_cursor, count=True
            )
            assert previous == earlier


async def test_newest_accounts_are_paged_in_both_directions(session: AsyncSession) -> None:
    made = [await factories.account(session) for _ in range(5)]
    first = await accounts.list_accounts(session, limit=2, count=True)
    second = await accounts.list_accounts(session, limit=2, after=first.next_cursor, count=True)
    last = await accounts.list_accounts(session, limit=2, after=second.next_cursor, count=True)
    assert [[*page] for page in (first, second, last)] == [made[4:2:-1], made[2:0:-1], made[:1]]
    assert (first.previous_cursor, last.next_cursor) == (None, None)
    assert [page.total for page in (first, second, last)] == [5, 5, 5]
    newer = await accounts.list_accounts(session, limit=2, before=last.previous_cursor, count=True)
    assert newer == second
    newest = await accounts.list_accounts(session, limit=2, before=newer.previous_cursor)
    assert (newest.items, newest.previous_cursor) == (first.items, None)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"order_by": "name"}),
        ({"order_by": "name"}, {}),
        ({}, {"status": "active"}),
        ({"status": "active"}, {"status": ["active", "closed"]}),
        ({"tags": "a"}, {"tags": "b"}),
        ({"with_errors": True}, {"with_errors": False}),
        ({"search": "m"}, {"search": "M"}),
        ({"token_expires_within": HOUR}, {"token_expires_within": 2 * HOUR}),
    ],
)
async def test_a_cursor_of_another_order_or_of_other_filters_is_refused(
    session: AsyncSession, given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    for _ in range(3):
        await factories.account_with_token(session, tags={"a": 1, "b": 1})
    await session.execute(text("UPDATE tiger_accounts SET error_count = 1"))
    given, wanted = ({"with_errors": True} | filters for filters in (given, wanted))
    first = await accounts.list_accounts(session, **given, limit=1)
    second = await accounts.list_accounts(session, **given, limit=1, after=first.next_cursor)
    assert len(second) == 1
    cursors: list[dict[str, Any]] = [
        {"after": first.next_cursor}, {"before": second.previous_cursor}
    ]  # fmt: skip
    for cursor in cursors:
        assert len(await accounts.list_accounts(session, **given, **cursor)) > 0
        with pytest.raises(InvalidCursor):
            await accounts.list_accounts(session, **wanted, **cursor)
    with pytest.raises(InvalidValue, match="cannot be combined"):
        await accounts.list_accounts(
            session, **given, after=first.next_cursor, before=second.previous_cursor
        )


@pytest.mark.parametrize(
    ("arguments", "statements"),
    [
        ({"limit": 2}, 1),
        ({"limit": 2, "order_by": "name"}, 1),
        ({"limit": 2, "count": True}, 2),
        ({"limit": 2, "load": ["api_keys"]}, 2),
        ({"limit": 2, "load": ["api_keys", "token_statuses"], "count": True}, 4),
        ({"limit": 3, "count": True}, 1),  # the first page has all accounts
    ],
)
async def test_a_list_sends_one_statement_for_each_page_count_and_relationship(
    clone: Database, arguments: dict[str, Any], statements: int
) -> None:
    async with clone.session() as session:
        for _ in range(3):
            account = await factories.account(session)
            await factories.api_key(session, tiger_account_id=account.id)
            await factories.refresh(session, account)
    async with clone.session() as session:
        with recorded(clone) as sent:
            page = await accounts.list_accounts(session, **arguments)
    assert len(sent) == statements
    assert page.total == (3 if "count" in arguments else None)
    for account in page:
        for name in arguments.get("load", ()):
            assert len(getattr(account, name)) == 1
        if "load" not in arguments:
            with pytest.raises(InvalidRequestError, match="lazy='raise'"):
                _ = account.api_keys


# Counts


async def test_accounts_are_counted_by_status_type_environment_and_problem(
    database: Database, session: AsyncSession
) -> None:
    empty = await accounts.counts(session)
    assert (empty.total, empty.with_errors, empty.expiring_tokens) == (0, 0, 0)
    assert empty.by_status == dict.fromkeys(AccountStatus, 0)
    assert empty.by_type == dict.fromkeys(AccountType, 0)
    assert empty.by_environment == dict.fromkeys(TigerEnvironment, 0)
    for fields in (
        {},
        {"account_number": "U1"},
        {"account_number": "U2", "status": "suspended", "environment": "SANDBOX"},
        {"account_number": "20191106192858300"},
    ):
        await factories.account(session, **fields)
    failed = await factories.account_with_token(session)
    await accounts.record_error(session, failed.id, message="no answer")
    later = datetime.now(UTC) + timedelta(hours=3)
    await factories.account_with_token(session, token_expires_at=later)
    closed = await factories.account(session)
    await accounts.close(session, closed.id)
    with recorded(database) as sent:
        counts = await accounts.counts(session)
    assert len(sent) == 1
    assert counts == accounts.AccountCounts(
        total=7,
        by_status=empty.by_status | {S.ACTIVE: 5, S.SUSPENDED: 1, S.CLOSED: 1},
        by_type=empty.by_type
        | {AccountType.STANDARD: 4, AccountType.GLOBAL: 2, AccountType.PAPER: 1},
        by_environment={TigerEnvironment.PROD: 6, TigerEnvironment.SANDBOX: 1},
        with_errors=1,
        expiring_tokens=1,
    )
    within = timedelta(hours=4)
    assert (await accounts.counts(session, within=within)).expiring_tokens == 2
    page = await accounts.list_accounts(session, token_expires_within=within, count=True)
    assert page.total == 2
    with pytest.raises(InvalidValue, match="within"):
        await accounts.counts(session, within=timedelta.max)


# Accounts whose token is due


async def test_accounts_needing_a_refresh_are_sorted_by_the_time_of_the_refresh(
    session: AsyncSession,
) -> None:
    now = datetime.now(UTC)

    async def expiring(minutes: int, **overrides: Any) -> TigerAccount:
        at = now + timedelta(minutes=minutes)
        return await factories.account_with_token(session, token_expires_at=at, **overrides)

    # `account_with_token` plans the refresh an hour before the expiry.
    soon, expired, later = await expiring(110), await expiring(-50), await expiring(130)
    await expiring(5, status="suspended")
    await expiring(5, access_token=None)
    await factories.account(session, access_token="no expiry known")
    await session.execute(text("SET LOCAL enable_indexscan = off"))  # an index scan would sort them
    needing = accounts.get_accounts_needing_token_refresh
    assert await needing(session) == [expired, soon]
    assert await needing(session, within=timedelta(hours=3)) == [expired, soon, later]
    assert await needing(session, within=timedelta(hours=3), limit=1) == [expired]


@pytest.mark.parametrize(
    "lookup",
    [
        lambda s: accounts.get(s, NONSENSE),
        lambda s: accounts.get_by_account_number(s, "a\0b"),
        lambda s: accounts.get_by_account_number(s, "\ud800"),
        lambda s: accounts.list_accounts(s, status=NONSENSE),
        lambda s: accounts.get_accounts_needing_token_refresh(s, within=timedelta.max),
        lambda s: accounts.update(s, NONSENSE, description="new"),
    ],
)
async def test_invalid_input_raises_an_error_without_the_value(
    session: AsyncSession, lookup: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    with pytest.raises(TigerDBError) as caught:
        await lookup(session)
    assert isinstance(caught.value, InvalidValue)
    assert NONSENSE not in str(caught.value)


@pytest.mark.parametrize("within", [timedelta.max, timedelta.min])
async def test_a_time_out_of_range_is_refused_whatever_the_query_plan(
    session: AsyncSession, within: timedelta
) -> None:
    await session.execute(text("SET LOCAL enable_indexscan = off"))
    await session.execute(text("SET LOCAL enable_bitmapscan = off"))
    with pytest.raises(InvalidValue, match="within"):
        await accounts.get_accounts_needing_token_refresh(session, within=within)
