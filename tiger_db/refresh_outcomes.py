"""The outcomes of attempts to refresh tokens: their storage, also while the database is down."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from tiger_db.crud import accounts, token_status
from tiger_db.crud.common import error_text, get_or_raise, replace_unstorable
from tiger_db.database import AsyncSession, Database
from tiger_db.errors import (
    AnswerLost,
    CredentialsRefused,
    InvalidState,
    LeaseLost,
    NotFound,
    RefreshFailed,
    RefreshLimited,
    StaleToken,
    TigerDBError,
)
from tiger_db.models import Entity, TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.models.token_status import NewToken
from tiger_db.sqlstates import is_transient

T = TypeVar("T")
RETRY_PAUSE_SECONDS = 0.2  # Wait before the first retry. Each retry doubles the wait.
MAX_RETRY_PAUSE_SECONDS = 5.0
_MAX_ERROR_CODE_LENGTH = 50
_MAX_RETRY_AFTER = timedelta(days=7)
_logger = logging.getLogger("tiger_db")


class OutcomeWriter:
    """Stores new tokens and failures, counts the outcomes, and retries transient errors.

    No retry starts after the monotonic time `deadline`.
    """

    def __init__(self, database: Database, counts: Counter[str]) -> None:
        self.database = database
        self.counts = counts
        self.deadline = math.inf

    async def complete(
        self, claim: TokenStatus, token: NewToken, milliseconds: int
    ) -> AnswerLost | None:
        """Store a new token and return None, or return an error if the token cannot be stored."""
        token = _without_unstorable(claim, token)
        for storable in (token, NewToken(token.access_token)):
            try:
                await self._store(claim, storable, milliseconds)
            except Exception as error:
                if is_transient(error):
                    raise
                reason = f"the new token cannot be stored: {type(error).__name__}"
            else:
                return None
        return AnswerLost(reason, broker_code=token.code)

    async def _store(self, claim: TokenStatus, token: NewToken, milliseconds: int) -> None:
        """Complete the refresh with a new token, or call `_offer` if the claim was lost."""
        label = claim.tiger_account.label()
        try:
            refresh = await self.save(
                lambda session: token_status.complete(
                    session,
                    claim,
                    access_token=token.access_token,
                    refresh_token=token.refresh_token,
                    expires_at=token.expires_at,
                    api_response_code=token.code,
                    api_response_time_ms=milliseconds,
                )
            )
        except (LeaseLost, NotFound):
            await self._offer(claim, token)
        except StaleToken:
            self.counts["stale"] += 1
            _logger.warning(
                "%s already has a token that is newer than the token from this refresh", label
            )
        else:
            self.counts["refreshed"] += 1
            due = refresh.next_refresh_at
            _logger.info("%s has a new token; the next refresh is due at %s", label, due)

    async def _offer(self, claim: TokenStatus, token: NewToken) -> None:
        """Store the new token of a lost claim if the account's token is older."""

        async def offer(session: AsyncSession) -> bool:
            refresh = await token_status.get(session, claim.id)
            new_hash = token_status.token_hash(token.access_token)
            if refresh is not None and refresh.new_token_hash == new_hash:
                return False  # an earlier, unconfirmed commit has stored the token
            await accounts.update_tokens(
                session,
                claim.tiger_account_id,
                access_token=token.access_token,
                refresh_token=token.refresh_token,
                token_expires_at=token.expires_at,
                refresh_id=claim.id,
            )
            return True

        label = claim.tiger_account.label()
        try:
            offered = await self.save(offer)
        except (InvalidState, NotFound) as error:  # StaleToken is a subclass of InvalidState
            self.counts["lost"] += 1
            _logger.warning(
                "%s: the claim was lost, and the new token was not stored: %s", label, error
            )
            return
        self.counts["offered" if offered else "refreshed"] += 1
        if offered:
            _logger.warning("%s: the claim was lost, but the new token was stored", label)

    async def fail(self, claim: TokenStatus, error: RefreshFailed, milliseconds: int) -> None:
        """Store the failure of an attempt, with the error if the error can be stored."""
        account = claim.tiger_account

        async def fail(session: AsyncSession) -> TokenStatus:
            refused, message = isinstance(error, CredentialsRefused), error_text(error)
            if refused:
                now = await get_or_raise(session, TigerAccount, account.id, lock=True)
                if now.readable_token() != account.readable_token():
                    message = f"{error} (the account no longer has the refused token)"
                    refused = False
            return await token_status.fail(
                session,
                claim,
                message=message,
                error_code=replace_unstorable(type(error).__name__)[:_MAX_ERROR_CODE_LENGTH],
                retry_after=_retry_after(error),
                credentials_refused=refused,
                answer_lost=isinstance(error, AnswerLost),
                api_response_code=_storable(claim, "api_response_code", error.broker_code),
                api_response_time_ms=milliseconds,
            )

        try:
            try:
                refresh = await self.save(fail)
            except Exception as problem:
                if isinstance(problem, LeaseLost | NotFound) or is_transient(problem):
                    raise
                await self.save(partial(token_status.fail_unknown, claim=claim))
                outcome = f"the error of the refresh cannot be stored: {type(problem).__name__}"
            else:
                final = refresh.status == TokenRefreshStatus.FAILED
                then = "no attempt is left" if final else f"next attempt at {refresh.scheduled_at}"
                outcome = f"{refresh.error_message}; {then}"
        except (LeaseLost, NotFound):
            self.counts["lost"] += 1
            _logger.warning("%s: the claim was lost after the refresh had failed", account.label())
            return
        self.counts["failed"] += 1
        _logger.warning("%s: the refresh failed: %s", account.label(), outcome)

    async def save(self, work: Callable[[AsyncSession], Coroutine[Any, Any, T]]) -> T:
        """Call the function `work` in a transaction.

        If the database is unavailable, repeat the transaction.
        """
        pause = RETRY_PAUSE_SECONDS
        while True:
            try:
                async with self.database.session() as session:
                    return await work(session)
            except (TigerDBError, DBAPIError) as error:
                if not is_transient(error) or time.monotonic() + pause > self.deadline:
                    raise
                _logger.warning("a refresh waits for the database: %s", type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_RETRY_PAUSE_SECONDS)


def _without_unstorable(claim: TokenStatus, token: NewToken) -> NewToken:
    """Return a copy of a new token, without the optional values that cannot be stored."""
    account, refresh_token = claim.tiger_account, token.refresh_token
    return NewToken(
        token.access_token,
        expires_at=_storable(account, "token_expires_at", token.expires_at),
        refresh_token=refresh_token if _storable(account, "refresh_token", refresh_token) else None,
        code=_storable(claim, "api_response_code", token.code),
    )


def _storable(row: Entity, name: str, value: T | None) -> T | None:
    """Return the broker's value for the field `name` of a row, or None for an invalid value."""
    try:
        storable: T | None = row.validate_changes({name: value})[name]
    except (ValueError, TypeError, OverflowError):  # pydantic's ValidationError is a ValueError
        _logger.warning("%s: the broker's %s is invalid and was not stored", row.label(), name)
        return None
    return storable


def _retry_after(error: RefreshFailed) -> timedelta | None:
    """Return `retry_after` of an error, but at most 7 days, or None if the value is invalid."""
    wait = error.retry_after if isinstance(error, RefreshLimited) else None
    if not isinstance(wait, timedelta) or wait < timedelta(0):
        return None
    return min(wait, _MAX_RETRY_AFTER)
