"""Import of accounts from the files that Tiger issues."""

import asyncio
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db import crud
from tiger_db.crud.audit_logs import recording
from tiger_db.encryption import Secret
from tiger_db.errors import EncryptionError, InvalidState, InvalidValue, StaleToken
from tiger_db.models import AccountStatus, AuditAction, TigerAccount, TigerEnvironment
from tiger_db.models.accounts import LICENSES_WITH_TOKEN, token_times
from tiger_db.models.private_keys import parse_private_key, public_numbers
from tiger_db.public import public
from tiger_db.redaction import MASK
from tiger_db.tiger.properties import (
    CLIENT_OPTIONS,
    FIELD_PROPERTIES,
    PRIVATE_KEY_PROPERTIES,
    TOKEN_FILE,
    client_option,
    plaintext,
    read_properties,
)
from tiger_db.tracebacks import forgets_locals

_KNOWN = {*PRIVATE_KEY_PROPERTIES, *FIELD_PROPERTIES.values(), *CLIENT_OPTIONS}
_WORDS = re.compile(r"(?=.{1,40}\Z)[A-Za-z]{1,24}(?:[_.-][A-Za-z]{1,24})*[0-9]?")


@dataclass(frozen=True, slots=True)
class Imported:
    """The result of `import_account`."""

    account: TigerAccount
    created: bool
    changed: list[str]  # Names of changed fields, or of all imported fields for a new account.
    token_kept: bool  # True if a newer access token was already stored.
    ignored: list[str]  # Names of unknown properties in the imported files.
    token_file: Path | None  # The file from which a token was read, or None.
    warnings: list[str]  # Messages of one line for the user, such as that a token is missing.


@public
async def import_account(
    session: AsyncSession,
    config_file: Path,
    *,
    token_file: Path | None = None,
    name: str | None = None,
) -> Imported:
    """Create an account from Tiger's files, or update the account with the same account number.

    A field that is not in the files keeps the stored value. If `token_file` is None and the
    configuration file has no access token, the token is read from the file
    `tiger_openapi_token.properties` in the same folder if this file exists, as in Tiger's SDK. If
    `token_file` and the configuration file both have an access token, the newer token is used. If
    the stored access token is newer than the files' token, the stored token is kept. A private key
    that differs only in the format counts as unchanged. The import of unchanged exported files
    writes no audit event. The argument `name` sets the account's name. By default, the name of a
    new account is the account number.

    Raises:
        InvalidValue: a file cannot be read, or a property of a file is missing or invalid. The
            error message names the file and the property, and does not contain the value.
        InvalidState: the account to update is closed.
        AlreadyExists: another session created the account at the same time.
    """
    values = await asyncio.to_thread(read_properties, config_file)
    given = _fields(config_file, values)
    token_file, token = await asyncio.to_thread(
        _read_token, config_file, token_file, has_token="token" in values
    )
    if token is not None:
        given["access_token"] = _newer_token(values.get("token"), token)
    if name is not None:
        given["account_name"] = name
    try:
        draft = TigerAccount(**{"account_name": "(new)", **given})
    except ValidationError as error:
        raise _invalid_property(error, config_file) from None
    if name is None:
        draft.account_name = draft.account_number
    stored = await crud.accounts.get_by_account_number(session, values["account"])
    license_ = draft.license or (stored and stored.license)
    used = given.get("access_token")
    if license_ in LICENSES_WITH_TOKEN and used is not None and token_times(used) is None:
        # A token with an unknown expiry would count as valid, and would never be refreshed.
        file = token_file if used == token else config_file
        raise InvalidValue(f"{file}: token: the value is not an access token of Tiger")
    if stored is None:
        account, changed, token_kept = await crud.accounts.create(session, draft), [*given], False
    else:
        account = stored
        changed, token_kept = await _update(session, stored, draft, [*given])
    if changed:
        event = recording.account_event(
            account.id,
            action=AuditAction.ACCOUNT_IMPORT,
            details={"created": stored is None, "changed": [*changed]},
        )
        await recording.insert_event(session, event)
    # A line of a base64 private key that ends with `=` can look like a property. To hide a line
    # of a private key, the name of a property is masked if the name does not consist of words, or
    # if only `=` characters follow the name.
    ignored = {
        name if _WORDS.fullmatch(name) and values[name].strip("=") else MASK
        for name in values.keys() - _KNOWN
    }
    imported = Imported(
        account, stored is None, changed, token_kept, sorted(ignored), token_file, []
    )
    imported.warnings.extend(_warnings(imported, config_file))
    return imported


