"""Accounts from the files that Tiger gives out."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db import crud
from tiger_db.encryption import Secret
from tiger_db.errors import EncryptionError, InvalidState, InvalidValue, StaleToken
from tiger_db.models import AccountStatus, AuditAction, TigerAccount, TigerEnvironment
from tiger_db.redaction import MASK
from tiger_db.tiger.private_keys import parse_private_key, public_numbers
from tiger_db.tiger.properties import KEY_LINES, LINES, OPTIONS, option, plain, read_properties
from tiger_db.tokens import token_times

_KNOWN = {*KEY_LINES, *LINES.values(), *OPTIONS}
_WORDS = re.compile(r"(?=.{1,40}\Z)[A-Za-z]{1,24}(?:[_.-][A-Za-z]{1,24})*[0-9]?")


@dataclass(frozen=True, slots=True)
class Imported:
    """What `import_account` has done."""

    account: TigerAccount
    created: bool
    changed: list[str]  # fields that have another value now; of a new account, all that were given
    token_kept: bool  # the stored access token is newer than the files', so that it stays
    ignored: list[str]  # lines that mean nothing here, by name


async def import_account(
    session: AsyncSession,
    config_file: Path,
    *,
    token_file: Path | None = None,
    name: str | None = None,
) -> Imported:
    """Store the account of Tiger's files, or change the stored one of that number where it differs.

    What the files do not mention stays as it is stored, and so does an access token that is newer
    than theirs; of two in the files, the newer one counts. The same private key in another format
    is no change. `name` is what people call the account; without it, a new one is called by its
    number. Importing one's own export changes nothing and writes no audit event.

    Raises:
        InvalidValue: a file cannot be read, a line is missing, or its value is refused; the message
            names both and shows no value.
        InvalidState: the account is closed.
        AlreadyExists: another session has stored the account meanwhile.
    """
    values = await asyncio.to_thread(read_properties, config_file)
    given = _fields(config_file, values)
    if token_file is not None:
        token = (await asyncio.to_thread(read_properties, token_file)).get("token")
        if token is None:
            raise InvalidValue(f"{token_file}: token is missing")
        given["access_token"] = _newer(values.get("token"), token)
    if name is not None:
        given["account_name"] = name
    with _told_by_line(config_file, named=name is not None):
        draft = TigerAccount(**{"account_name": values["account"], **given})
    stored = await crud.accounts.get_by_account_number(session, draft.account_number)
    if stored is None:
        account, changed, token_kept = await crud.accounts.create(session, draft), [*given], False
    else:
        account = stored
        changed, token_kept = await _update(session, stored, draft, [*given])
    if changed:
        await crud.audit_logs.log_event(
            session,
            action=AuditAction.ACCOUNT_IMPORT,
            resource_type="tiger_account",
            resource_id=str(account.id),
            tiger_account_id=account.id,
            details={"created": stored is None, "changed": [*changed]},
        )
    # What may be a piece torn off a key is not shown: no plain word, or base64's padding after it.
    ignored = {
        line if _WORDS.fullmatch(line) and values[line].strip("=") else MASK
        for line in values.keys() - _KNOWN
    }
    return Imported(account, stored is None, changed, token_kept, sorted(ignored))


def _fields(file: Path, values: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an account that a configuration file gives."""
    for line in ("tiger_id", "account"):
        if line not in values:
            raise InvalidValue(f"{file}: {line} is missing")
    given: dict[str, Any] = {field: values[line] for field, line in LINES.items() if line in values}
    if "environment" in given:  # the SDK knows two names of the sandbox, in any case
        environment = given["environment"].upper()
        given["environment"] = TigerEnvironment.SANDBOX if environment == "TEST" else environment
    if options := {name: values[name] for name in OPTIONS if name in values}:
        given["client_options"] = options
    line = _key_line(file, values)
    given["private_key"], given["private_key_format"] = parse_private_key(values[line])
    return given


def _key_line(file: Path, values: Mapping[str, str]) -> str:
    """The line that has the private key, in the SDK's precedence; they must have the same one."""
    keys: dict[str, RSAPublicNumbers] = {}
    for line in KEY_LINES:
        if line in values:
            try:
                keys[line] = public_numbers(values[line])
            except InvalidValue as error:
                raise InvalidValue(f"{file}: {line}: {error}") from None
    if not keys:
        raise InvalidValue(f"{file}: private_key_pk1 or private_key_pk8 is missing")
    if len({*keys.values()}) > 1:
        raise InvalidValue(f"{file}: {' and '.join(keys)} are different keys: keep the right one")
    return next(iter(keys))


@contextmanager
def _told_by_line(file: Path, *, named: bool) -> Iterator[None]:
    """Name the line of a field that is refused."""
    try:
        yield
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        reason = problem["msg"].removeprefix("Value error, ")
        field = str(problem["loc"][0])
        if field == "account_name" and named:
            raise InvalidValue(f"name: {reason}") from None
        line = {**LINES, "account_name": "account"}.get(field, field)
        raise InvalidValue(f"{file}: {line}: {reason}") from None


def _newer(token: str | None, other: str) -> str:
    """The one made later; where they do not tell, the first, which the SDK prefers."""
    if token is None:
        return other
    times, others = token_times(token), token_times(other)
    later = times and others and others.generated_at > times.generated_at
    return other if later else token


async def _update(
    session: AsyncSession, stored: TigerAccount, draft: TigerAccount, given: list[str]
) -> tuple[list[str], bool]:
    """Change what differs of the given fields. Returns their names, and whether a token stayed."""
    if stored.status == AccountStatus.CLOSED:
        raise InvalidState(
            f"{stored.label()} is closed: reopen it first (`tiger-db reopen-account`)"
        )
    options = {k: v for k, v in draft.client_options.items() if option(stored, k) != v}
    draft.client_options = {**stored.client_options, **options}
    changed = [field for field in given if _said(stored, field) != _said(draft, field)]
    if "private_key" not in changed:  # the format is of the key as it is stored
        changed = [field for field in changed if field != "private_key_format"]
    changes = {field: getattr(draft, field) for field in changed if field != "access_token"}
    if changes:
        await crud.accounts.update(session, stored.id, **changes)
    if "access_token" not in changed:
        return changed, False
    try:
        token = plain(draft.access_token)
        await crud.accounts.update_tokens(session, stored.id, access_token=token)
    except StaleToken:
        return [*changes], True
    return changed, False


def _said(account: TigerAccount, field: str) -> object:
    """What a file would say of it, to compare; None: a secret that nobody can read any more."""
    value = getattr(account, field)
    try:
        if isinstance(value, Secret):
            value = value.get_secret_value()
        if field == "private_key":
            return public_numbers(value)
    except (EncryptionError, InvalidValue):
        return None
    return value.strip() if isinstance(value, str) else value
