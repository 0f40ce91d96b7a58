"""Token refreshes through Tiger's SDK, and every kind of answer."""

import asyncio
import logging
import logging.config
import socket
import traceback
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tigeropen.common.util.web_utils import http_pool

from tests.support.factories import new_account
from tests.support.private_keys import KEY
from tests.support.refresh_gateway import (
    ANSWERS,
    LIMIT_TEXT,
    Gateway,
    due_token,
    make_token,
    serving,
)
from tests.support.tiger_files import OTHER, PK8
from tiger_db import TigerAccount
from tiger_db.errors import (
    AnswerLost,
    CredentialsRefused,
    InvalidState,
    RefreshFailed,
    RefreshLimited,
)
from tiger_db.models.accounts import token_times
from tiger_db.models.token_status import NewToken
from tiger_db.tiger import refresh_token

TIGER_ID = "20150001"


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with serving(KEY.public_key()) as gateway:
        yield gateway
        http_pool.clear()


def account_at(gateway: Gateway, tiger_id: str = TIGER_ID, **fields: Any) -> TigerAccount:
    token = gateway.add(tiger_id)
    given = {"tiger_id": tiger_id, "private_key": PK8, "server_url": gateway.url}
    return new_account(**given | {"access_token": token, "license": "TBHK"} | fields)


async def failure(account: TigerAccount) -> RefreshFailed:
    with pytest.raises(RefreshFailed) as caught:
        await refresh_token(account)
    return caught.value


def assert_no_secret(gateway: Gateway, text: str) -> None:
    tokens = {token for r in gateway.refreshes for token in (r.token, r.made) if token}
    assert tokens
    for secret in (PK8, PK8[100:140], TIGER_ID, "s3cret", *tokens):
        assert secret not in text