def _read_token(
    config_file: Path, token_file: Path | None, *, has_token: bool
) -> tuple[Path | None, str | None]:
    """Return the file from which the token is read, and the token.

    If `token_file` is None, the token is read as in Tiger's SDK: from the token file in the folder
    of the configuration file, unless the configuration file has a token (`has_token`).
    """
    path = token_file or config_file.parent / TOKEN_FILE
    if token_file is None and (has_token or not path.exists()):
        return None, None
    token = read_properties(path).get("token")
    if token is None and token_file is not None:
        raise InvalidValue(f"{token_file}: the property `token` is missing")
    return (None if token is None else path), token


def _warnings(imported: Imported, config_file: Path) -> Iterator[str]:
    if imported.token_kept:
        yield "the stored access token was kept, because the token in the file is older"
    if imported.ignored:
        yield f"unknown lines in {config_file} were ignored: {', '.join(imported.ignored)}"
    account = imported.account
    if account.license in LICENSES_WITH_TOKEN and not account.has_valid_token:
        yield (
            f"the account serves no requests, because the license {account.license} needs a valid"
            f" access token: import the account again with its file {TOKEN_FILE}"
        )


def _fields(file: Path, values: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of TigerAccount that a configuration file sets."""
    for name in ("tiger_id", "account"):
        if name not in values:
            raise InvalidValue(f"{file}: the property {name} is missing")
    given: dict[str, Any] = {
        field: values[name] for field, name in FIELD_PROPERTIES.items() if name in values
    }
    if "environment" in given:  # the SDK reads the environment TEST as SANDBOX
        environment = given["environment"].upper()
        given["environment"] = TigerEnvironment.SANDBOX if environment == "TEST" else environment
    if options := {name: values[name] for name in CLIENT_OPTIONS if name in values}:
        given["client_options"] = options
    private_key = _private_key(file, values)
    given["private_key"], given["private_key_format"] = parse_private_key(private_key)
    return given


def _private_key(file: Path, values: Mapping[str, str]) -> str:
    """Return the private key that the SDK uses.

    Raises:
        InvalidValue: the file has no valid private key, or has different private keys.
    """
    keys: dict[str, RSAPublicNumbers] = {}
    for name in PRIVATE_KEY_PROPERTIES:
        if name in values:
            try:
                keys[name] = public_numbers(values[name])
            except InvalidValue as error:
                raise InvalidValue(f"{file}: {name}: {error}") from None
    if not keys:
        raise InvalidValue(f"{file}: the property private_key_pk1 or private_key_pk8 is missing")
    if len({*keys.values()}) > 1:
        raise InvalidValue(f"{file}: {' and '.join(keys)} are different keys: remove the wrong key")
    return values[next(iter(keys))]


def _invalid_property(error: ValidationError, file: Path) -> InvalidValue:
    """Return an InvalidValue error that names the file and the property of the invalid field."""
    problem = error.errors(include_url=False, include_input=False)[0]
    reason = problem["msg"].removeprefix("Value error, ")
    field = str(problem["loc"][0])
    if field == "account_name":
        return InvalidValue(f"name: {reason}")
    return InvalidValue(f"{file}: {FIELD_PROPERTIES.get(field, field)}: {reason}")


def _newer_token(token: str | None, other: str) -> str:
    """Return the newer of two tokens, or `token` if the age of one of the tokens is unknown."""
    if token is None:
        return other
    times, others = token_times(token), token_times(other)
    later = times and others and others.generated_at > times.generated_at
    return other if later else token


@forgets_locals
async def _update(
    session: AsyncSession, stored: TigerAccount, draft: TigerAccount, given: list[str]
) -> tuple[list[str], bool]:
    """Update an account. Return the changed fields, and whether the stored token was kept."""
    if stored.status == AccountStatus.CLOSED:
        raise InvalidState(
            f"{stored.label()} is closed: reopen the account first (`tiger-db reopen-account`)"
        )
    options = {k: v for k, v in draft.client_options.items() if client_option(stored, k) != v}
    draft.client_options = {**stored.client_options, **options}
    changed = [field for field in given if _comparable(stored, field) != _comparable(draft, field)]
    if "private_key" not in changed:  # an unchanged private key keeps the stored format
        changed = [field for field in changed if field != "private_key_format"]
    changes = {field: getattr(draft, field) for field in changed if field != "access_token"}
    if changes:
        await crud.accounts.update(session, stored.id, **changes)
    if "access_token" not in changed:
        return changed, False
    try:
        token = plaintext(draft.access_token)
        await crud.accounts.update_tokens(session, stored.id, access_token=token)
    except StaleToken:
        return [*changes], True
    return changed, False


def _comparable(account: TigerAccount, field: str) -> object:
    """Return the value of a field for comparison, or None for an unreadable secret."""
    value = getattr(account, field)
    try:
        if isinstance(value, Secret):
            value = value.get_secret_value()
        if field == "private_key":
            return public_numbers(value)
    except (EncryptionError, InvalidValue):
        return None
    return value.strip() if isinstance(value, str) else value
