"""Accounts as files that Tiger's SDKs read."""

import asyncio
import os
from pathlib import Path
from uuid import UUID

from tiger_db import crud
from tiger_db.database import Database
from tiger_db.errors import InvalidState, InvalidValue, NotFound
from tiger_db.files import check_output, make_private_folder, write_private
from tiger_db.models import AuditAction, AuditSeverity, PrivateKeyFormat, TigerAccount
from tiger_db.tiger.private_keys import base64_der, load_private_key
from tiger_db.tiger.properties import (
    CONFIG_FILE,
    OPTIONS,
    TOKEN_FILE,
    option,
    plain,
    properties,
)


async def export_account(
    database: Database, account_id: UUID, *, folder: Path, overwrite: bool = False
) -> list[Path]:
    """Write an account as the files that Tiger's SDKs read: the configuration, the token if any.

    Returns their paths. They are for their owner alone (0600), and so is the folder if it must be
    made (0700). The audit event is committed before anything is written. With `overwrite`, files of
    these names are replaced, and a token file goes where the account has no token. Links are
    followed, pipes and devices are written into: see `tiger_db.files.output_files`.

    Raises:
        AlreadyExists: a file of these names is there; nothing was written.
        NotFound: there is no such account.
        InvalidState: it is closed.
        InvalidValue: its private key is not an RSA key, or the folder is none.
        EncryptionError: its secrets cannot be decrypted.
        OSError: the files cannot be written; no new one is left behind.
    """
    await asyncio.to_thread(_check_folder, folder, overwrite=overwrite)
    async with database.session() as session:
        account = await crud.accounts.get(session, account_id)
        if account is None:
            raise NotFound(f"there is no TigerAccount {account_id}")
        texts = _texts(account)
        await asyncio.to_thread(make_private_folder, folder)
        await crud.audit_logs.log_event(
            session,
            action=AuditAction.ACCOUNT_EXPORT,
            severity=AuditSeverity.HIGH,
            resource_type="tiger_account",
            resource_id=str(account.id),
            tiger_account_id=account.id,
            details={"files": [*texts]},
        )
    # An old token there would be sent as this account's.
    stale = None if TOKEN_FILE in texts else TOKEN_FILE
    return await asyncio.to_thread(write_private, folder, texts, overwrite=overwrite, without=stale)


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidValue(f"{folder} is not a folder")
    for path in (folder / CONFIG_FILE, folder / TOKEN_FILE):
        check_output(path, overwrite=overwrite)


def _texts(account: TigerAccount) -> dict[str, str]:
    """The files' texts, by name."""
    if account.private_key is None:
        raise InvalidState(f"{account.label()} is closed")
    key, _ = load_private_key(plain(account.private_key))
    config = {
        # Both, as in the files that Tiger gives out: each of its SDKs reads one of them.
        "private_key_pk1": base64_der(key, PrivateKeyFormat.PK1),
        "private_key_pk8": base64_der(key, PrivateKeyFormat.PK8),
        "tiger_id": plain(account.tiger_id),
        "account": account.account_number,
        "license": account.license,
        "env": account.environment,
        "secret_key": plain(account.secret_key),
        "server_url": account.server_url,
        **{name: option(account, name) for name in OPTIONS},
    }
    texts = {CONFIG_FILE: properties(config)}
    if account.access_token is not None:
        texts[TOKEN_FILE] = properties({"token": plain(account.access_token)})
    return texts
