"""Secrets are in no output, log, SQL echo or error."""

import json
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import text

from tests.support.encryption_keys import AAD, RING, SECRETS, secret_account, values_of
from tests.support.factories import new_account
from tiger_db import APIKeyScope, AuditAction, AuditLog, Database, TigerAccount, crud
from tiger_db.database import AsyncSession
from tiger_db.encryption import EncryptedSecret, Secret, encrypt
from tiger_db.errors import TigerDBError
from tiger_db.redaction import MASK

QUERY = AuditAction.DATA_QUERY


def outputs(account: TigerAccount) -> Iterator[str]:
    yield from (
        repr(account),
        str(account),
        f"{account}",
        str(account.__dict__),
        f"{vars(account)}",
    )
    yield from (str(account.model_dump()), account.model_dump_json())
    yield json.dumps(account.model_dump(mode="json"))
    for name in SECRETS:
        secret = getattr(account, name)
        yield from (repr(secret), str(secret), f"{secret!s:>20} {secret!a}", f"{[secret]}")


@pytest.mark.parametrize("stored", [False, True])
async def test_a_secret_is_in_no_output(session: AsyncSession, *, stored: bool) -> None:
    account = await secret_account(session) if stored else new_account(**SECRETS)
    for output in outputs(account):
        assert not [secret for secret in SECRETS.values() if secret in output]
    assert values_of(account) == SECRETS


def test_the_length_of_a_secret_is_in_no_output() -> None:
    assert repr(Secret("a")) == repr(Secret("a" * 100))
    assert str(Secret("")) == MASK


def test_an_encrypted_secret_has_the_same_value_and_length() -> None:
    secret = EncryptedSecret(encrypt(RING, "text", AAD), AAD, RING)
    assert secret.get_secret_value() == "text"
    assert len(secret) == 4
    assert Secret("text") == Secret("text") != Secret("other")


@pytest.mark.parametrize("mask", [MASK, SecretStr(MASK)])
async def test_a_mask_does_not_replace_the_secret(session: AsyncSession, mask: Any) -> None:
    account = await secret_account(session)
    with pytest.raises(ValidationError, match="not its mask"):
        await crud.accounts.update(session, account.id, private_key=mask)
    assert values_of(account) == SECRETS


async def test_logs_echo_and_errors_contain_no_secret(
    clone: Database, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("sqlalchemy")
    handlers = [*logger.handlers]
    errors: list[BaseException] = []
    settings = clone.settings.model_copy(update={"db_debug": True})
    async with Database(settings) as database:
        async with database.session() as session:
            account = await secret_account(session, account_number="77777", account_name="Nobody's")
            key, raw_key = await crud.api_keys.create_api_key(
                session, name="key", scopes=[APIKeyScope.MCP_READ]
            )
            assert await crud.api_keys.verify_api_key(session, raw_key)
            await crud.accounts.update_tokens(session, account.id, access_token="plain-token-of-x")
            await crud.accounts.list_by_tiger_id(session, SECRETS["tiger_id"])
            await crud.accounts.record_error(session, account.id, message="boom")
            told: dict[str, Any] = {"who": "Nobody's", "key": raw_key, "token": SECRETS["tiger_id"]}
            for number in (1, 2):  # one is inserted, two are copied
                events = [AuditLog(action=QUERY, details=told) for _ in range(number)]
                await crud.audit_logs.log_events(session, events)
            event = await crud.audit_logs.log_event(session, action=QUERY, details=told)
        for failing in (
            lambda s: secret_account(s, account_number="77777"),  # this number exists
            lambda s: crud.accounts.update(s, account.id, **SECRETS, account_number=""),
            lambda s: s.execute(text("UPDATE tiger_accounts SET error_count = -1")),
            lambda s: crud.audit_logs.log_events(s, [event]),  # this event exists
        ):
            with pytest.raises(Exception) as caught:  # noqa: PT011  # each its own
                async with database.session() as session:
                    await failing(session)
            errors.append(caught.value)
    for handler in [h for h in logger.handlers if h not in handlers]:
        logger.removeHandler(handler)
    written = "".join(capfd.readouterr()) + caplog.text
    assert "INSERT INTO tiger_accounts" in written  # the echo is on
    assert "INSERT INTO audit_logs" in written
    assert "Nobody's" not in written  # nor any other value
    assert isinstance(errors[0], TigerDBError)
    written += "".join("".join(traceback.format_exception(error)) for error in errors)
    for secret in [*SECRETS.values(), "plain-token-of-x", raw_key[-64:], key.key_hash]:
        assert secret not in written
        assert secret.encode().hex() not in written


async def test_secrets_of_a_loaded_row_are_bound_to_its_stored_values(
    clone: Database,
) -> None:
    async with clone.session() as session:
        stored = await crud.accounts.create(session, new_account(**SECRETS))
    async with clone.session() as session:
        changed = await session.get(TigerAccount, stored.id)
        assert changed is not None
        # The values to which the secrets are bound change before a secret is read.
        changed.client_options["timeout"] = 15
        changed.client_options["socket_host_port"] = "other.example"
        assert values_of(changed) == SECRETS
    async with clone.session() as session:
        read = await session.get(TigerAccount, stored.id)
        assert read is not None
    # After the end of the session, the secrets still have its keys.
    dumped = read.model_dump()
    assert dumped["private_key"].get_secret_value() == SECRETS["private_key"]
    assert values_of(read) == SECRETS
