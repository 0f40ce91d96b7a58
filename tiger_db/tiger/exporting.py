"""Export of accounts to the files that Tiger's SDKs read."""

import asyncio
import os
from pathlib import Path
from uuid import UUID

from tiger_db.crud.audit_logs import recording
from tiger_db.crud.common import get_or_raise
from tiger_db.database import Database
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.files import check_output, file_errors, make_private_folder, write_private
from tiger_db.models import AuditAction, AuditSeverity, PrivateKeyFormat, TigerAccount
from tiger_db.models.private_keys import base64_der, load_private_key
from tiger_db.public import public
from tiger_db.tiger.properties import (
    CLIENT_OPTIONS,
    CONFIG_FILE,
    TOKEN_FILE,
    client_option,
    format_properties,
    plaintext,
)
from tiger_db.tracebacks import forgets_locals


@public
async def export_account(
    database: Database,
    account_id: UUID,
    *,
    folder: Path,
    overwrite: bool = False,
    with_token: bool = True,
) -> list[Path]:
    """Write a configuration file and, if the account has an access token, a token file.

    If `with_token` is false, the token file is not written.

    Return the paths of the written files. New files have mode 0600, and a new folder has mode 0700.
    The audit event is committed before the files are written. With `overwrite`, existing files are
    replaced, and an existing token file is removed if no token file is written. For symbolic links,
    pipes and devices, see `tiger_db.files.output_files`.

    Raises:
        AlreadyExists: a file that the export would write already exists. The export wrote no file.
        NotFound: the account to export does not exist.
        InvalidState: the account to export is closed.
        InvalidValue: the account's private key is not an RSA key, or `folder` is not a folder.
        EncryptionError: the account's secrets cannot be decrypted.
        FileError: the files cannot be written. A failed export creates no new file.
    """
    with file_errors():
        return await _export_account(
            database, account_id, folder, overwrite=overwrite, with_token=with_token
        )


@forgets_locals
async def _export_account(
    database: Database, account_id: UUID, folder: Path, *, overwrite: bool, with_token: bool
) -> list[Path]:
    await asyncio.to_thread(_check_folder, folder, overwrite=overwrite)
    async with database.session() as session:
        account = await get_or_raise(session, TigerAccount, account_id)
        texts = _file_texts(account, with_token=with_token)
        await asyncio.to_thread(make_private_folder, folder)
        event = recording.account_event(
            account.id,
            action=AuditAction.ACCOUNT_EXPORT,
            severity=AuditSeverity.HIGH,
            details={"files": [*texts]},
        )
        await recording.insert_event(session, event)
    # An old token file is removed, because the SDK would send the token even for another account.
    obsolete = None if TOKEN_FILE in texts else TOKEN_FILE
    return await asyncio.to_thread(
        write_private, folder, texts, overwrite=overwrite, obsolete=obsolete
    )


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidValue(f"{folder} is not a folder")
    for path in (folder / CONFIG_FILE, folder / TOKEN_FILE):
        check_output(path, overwrite=overwrite)


def _file_texts(account: TigerAccount, *, with_token: bool) -> dict[str, str]:
    """Return a dict from file names to the texts of an account's files."""
    if account.private_key is None:
        raise InvalidState(f"{account.label()} is closed")
    key, _ = load_private_key(plaintext(account.private_key))
    config = {
        # Each of Tiger's SDKs reads the private key only in the format PKCS#1 or only in PKCS#8.
        "private_key_pk1": base64_der(key, PrivateKeyFormat.PK1),
        "private_key_pk8": base64_der(key, PrivateKeyFormat.PK8),
        "tiger_id": plaintext(account.tiger_id),
        "account": account.account_number,
        "license": account.license,
        "env": account.environment,
        "secret_key": plaintext(account.secret_key),
        "server_url": account.server_url,
        **{name: client_option(account, name) for name in CLIENT_OPTIONS},
    }
    texts = {CONFIG_FILE: format_properties(config)}
    if with_token and account.access_token is not None:
        texts[TOKEN_FILE] = format_properties({"token": plaintext(account.access_token)})
    return texts
