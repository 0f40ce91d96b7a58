"""Broker accounts. Every change writes its audit event in the same transaction."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.common import (
    Page,
    check_limit,
    constraints,
    get_or_raise,
    loading,
    many,
    one,
    paginate,
    storable,
)
from tiger_db.encryption import KeyRing
from tiger_db.errors import ConfigurationError, InvalidState, InvalidValue, NotFound
from tiger_db.models import (
    AccountStatus,
    AccountType,
    APIKey,
    APIKeyStatus,
    AuditAction,
    TigerAccount,
    TigerEnvironment,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.token_status import OPEN


async def create(session: AsyncSession, account: TigerAccount) -> TigerAccount:
    """Store a new account.

    Raises:
        AlreadyExists: the account number is taken, or another account is the default already.
        ConfigurationError: there is no encryption key to seal its secrets with.
    """
    async with constraints(session):
        session.add(account)
    await _log(session, AuditAction.ACCOUNT_CREATE, account, new=_shown(account))
    return account


async def get(
    session: AsyncSession, account_id: UUID, *, load: Sequence[str] = ()
) -> TigerAccount | None:
    """An account by id, with the relationships named in `load`: `api_keys`, `token_statuses`."""
    return await _one(session, col(TigerAccount.id) == account_id, load)


async def get_by_account_number(
    session: AsyncSession, account_number: str, *, load: Sequence[str] = ()
) -> TigerAccount | None:
    """An account by Tiger's number, with the relationships named in `load`."""
    return await _one(session, col(TigerAccount.account_number) == account_number, load)


async def get_by_tiger_id(session: AsyncSession, tiger_id: str) -> list[TigerAccount]:
    """All accounts of one Tiger id, oldest first.

    Raises:
        ConfigurationError: there is no encryption key to compute the fingerprint with.
    """
    ring = session.info.get("key_ring")
    if not isinstance(ring, KeyRing):
        raise ConfigurationError("ENCRYPTION_KEYS is not set, so tiger_id cannot be searched")
    try:
        fingerprints = ring.fingerprints(tiger_id, "tiger_accounts.tiger_id")
    except UnicodeEncodeError:  # half a character, which no account can have
        return []
    statement = (
        select(TigerAccount)
        .where(col(TigerAccount.tiger_id_fingerprint).in_(fingerprints))
        .order_by(col(TigerAccount.id))
    )
    return await many(session, statement)


async def list_accounts(
    session: AsyncSession,
    *,
    status: AccountStatus | None = None,
    environment: TigerEnvironment | None = None,
    account_type: AccountType | None = None,
    after: str | None = None,
    limit: int = 50,
) -> Page[TigerAccount]:
    """The accounts that match every criterion given, newest first."""
    statement = select(TigerAccount)
    if status is not None:
        statement = statement.where(col(TigerAccount.status) == status)
    if environment is not None:
        statement = statement.where(col(TigerAccount.environment) == environment)
    if account_type is not None:
        statement = statement.where(col(TigerAccount.account_type) == account_type)
    return await paginate(session, statement, TigerAccount, after=after, limit=limit)


async def update(session: AsyncSession, account_id: UUID, **changes: object) -> TigerAccount:
    """Change fields of an account: all of those given, or none.

    Raises:
        NotFound: there is no such account.
        InvalidValue: a field cannot be changed, or only by another function: `close`.
        ValidationError: a field is unknown or its value refused.
        AlreadyExists: the account number is taken, or another account is the default already.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if fixed := sorted({"id", "created_at", "updated_at"} & changes.keys()):
        raise InvalidValue(f"{', '.join(fixed)} cannot be changed")
    before = _shown(account)
    if changes.get("status") == AccountStatus.CLOSED != account.status:
        raise InvalidValue("status: an account is closed by `close`, which ends its keys too")
    async with constraints(session, account):
        account.sqlmodel_update(changes)
    after = _shown(account)
    changed = {name for name in after if after[name] != before[name]} | changes.keys()
    action = (
        AuditAction.ACCOUNT_STATUS_CHANGE if "status" in changes else AuditAction.ACCOUNT_UPDATE
    )
    await _log(
        session,
        action,
        account,
        old={name: before[name] for name in changed if name in before},
        new={name: after[name] for name in changed if name in after},
    )
    return account


async def get_default_trading_account(session: AsyncSession) -> TigerAccount | None:
    """The account that serves trades which name none."""
    return await _one(session, col(TigerAccount.is_default_trading), ())


async def get_default_data_account(session: AsyncSession) -> TigerAccount | None:
    """The account that serves data requests which name none."""
    return await _one(session, col(TigerAccount.is_default_data), ())


async def set_default_trading_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the default for trading, in place of the one that was.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is closed.
    """
    return await _set_default(session, account_id, "is_default_trading")