async def test_a_new_token(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    account = account_at(gateway, secret_key="s3cret")
    new = await refresh_token(account)
    (asked,) = gateway.of(TIGER_ID)
    assert new == NewToken(asked.made or "", code=0)
    assert (asked.token, gateway.known[TIGER_ID].token) == (
        account.readable_token(),
        new.access_token,
    )
    times = token_times(new.access_token)
    assert times is not None
    assert abs(times.generated_at - datetime.now(UTC)) < timedelta(seconds=5)
    assert new.access_token not in repr(new) + str(new)
    assert_no_secret(gateway, caplog.text + repr(caplog.records))


async def test_no_configuration_of_logging_shows_the_token(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    # uvicorn does this when it starts: it enables the loggers that its configuration does not name.
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    caplog.set_level(logging.DEBUG)
    await refresh_token(account_at(gateway))
    assert_no_secret(gateway, caplog.text + repr(caplog.records))


async def test_the_old_token_has_ended(gateway: Gateway) -> None:
    account = account_at(gateway)
    await refresh_token(account)
    assert isinstance(await failure(account), CredentialsRefused)
    assert [refresh.outcome for refresh in gateway.of(TIGER_ID)] == ["new token", "refused"]


KINDS: dict[str, tuple[type[RefreshFailed], int | None, str]] = {
    "limited 5": (RefreshLimited, 5, "code=5 msg=too often"),
    "limited 429": (RefreshLimited, 5, "Tiger's rate limit is reached (HTTP 429)"),
    "limited 4": (RefreshLimited, 4, f"code=4 msg={LIMIT_TEXT}"),
    "forbidden": (CredentialsRefused, 4, "code=4 msg=access forbidden"),
    "refused": (CredentialsRefused, 1000, "code=1000 msg=common param error(sign check failed)"),
    "denied": (CredentialsRefused, 4000, "code=4000 msg=permission denied"),
    "unauthorized": (CredentialsRefused, None, "Tiger refuses the credentials (HTTP 401)"),
    "server error": (AnswerLost, 1, "code=1 msg=server error"),
    "timeout": (AnswerLost, 2, "code=2 msg=timeout"),
    "HTTP 500": (AnswerLost, None, "Tiger had a server error (HTTP 500)"),
    "HTTP 404": (RefreshFailed, None, "Tiger refuses the request (HTTP 404)"),
    "nonsense": (AnswerLost, None, "Tiger's answer is not JSON"),
    "no object": (AnswerLost, None, "Tiger's answer is not a JSON object"),
    "no code": (AnswerLost, None, "Tiger's answer contains no error code"),
    "no token": (AnswerLost, 0, "Tiger's answer contains no token"),
    "other": (RefreshFailed, 1010, "code=1010 msg=biz param error"),
    "drop before": (AnswerLost, None, "Tiger's answer was lost: "),
    "drop after": (AnswerLost, None, "Tiger's answer was lost: "),
    "gate": (AnswerLost, None, "Tiger's answer was lost: ReadTimeoutError"),  # longer than 1 s
}


def test_every_answer_is_covered() -> None:
    assert ANSWERS.keys() < KINDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("answer", KINDS)
async def test_each_kind_of_failure(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    caplog.set_level(logging.DEBUG)
    options = {"timeout": 1} if answer == "gate" else {}
    account = account_at(gateway, secret_key="s3cret", client_options=options)
    gateway.plan(TIGER_ID, answer, answer)
    error = await failure(account)
    kind, code, text = KINDS[answer]
    assert (type(error), error.broker_code) == (kind, code)
    assert str(error).startswith(text)
    if isinstance(error, RefreshLimited):
        assert error.retry_after == timedelta(seconds=60)
    assert len(gateway.of(TIGER_ID)) == 1
    # Neither with what it came from: the SDK's own errors have the request in them.
    shown = "".join(traceback.format_exception(error))
    assert_no_secret(gateway, f"{error} {error!r} {shown} {caplog.text}")


async def test_after_a_lost_answer_the_old_token_is_good_or_not(gateway: Gateway) -> None:
    before, after = account_at(gateway, "1"), account_at(gateway, "2")
    gateway.plan("1", "drop before")
    gateway.plan("2", "drop after")
    for account in (before, after):
        assert isinstance(await failure(account), AnswerLost)
    assert await refresh_token(before)
    assert isinstance(await failure(after), CredentialsRefused)


async def test_a_refused_connection_is_no_lost_answer() -> None:
    with closing(socket.socket()) as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/gateway"
        account = new_account(private_key=PK8, access_token=due_token(), server_url=url)
        error = await failure(account)
    assert type(error) is RefreshFailed
    assert str(error) == "Tiger cannot be reached: NewConnectionError"


async def test_secrets_in_tiger_s_message_are_masked(gateway: Gateway) -> None:
    account = account_at(gateway)
    said = f"token {account.readable_token()} of {TIGER_ID} is bad"
    answer = f'{{"code": 1010, "message": "{said}"}}'.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ANSWERS, "other", (200, answer))
        gateway.plan(TIGER_ID, "other")
        error = await failure(account)
    assert account.readable_token() not in str(error)
    assert str(error).startswith("code=1010 msg=token ")


async def test_another_key_is_refused(gateway: Gateway) -> None:
    assert isinstance(await failure(account_at(gateway, private_key=OTHER)), CredentialsRefused)
    assert gateway.known[TIGER_ID].token == gateway.of(TIGER_ID)[0].token


async def test_a_closed_account_is_not_refreshed(gateway: Gateway) -> None:
    closed = new_account(status="closed", private_key=None, server_url=gateway.url)
    with pytest.raises(InvalidState):
        await refresh_token(closed)
    assert gateway.refreshes == []


@pytest.mark.slow
async def test_many_refreshes_at_a_time(gateway: Gateway) -> None:
    """Each account gets its own token, although the SDK shares its connection pool."""
    accounts = [account_at(gateway, f"2015{number:04}") for number in range(40)]
    gates = [f"2015{number:04}" for number in range(40)]
    for tiger_id in gates:
        gateway.plan(tiger_id, "gate")
    tasks = [asyncio.create_task(refresh_token(account)) for account in accounts]
    await asyncio.to_thread(gateway.wait_for, 40)
    for tiger_id in gates:
        gateway.gates[tiger_id].set()
    tokens = [token.access_token for token in await asyncio.gather(*tasks)]
    assert tokens == [gateway.known[tiger_id].token for tiger_id in gates]
    assert max(known.most for known in gateway.known.values()) == 1


def test_the_fake_gateway_makes_tokens_in_tiger_s_format() -> None:
    times = token_times(make_token(1_764_072_000_000))
    assert times is not None
    assert times.expires_at - times.generated_at == timedelta(days=30)
