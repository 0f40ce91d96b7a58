"""The fake broker of tiger_db.testing."""

from datetime import timedelta

import pytest

from tests.support import factories
from tests.support.refresh_workers import account_of, run_once
from tiger_db import Database, NewToken, Secret, TokenRefreshStatus, crud
from tiger_db.errors import AnswerLost, CredentialsRefused, RefreshLimited
from tiger_db.testing import FakeBroker


async def test_a_worker_refreshes_a_due_token(clone: Database, tiger_broker: FakeBroker) -> None:
    async with clone.session() as session:
        account = await factories.account_with_token(session)
    await run_once(clone, tiger_broker)
    assert [asked.id for asked in tiger_broker.requests] == [account.id]
    refreshed = await account_of(clone, account.id)
    assert refreshed.access_token != account.access_token
    assert refreshed.token_expires_at is not None


async def test_planned_answers_come_in_their_order() -> None:
    broker, account = FakeBroker(), factories.new_account(access_token="old")
    planned = NewToken("planned")
    broker.plan(RefreshLimited("too often", retry_after=timedelta(seconds=1)), planned)
    with pytest.raises(RefreshLimited):
        await broker(account)
    assert await broker(account) is planned


async def test_a_token_that_was_replaced_is_refused() -> None:
    broker, account = FakeBroker(), factories.new_account(access_token="old")
    new = await broker(account)
    with pytest.raises(CredentialsRefused):
        await broker(account)
    account.access_token = Secret(new.access_token)
    assert (await broker(account)).access_token != new.access_token


async def test_after_a_lost_answer_the_old_token_is_refused(clone: Database) -> None:
    broker = FakeBroker()
    broker.plan(AnswerLost("the connection was reset"))
    async with clone.session() as session:
        account = await factories.account_with_token(session)
    await run_once(clone, broker)
    with pytest.raises(CredentialsRefused):
        await broker(await account_of(clone, account.id))
    async with clone.session() as session:
        (refresh,) = await crud.token_status.history(session)
    assert refresh.status == TokenRefreshStatus.PENDING
