"""Errors, the suspensions they make, and the choice of accounts that may serve a request."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from tests import factories
from tests.conftest import recorded
from tests.crud.test_accounts import SECRETS
from tests.test_redaction import API_KEY, JWT, PEM
from tests.test_tokens import tiger_token
from tiger_db import (
    AccountStatus,
    AccountType,
    AuditAction,
    AuditLog,
    AuditSeverity,
    Database,
    MarketPermission,
    TigerAccount,
    TigerEnvironment,
)
from tiger_db.crud import accounts, token_status
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.errors import InvalidValue
from tiger_db.redaction import MASK

S = AccountStatus


async def fail(session: AsyncSession, account: TigerAccount, times: int = 1, **rest: Any) -> None:
    for _ in range(times):
        await accounts.record_error(session, account.id, message="no answer", **rest)


async def execute(session: AsyncSession, account: TigerAccount, assignments: str) -> None:
    """Change the account by SQL, as a person with `psql` would."""
    statement = text(f"UPDATE tiger_accounts SET {assignments} WHERE id = :id")
    await session.execute(statement, {"id": account.id})


async def state(session: AsyncSession, account: TigerAccount) -> tuple[str, bool, int]:
    """Status, whether too many errors made it, and their count: here and in the database."""
    row = await session.execute(
        text("SELECT status::text, auto_suspended, error_count FROM tiger_accounts WHERE id = :id"),
        {"id": account.id},
    )
    here = (account.status.value, account.auto_suspended, account.error_count)
    assert row.one() == here
    return here


async def events_of(session: AsyncSession, action: AuditAction) -> list[AuditLog]:
    return [event for event in await factories.events(session) if event.action == action]


# Errors


@pytest.mark.parametrize(("given", "limit"), [({}, 10), ({"suspend_after": 3}, 3)])
async def test_that_many_consecutive_errors_suspend(
    session: AsyncSession, given: dict[str, int], limit: int
) -> None:
    account = await factories.account(session)
    await fail(session, account, limit - 1, **given)
    assert await state(session, account) == ("active", False, limit - 1)
    await fail(session, account, **given)
    assert await state(session, account) == ("suspended", True, limit)
    await fail(session, account, 2, **given)
    assert await state(session, account) == ("suspended", True, limit + 2)
    (change,) = await events_of(session, AuditAction.ACCOUNT_STATUS_CHANGE)
    assert change.old_values == {"status": "active", "auto_suspended": False}
    assert change.new_values == {"status": "suspended", "auto_suspended": True}
    assert change.details == {"reason": f"{limit} consecutive errors"}
    assert change.severity == AuditSeverity.HIGH
    errors = await events_of(session, AuditAction.ACCOUNT_ERROR)
    assert [(e.old_values, e.new_values) for e in errors] == [
        ({"error_count": n}, {"error_count": n + 1}) for n in range(limit + 2)
    ]


async def test_one_error_may_be_enough(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, suspend_after=1)
    assert await state(session, account) == ("suspended", True, 1)


async def test_a_limit_that_was_lowered_counts_at_once(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 5)
    await fail(session, account, suspend_after=3)
    assert await state(session, account) == ("suspended", True, 6)


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_that_is_none_is_refused(session: AsyncSession, limit: int) -> None:
    account = await factories.account(session)
    with pytest.raises(InvalidValue, match="suspend_after"):
        await fail(session, account, suspend_after=limit)
    assert await state(session, account) == ("active", False, 0)


async def test_a_success_in_between_starts_anew(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 9)
    await accounts.reset_errors(session, account.id)
    await fail(session, account, 9)
    assert await state(session, account) == ("active", False, 9)
    await fail(session, account)
    assert await state(session, account) == ("suspended", True, 10)


@pytest.mark.parametrize("status", [S.INACTIVE, S.SUSPENDED, S.PENDING_VERIFICATION])
async def test_only_an_active_account_is_suspended(
    session: AsyncSession, status: AccountStatus
) -> None:
    account = await factories.account(session, status=status)
    await fail(session, account, 12)
    assert await state(session, account) == (status.value, False, 12)
    assert await events_of(session, AuditAction.ACCOUNT_STATUS_CHANGE) == []


async def test_a_closed_account_stays_closed(session: AsyncSession) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    await fail(session, account, 12)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("closed", False, 0)


async def test_errors_are_counted_in_the_database(session: AsyncSession) -> None:
    account = await factories.account(session)
    await execute(session, account, "error_count = 8")
    await fail(session, account)  # which the session believes to be the first
    assert await state(session, account) == ("active", False, 9)
    await fail(session, account)
    assert await state(session, account) == ("suspended", True, 10)


# Suspensions: one by errors ends with a success, one by a person never does


async def by_update(session: AsyncSession, account: TigerAccount, status: AccountStatus) -> None:
    await accounts.update(session, account.id, status=status)


async def by_assigning(session: AsyncSession, account: TigerAccount, status: AccountStatus) -> None:
    account.status = status
    await session.flush()


async def by_sql(session: AsyncSession, account: TigerAccount, status: AccountStatus) -> None:
    await execute(session, account, f"status = '{status.value}'")
    await session.refresh(account)


Person = Callable[[AsyncSession, TigerAccount, AccountStatus], Awaitable[None]]
PEOPLE: list[Person] = [by_update, by_assigning, by_sql]
person = pytest.mark.parametrize("person", PEOPLE)
other_person = pytest.mark.parametrize("other_person", PEOPLE)


async def test_a_success_lifts_a_suspension_by_errors(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    at = account.model_dump(mode="json")["last_error_at"]
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("active", False, 0)
    event = (await factories.events(session))[-1]
    assert event.action == AuditAction.ACCOUNT_RESET_ERRORS
    assert event.old_values == {
        "status": "suspended",
        "auto_suspended": True,
        "error_count": 10,
        "last_error": "no answer",
        "last_error_at": at,
    }
    assert event.new_values == {
        "status": "active",
        "auto_suspended": False,
        "error_count": 0,
        "last_error": None,
        "last_error_at": None,
    }


@person
@pytest.mark.parametrize("errors", [0, 3, 12])
async def test_a_persons_suspension_stays(
    session: AsyncSession, person: Person, errors: int
) -> None:
    account = await factories.account(session)
    await person(session, account, S.SUSPENDED)
    await fail(session, account, errors)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("suspended", False, 0)


@person
@other_person
async def test_a_persons_suspension_stays_after_one_by_errors_that_a_person_ended(
    session: AsyncSession, person: Person, other_person: Person
) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await person(session, account, S.ACTIVE)
    assert await state(session, account) == ("active", False, 10)
    await other_person(session, account, S.SUSPENDED)
    assert await state(session, account) == ("suspended", False, 10)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("suspended", False, 0)


async def test_a_persons_suspension_stays_after_one_by_errors(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await accounts.update(session, account.id, status=S.SUSPENDED)
    assert await state(session, account) == ("suspended", False, 10)
    event = (await factories.events(session))[-1]
    assert event.action == AuditAction.ACCOUNT_STATUS_CHANGE
    assert event.old_values == {"status": "suspended", "auto_suspended": True}
    assert event.new_values == {"status": "suspended", "auto_suspended": False}
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("suspended", False, 0)


@person
@pytest.mark.parametrize("status", [S.INACTIVE, S.PENDING_VERIFICATION])
async def test_a_success_does_not_activate_what_a_person_has_set(
    session: AsyncSession, person: Person, status: AccountStatus
) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await person(session, account, status)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == (status.value, False, 0)


@person
async def test_errors_suspend_again_after_a_person_has_ended_it(
    session: AsyncSession, person: Person
) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await person(session, account, S.ACTIVE)
    await fail(session, account)  # still consecutive: no success has come between
    assert await state(session, account) == ("suspended", True, 11)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("active", False, 0)


async def test_other_changes_leave_a_suspension_by_errors(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await accounts.update(session, account.id, description="what is wrong here?")
    await accounts.update_tokens(session, account.id, access_token="new")
    await execute(session, account, "account_name = 'Other'")
    await session.refresh(account)
    assert await state(session, account) == ("suspended", True, 10)


async def test_the_trigger_ends_it_for_every_row_of_a_statement(session: AsyncSession) -> None:
    failed = [await factories.account(session) for _ in range(3)]
    for account in failed:
        await fail(session, account, 10)
    await session.execute(text("UPDATE tiger_accounts SET status = 'active'"))
    for account in failed:
        await session.refresh(account)
    assert [await state(session, account) for account in failed] == [("active", False, 10)] * 3
    await execute(session, account, "status = 'active', auto_suspended = true")
    await session.refresh(account)
    assert await state(session, account) == ("active", False, 10)


async def test_nobody_sets_the_mark_by_hand(session: AsyncSession) -> None:
    with pytest.raises(InvalidValue, match="auto_suspended"):
        await factories.account(session, status="suspended", auto_suspended=True)
    account = await factories.account(session)
    with pytest.raises(InvalidValue, match="auto_suspended"):
        await accounts.update(session, account.id, auto_suspended=True)


async def test_a_refresh_lifts_no_suspension(session: AsyncSession) -> None:
    claims = [await factories.claim(session) for _ in range(3)]
    active, auto, manual = [
        account
        for claim in claims
        if (account := await accounts.get(session, claim.tiger_account_id)) is not None
    ]
    await fail(session, active, 9)
    await fail(session, auto, 10)
    await fail(session, manual, 9)
    await accounts.update(session, manual.id, status="suspended")
    for claim in claims:
        await token_status.complete(session, claim, access_token="new")
    assert await state(session, active) == ("active", False, 0)
    assert (active.last_error, active.last_error_at) == (None, None)
    assert await state(session, auto) == ("suspended", True, 10)
    assert auto.last_error == "no answer"
    assert await state(session, manual) == ("suspended", False, 0)


# What is kept of an error's message


@pytest.mark.parametrize("secret", [tiger_token(), API_KEY, JWT, PEM])
async def test_a_token_in_a_message_is_not_kept(session: AsyncSession, secret: str) -> None:
    account = await factories.account(session)
    await accounts.record_error(session, account.id, message=f"before {secret} after")
    (event,) = await events_of(session, AuditAction.ACCOUNT_ERROR)
    assert account.last_error is not None
    assert account.last_error.startswith("before ")
    assert account.last_error.endswith(f"{MASK} after") or "PRIVATE" in secret
    assert secret not in account.last_error
    assert event.error_message == account.last_error


ODD_SECRETS = dict(
    zip(SECRETS, ["a.*b(", "two words", r"\1\g<0>", "schlüssel🐅", '"quoted"'], strict=True)
)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("secrets", [SECRETS, ODD_SECRETS])
async def test_the_accounts_own_secrets_are_not_kept(
    session: AsyncSession, secrets: dict[str, str], *, stored: bool
) -> None:
    account = await factories.account(session, **secrets)
    if stored:
        session.expunge_all()
    message = f"refused: {'; '.join(secrets.values())}. {secrets['secret_key']!r} {secrets}"
    account = await accounts.record_error(session, account.id, message=message)
    assert account.last_error is not None
    assert account.last_error.startswith(f"refused: {'; '.join([MASK] * 5)}. ")
    session.expunge_all()
    everything = await factories.everything(session)
    for secret in secrets.values():
        assert secret not in everything
        assert secret not in account.last_error


@pytest.mark.parametrize("keys", [None, KeyRing.parse(generate_key("other"))])
async def test_a_missing_key_stops_no_error(clone: Database, keys: KeyRing | None) -> None:
    async with clone.session() as session:
        account = await factories.account(session, **SECRETS)
    message = f"refused: {tiger_token()}"
    async with clone.sessions(info={"key_provider": keys}) as session:
        account = await accounts.record_error(session, account.id, message=message)
        assert (account.error_count, account.last_error) == (1, f"refused: {MASK}")
        await session.commit()


async def test_of_several_keys_those_that_are_here_are_used(session: AsyncSession) -> None:
    account = await factories.account(session, **SECRETS)
    await execute(session, account, "secret_key = 'no ciphertext'")
    session.expunge_all()
    account = await accounts.record_error(
        session, account.id, message="institutional refresh-token"
    )
    assert account.last_error == f"institutional {MASK}"


# Accounts for an operation

NOW = datetime.now(UTC)
TBHK: dict[str, Any] = {"license": "TBHK", "access_token": "t"}


async def numbers(session: AsyncSession, **criteria: Any) -> list[str]:
    found = await accounts.find_for_operation(session, **criteria)
    return [account.account_number for account in found]


@pytest.mark.parametrize(
    ("values", "assignments"),
    [
        ({}, ""),
        ({"license": "TBSG"}, ""),
        ({"license": None, "access_token": "t", "token_expires_at": NOW - timedelta(days=1)}, ""),
        ({"license": "TBNZ", "access_token": "t", "token_expires_at": NOW}, ""),
        (TBHK | {"token_expires_at": NOW + timedelta(hours=1)}, ""),
        (TBHK, ""),  # until when is unknown
        ({}, "error_count = 2, last_error_at = now()"),
        ({}, "error_count = 3, last_error_at = now() - interval '5 minutes 1 second'"),
        ({}, "error_count = 9, last_error_at = now() - interval '1 hour'"),
        ({}, "error_count = 3"),
        ({}, "last_error_at = now()"),
    ],
)
async def test_an_account_may_serve(
    session: AsyncSession, values: dict[str, Any], assignments: str
) -> None:
    account = await factories.account(session, account_number="1", **values)
    if assignments:
        await execute(session, account, assignments)
    assert await numbers(session) == ["1"]


@pytest.mark.parametrize(
    ("values", "assignments"),
    [
        ({"status": "inactive"}, ""),
        ({"status": "suspended"}, ""),
        ({"status": "pending_verification"}, ""),
        ({}, "status = 'closed', private_key = NULL"),
        ({"environment": "SANDBOX"}, ""),
        ({"license": "TBHK"}, ""),
        ({"license": "TBHK", "token_expires_at": NOW + timedelta(hours=1)}, ""),
        (TBHK | {"token_expires_at": NOW - timedelta(seconds=1)}, ""),
        (TBHK, "token_expires_at = now()"),
        ({}, "error_count = 3, last_error_at = now()"),
        ({}, "error_count = 3, last_error_at = now() - interval '4 minutes 59 seconds'"),
        ({"is_default_data": True}, "error_count = 9, last_error_at = now()"),
    ],
)
async def test_an_account_may_not_serve(
    session: AsyncSession, values: dict[str, Any], assignments: str
) -> None:
    account = await factories.account(session, **values)
    if assignments:
        await execute(session, account, assignments)
    assert await numbers(session) == []


async def test_an_account_that_fails_serves_again_after_a_success(session: AsyncSession) -> None:
    account = await factories.account(session, account_number="1")
    await fail(session, account, 2)
    assert await numbers(session) == ["1"]
    await fail(session, account)
    assert await numbers(session) == []
    await accounts.reset_errors(session, account.id)
    assert await numbers(session) == ["1"]


async def test_the_permission_is_held(session: AsyncSession) -> None:
    await factories.account(session, account_number="none")
    await factories.account(session, account_number="hk", market_permissions=["HK"])
    await factories.account(session, account_number="us, hk", market_permissions=["US", "HK"])
    assert await numbers(session, permission=MarketPermission.US) == ["us, hk"]
    assert await numbers(session, permission=MarketPermission.HK) == ["hk", "us, hk"]
    assert await numbers(session, permission=MarketPermission.SG) == []
    assert await numbers(session) == ["none", "hk", "us, hk"]


async def test_the_environment_is_the_one_asked_for(session: AsyncSession) -> None:
    await factories.account(session, account_number="1")
    await factories.account(session, account_number="2", environment="SANDBOX")
    assert await numbers(session) == ["1"]
    assert await numbers(session, environment=TigerEnvironment.SANDBOX) == ["2"]


async def test_the_best_come_first(session: AsyncSession) -> None:
    """The default for the purpose, then those with the fewest errors, then the oldest."""
    for number, errors, defaults in (
        ("oldest", 0, {}),
        ("one error", 1, {}),
        ("data", 2, {"is_default_data": True}),
        ("trading", 2, {"is_default_trading": True}),
        ("newest", 0, {}),
    ):
        account = await factories.account(session, account_number=number, **defaults)
        await fail(session, account, errors)
    rest = ["oldest", "newest", "one error"]
    assert await numbers(session) == ["data", *rest, "trading"]
    assert await numbers(session, trading=True) == ["trading", *rest, "data"]
    assert await numbers(session, trading=True, limit=2) == ["trading", "oldest"]


PAPER = "20191106192858300"


@pytest.mark.parametrize(
    ("default", "found"),
    [(None, ["51230001", "U1"]), ("U1", ["U1", "51230001"]), (PAPER, [PAPER])],
)
async def test_paper_and_real_trade_apart(
    session: AsyncSession, default: str | None, found: list[str]
) -> None:
    for number in ("51230001", PAPER, "U1"):
        await factories.account(
            session, account_number=number, is_default_trading=number == default
        )
    assert await numbers(session, trading=True) == found
    assert await numbers(session) == ["51230001", PAPER, "U1"]
    by_type = {
        type_: await numbers(session, trading=True, account_type=type_) for type_ in AccountType
    }
    assert by_type == {
        AccountType.STANDARD: ["51230001"],
        AccountType.PRIME: [],
        AccountType.GLOBAL: ["U1"],
        AccountType.PAPER: [PAPER],
    }
    assert await numbers(session, account_type=AccountType.PAPER) == [PAPER]


@pytest.mark.parametrize("default", ["51230001", PAPER])
async def test_a_default_that_may_not_serve_is_not_replaced_by_the_other_kind(
    session: AsyncSession, default: str
) -> None:
    for number in ("51230001", PAPER):
        await factories.account(
            session,
            account_number=number,
            is_default_trading=number == default,
            status="suspended" if number == default else "active",
        )
    assert await numbers(session, trading=True) == []


@pytest.mark.parametrize("limit", [0, 1001, True])
async def test_a_bad_limit_is_refused(session: AsyncSession, limit: int) -> None:
    with pytest.raises(InvalidValue, match="limit"):
        await accounts.find_for_operation(session, limit=limit)


@pytest.mark.parametrize("trading", [False, True])
async def test_finding_is_one_statement(
    database: Database, session: AsyncSession, *, trading: bool
) -> None:
    for _ in range(3):
        await factories.account(session, market_permissions=["US"])
    with recorded(database) as sent:
        found = await accounts.find_for_operation(
            session, permission=MarketPermission.US, trading=trading
        )
    assert (len(found), len(sent)) == (3, 1)


async def test_what_is_found_is_as_it_is_now(session: AsyncSession) -> None:
    account = await factories.account(session)
    await execute(session, account, "description = 'raw'")
    (found,) = await accounts.find_for_operation(session)
    assert (found is account, found.description) == (True, "raw")
