"""Error counts of accounts, stored error messages, and suspensions by errors."""

from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.support import factories
from tests.support.account_changes import SECRETS
from tests.support.contexts import change_context, changed_context
from tests.support.secrets_in_text import API_KEY, JWT, PEM
from tests.support.tiger_tokens import tiger_token
from tiger_db import (
    AccountStatus,
    AuditAction,
    AuditLog,
    AuditSeverity,
    Database,
    Settings,
    TigerAccount,
)
from tiger_db.crud import accounts, token_status
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing, generate_key
from tiger_db.errors import InvalidValue
from tiger_db.redaction import MASK

S = AccountStatus


async def fail(session: AsyncSession, account: TigerAccount, times: int = 1) -> None:
    for _ in range(times):
        await accounts.record_error(session, account.id, message="no answer")


async def execute(session: AsyncSession, account: TigerAccount, assignments: str) -> None:
    """Change the account with raw SQL, outside the ORM."""
    statement = text(f"UPDATE tiger_accounts SET {assignments} WHERE id = :id")
    await session.execute(statement, {"id": account.id})


async def state(session: AsyncSession, account: TigerAccount) -> tuple[str, bool, int]:
    """Return status, auto_suspended and error_count, equal in the object and in the database."""
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


@pytest.mark.parametrize(("changes", "limit"), [({}, 10), ({"suspend_after": 4}, 4)])
async def test_consecutive_errors_suspend_an_account_at_the_limit(
    session: AsyncSession, changes: dict[str, int], limit: int
) -> None:
    change_context(session, **changes)
    account = await factories.account(session)
    await fail(session, account, limit - 1)
    assert await state(session, account) == ("active", False, limit - 1)
    await fail(session, account)
    assert await state(session, account) == ("suspended", True, limit)
    await fail(session, account, 2)
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


async def test_a_limit_of_one_suspends_at_the_first_error(session: AsyncSession) -> None:
    change_context(session, suspend_after=1)
    account = await factories.account(session)
    await fail(session, account)
    assert await state(session, account) == ("suspended", True, 1)


async def test_a_lowered_limit_applies_to_the_next_error(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 5)
    change_context(session, suspend_after=3)
    await fail(session, account)
    assert await state(session, account) == ("suspended", True, 6)


async def test_the_settings_of_the_database_are_the_limits(clone_settings: Settings) -> None:
    limits = {"account_failing_after": 2, "account_failing_for": 1.5, "account_suspend_after": 3}
    changed = clone_settings.model_copy(update=limits)
    async with Database(changed) as clone, clone.session() as session:
        account = await factories.account(session)
        await fail(session, account)
        assert account.failing_until is None
        await fail(session, account)
        assert account.last_error_at is not None
        assert account.failing_until == account.last_error_at + timedelta(seconds=1.5)
        await fail(session, account)
        assert await state(session, account) == ("suspended", True, 3)


# Failing accounts