async def set_default_data_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the default for data, in place of the one that was.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is closed.
    """
    return await _set_default(session, account_id, "is_default_data")


async def get_accounts_needing_token_refresh(
    session: AsyncSession, *, within: timedelta = timedelta(hours=1), limit: int = 100
) -> list[TigerAccount]:
    """The active accounts whose token has expired or will within that time, soonest first."""
    check_limit(limit)
    statement = (
        select(TigerAccount)
        .where(
            col(TigerAccount.status) == text("'active'"),  # as the partial index has it
            col(TigerAccount.access_token).is_not(None),
            col(TigerAccount.token_expires_at) <= func.now() + within,
        )
        .order_by(col(TigerAccount.token_expires_at), col(TigerAccount.id))
        .limit(limit)
    )
    return await many(session, statement)


async def update_tokens(
    session: AsyncSession,
    account_id: UUID,
    *,
    access_token: str,
    refresh_token: str | None = None,
    token_expires_at: datetime | None = None,
) -> TigerAccount:
    """Replace an account's access token; the refresh token stays where none is given.

    `token_expires_at` is an aware datetime; None: unknown, and then the token is never due.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is closed.
        ValidationError: a value is refused.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    _refuse_closed(account)
    old = {"token_expires_at": _shown(account)["token_expires_at"]}
    changes: dict[str, object] = {
        "access_token": access_token,
        "token_expires_at": token_expires_at,
    }
    if refresh_token is not None:
        changes["refresh_token"] = refresh_token
    account.sqlmodel_update(changes)
    await session.flush()
    new = {"token_expires_at": _shown(account)["token_expires_at"]}
    await _log(session, AuditAction.TOKEN_UPDATE, account, old=old, new=new)
    return account


async def record_error(session: AsyncSession, account_id: UUID, *, message: str) -> TigerAccount:
    """Count one more error of an account, in the database: parallel ones are all counted.

    Raises:
        NotFound: there is no such account.
    """
    account = await one(
        session,
        sql_update(TigerAccount)
        .where(col(TigerAccount.id) == account_id)
        .values(
            error_count=col(TigerAccount.error_count) + 1,
            last_error=storable(message),
            last_error_at=func.now(),
        )
        .returning(TigerAccount),
    )
    if account is None:
        raise NotFound(f"there is no TigerAccount {account_id}")
    await _log(
        session, AuditAction.ACCOUNT_ERROR, account, new={"error_count": account.error_count}
    )
    return account


async def reset_errors(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Set the error count back to zero after a success.

    Raises:
        NotFound: there is no such account.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.error_count == 0 and account.last_error is None:
        return account
    old: dict[str, JsonValue] = {"error_count": account.error_count}
    account.sqlmodel_update({"error_count": 0, "last_error": None, "last_error_at": None})
    await session.flush()
    await _log(session, AuditAction.ACCOUNT_RESET_ERRORS, account, old=old, new={"error_count": 0})
    return account


async def close(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Close an account: its keys are revoked, open refreshes cancelled, tokens and defaults gone.

    Its row stays, and so does its audit trail. Closing a closed account changes nothing.

    Raises:
        NotFound: there is no such account.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.status == AccountStatus.CLOSED:
        return account
    old = {"status": account.status.value}
    account.sqlmodel_update(
        {
            "status": AccountStatus.CLOSED,
            "is_default_trading": False,
            "is_default_data": False,
            "access_token": None,
            "refresh_token": None,
            "token_expires_at": None,
        }
    )
    await session.flush()
    revoked = await many(
        session,
        sql_update(APIKey)
        .where(
            col(APIKey.tiger_account_id) == account_id,
            col(APIKey.status) != APIKeyStatus.REVOKED,
        )
        .values(
            status=APIKeyStatus.REVOKED,
            revoked_at=func.now(),
            revocation_reason="the account was closed",
        )
        .returning(APIKey),
    )
    cancelled = await many(
        session,
        sql_update(TokenStatus)
        .where(col(TokenStatus.tiger_account_id) == account_id, col(TokenStatus.status).in_(OPEN))
        .values(
            status=TokenRefreshStatus.CANCELLED,
            completed_at=func.now(),
            lease_expires_at=None,
        )
        .returning(TokenStatus),
    )
    details: dict[str, JsonValue] = {
        "revoked_api_keys": [key.key_prefix for key in revoked],
        "cancelled_refreshes": [str(refresh.id) for refresh in cancelled],
    }
    await _log(
        session,
        AuditAction.ACCOUNT_CLOSE,
        account,
        old=old,
        new={"status": AccountStatus.CLOSED.value},
        details=details,
    )
    return account


async def _one(
    session: AsyncSession, criterion: ColumnElement[bool] | Mapped[bool], load: Sequence[str]
) -> TigerAccount | None:
    statement = select(TigerAccount).where(criterion).options(*loading(TigerAccount, load))
    return await one(session, statement)


async def _set_default(session: AsyncSession, account_id: UUID, column: str) -> TigerAccount:
    # One at a time, so that each sees the default that the one before it has committed; for both
    # kinds, because two accounts that swap theirs would wait for each other.
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtext("set_default"))))
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    _refuse_closed(account)
    is_default = col(getattr(TigerAccount, column))
    replaced = await one(
        session,
        sql_update(TigerAccount)
        .where(is_default, col(TigerAccount.id) != account_id)
        .values({column: False})
        .returning(TigerAccount),
    )
    account.sqlmodel_update({column: True})
    await session.flush()
    await _log(
        session,
        AuditAction.ACCOUNT_SET_DEFAULT,
        account,
        old={column: str(replaced.id) if replaced else None},
        new={column: str(account.id)},
    )
    return account


def _refuse_closed(account: TigerAccount) -> None:
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")


def _shown(account: TigerAccount) -> dict[str, JsonValue]:
    """What an audit event may say of an account: everything but its secrets."""
    return account.model_dump(mode="json", exclude={"created_at", "updated_at"})


async def _log(
    session: AsyncSession,
    action: AuditAction,
    account: TigerAccount,
    *,
    old: Mapping[str, JsonValue] | None = None,
    new: Mapping[str, JsonValue] | None = None,
    details: Mapping[str, JsonValue] | None = None,
) -> None:
    await audit_logs.log_event(
        session,
        action=action,
        resource_type="tiger_account",
        resource_id=str(account.id),
        tiger_account_id=account.id,
        old_values=old,
        new_values=new,
        details=details,
    )