async def test_an_account_is_failing_for_five_minutes_after_each_error_from_the_third(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    assert not account.is_failing
    await fail(session, account, 2)
    assert (account.failing_until, account.is_failing) == (None, False)
    for _ in range(2):
        await fail(session, account)
        assert account.is_failing
        assert account.last_error_at is not None
        assert account.failing_until == account.last_error_at + timedelta(minutes=5)
        await execute(session, account, "last_error_at = NULL, failing_until = NULL")
    assert account.failing_until is not None
    details = {"failing_until": account.failing_until.isoformat()}
    errors = await events_of(session, AuditAction.ACCOUNT_ERROR)
    assert [event.details for event in errors] == [None, None, details, details]


async def test_a_past_time_and_no_time_mean_that_the_account_is_not_failing(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    await fail(session, account, 3)
    await execute(session, account, "failing_until = now() - interval '1 second'")
    await session.refresh(account)
    assert not account.is_failing


async def test_a_success_and_a_reopening_end_the_failing(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 3)
    await accounts.reset_errors(session, account.id)
    assert (account.failing_until, account.is_failing) == (None, False)
    await fail(session, account, 3)
    await accounts.close(session, account.id)
    await accounts.reopen(session, account.id, private_key="new")
    assert (account.failing_until, account.is_failing) == (None, False)


async def test_an_error_that_does_not_count_is_on_record_and_changes_nothing_else(
    session: AsyncSession,
) -> None:
    change_context(session, failing_after=1, suspend_after=1)
    account = await factories.account(session)
    for message in ("no buying power", f"refused {tiger_token()}"):
        await accounts.record_error(session, account.id, message=message, counts=False)
    assert await state(session, account) == ("active", False, 0)
    assert (account.last_error, account.failing_until) == (f"refused {MASK}", None)
    assert account.last_error_at is not None
    first, last = await events_of(session, AuditAction.ACCOUNT_ERROR)
    assert (first.error_message, last.error_message) == ("no buying power", f"refused {MASK}")
    assert (last.old_values, last.new_values, last.details) == (None, None, None)
    await accounts.reset_errors(session, account.id)
    assert account.last_error is None


async def test_an_error_that_does_not_count_keeps_the_count_of_earlier_errors(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    await fail(session, account, 9)
    until = account.failing_until
    await accounts.record_error(session, account.id, message="no buying power", counts=False)
    assert await state(session, account) == ("active", False, 9)
    assert account.failing_until == until


async def test_a_success_restarts_the_count_of_consecutive_errors(session: AsyncSession) -> None:
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


async def test_errors_and_successes_leave_a_closed_account_closed(session: AsyncSession) -> None:
    account = await factories.account(session)
    await accounts.close(session, account.id)
    await fail(session, account, 12)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("closed", False, 0)


async def test_the_error_count_is_read_from_the_database_not_the_session(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    await execute(session, account, "error_count = 8")
    await fail(session, account)  # the object in the session still has 0
    assert await state(session, account) == ("active", False, 9)
    await fail(session, account)
    assert await state(session, account) == ("suspended", True, 10)


async def test_errors_are_counted_until_reset(session: AsyncSession) -> None:
    account = await factories.account(session)
    for message in ("first", "naïve \0 \ud800 🐅"):
        await accounts.record_error(session, account.id, message=message)
    assert account.error_count == 2
    assert account.last_error is not None
    assert account.last_error.startswith("naïve")
    assert account.last_error.endswith("🐅")
    assert account.last_error_at is not None
    await accounts.reset_errors(session, account.id)
    assert account.error_count == 0
    assert account.last_error is None
    assert account.last_error_at is None
    before = len(await factories.events(session))
    await accounts.reset_errors(session, account.id)
    assert len(await factories.events(session)) == before


# Suspensions: a success lifts those by errors, and no manual ones


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
    times = account.model_dump(mode="json", include={"last_error_at", "failing_until"})
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("active", False, 0)
    event = (await factories.events(session))[-1]
    assert event.action == AuditAction.ACCOUNT_RESET_ERRORS
    assert event.old_values == {
        "status": "suspended",
        "auto_suspended": True,
        "error_count": 10,
        "last_error": "no answer",
        **times,
    }
    assert event.new_values == {
        "status": "active",
        "auto_suspended": False,
        "error_count": 0,
        "last_error": None,
        "last_error_at": None,
        "failing_until": None,
    }


@person
@pytest.mark.parametrize("errors", [0, 3, 12])
async def test_a_success_does_not_lift_a_manual_suspension(
    session: AsyncSession, person: Person, errors: int
) -> None:
    account = await factories.account(session)
    await person(session, account, S.SUSPENDED)
    await fail(session, account, errors)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("suspended", False, 0)


@person
@other_person
async def test_a_success_does_not_lift_a_manual_suspension_after_a_lifted_one_by_errors(
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


async def test_a_success_does_not_lift_a_manual_suspension_that_replaces_one_by_errors(
    session: AsyncSession,
) -> None:
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


async def test_a_success_does_not_lift_a_suspension_by_raw_sql_that_replaces_one_by_errors(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await execute(session, account, "status = 'suspended'")
    await session.refresh(account)
    assert await state(session, account) == ("suspended", False, 10)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("suspended", False, 0)


async def test_auto_suspended_requires_the_status_suspended(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    with pytest.raises(IntegrityError, match="auto_suspended_is_suspended"):
        await execute(session, account, "auto_suspended = true")


@person
@pytest.mark.parametrize("status", [S.INACTIVE, S.PENDING_VERIFICATION])
async def test_a_success_does_not_change_a_status_that_was_set_manually(
    session: AsyncSession, person: Person, status: AccountStatus
) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await person(session, account, status)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == (status.value, False, 0)


@person
async def test_the_next_error_suspends_again_after_a_manual_activation(
    session: AsyncSession, person: Person
) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await person(session, account, S.ACTIVE)
    await fail(session, account)  # consecutive, because there was no success
    assert await state(session, account) == ("suspended", True, 11)
    await accounts.reset_errors(session, account.id)
    assert await state(session, account) == ("active", False, 0)


async def test_other_changes_do_not_lift_a_suspension_by_errors(session: AsyncSession) -> None:
    account = await factories.account(session)
    await fail(session, account, 10)
    await accounts.update(session, account.id, description="what is wrong here?")
    await accounts.update_tokens(session, account.id, access_token="new")
    await execute(session, account, "account_name = 'Other'")
    await session.refresh(account)
    assert await state(session, account) == ("suspended", True, 10)


@pytest.mark.slow
async def test_the_trigger_ends_auto_suspension_for_every_row_of_a_statement(
    session: AsyncSession,
) -> None:
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


async def test_auto_suspended_cannot_be_set_by_callers(session: AsyncSession) -> None:
    with pytest.raises(InvalidValue, match="auto_suspended"):
        await factories.account(session, status="suspended", auto_suspended=True)
    account = await factories.account(session)
    with pytest.raises(InvalidValue, match="auto_suspended"):
        await accounts.update(session, account.id, auto_suspended=True)  # type: ignore[call-arg]


@pytest.mark.slow
async def test_a_successful_refresh_lifts_no_suspension(session: AsyncSession) -> None:
    claims = [await factories.claim(session) for _ in range(3)]
    active, auto, manual = [
        account
        for claim in claims
        if (account := await accounts.get(session, claim.tiger_account_id)) is not None
    ]
    await fail(session, active, 9)
    await fail(session, auto, 10)
    await fail(session, manual, 9)
    await accounts.update(session, manual.id, status=AccountStatus.SUSPENDED)
    for claim in claims:
        await token_status.complete(session, claim, access_token="new")
    assert await state(session, active) == ("active", False, 0)
    assert (active.last_error, active.last_error_at, active.failing_until) == (None,) * 3
    assert auto.is_failing
    assert await state(session, auto) == ("suspended", True, 10)
    assert auto.last_error == "no answer"
    assert await state(session, manual) == ("suspended", False, 0)


# Masking of stored error messages


@pytest.mark.parametrize("secret", [tiger_token(), API_KEY, JWT, PEM])
async def test_a_token_in_an_error_message_is_masked(session: AsyncSession, secret: str) -> None:
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
async def test_the_secrets_of_the_account_are_masked_in_an_error_message(
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
async def test_an_error_is_recorded_without_the_encryption_key(
    clone: Database, keys: KeyRing | None
) -> None:
    async with clone.session() as session:
        account = await factories.account(session, **SECRETS)
    message = f"refused: {tiger_token()}"
    async with clone.sessions(info=changed_context(clone.info, key_provider=keys)) as session:
        account = await accounts.record_error(session, account.id, message=message)
        assert (account.error_count, account.last_error) == (1, f"refused: {MASK}")
        await session.commit()


async def test_readable_secrets_are_masked_if_another_cannot_be_decrypted(
    session: AsyncSession,
) -> None:
    account = await factories.account(session, **SECRETS)
    await execute(session, account, "secret_key = 'no ciphertext'")
    session.expunge_all()
    account = await accounts.record_error(
        session, account.id, message="institutional refresh-token"
    )
    assert account.last_error == f"institutional {MASK}"
