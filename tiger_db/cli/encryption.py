"""Commands for encryption keys."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.errors import ConfigurationError

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession
    from tiger_db.encryption_key_rotation import EncryptionKeyUsage, RotationReport

app = typer.Typer()
_PANEL = "Encryption keys"


@app.command(rich_help_panel=_PANEL)
def generate_encryption_key(*, key_id: options.KeyId = None) -> None:
    """Print a new random encryption key for ENCRYPTION_KEYS, without storing the key."""
    typer.echo(tiger_db.encryption.generate_encryption_key(key_id or options.new_key_id()))
    output.print_message(
        "add the new key at the end of ENCRYPTION_KEYS in every process, after a comma. When every"
        " process has the key, move the key to the beginning of ENCRYPTION_KEYS, and run `tiger-db"
        " rotate-encryption-key`. Keep a copy of each key: without the key that encrypted a secret,"
        " the secret is lost"
    )


@app.command(rich_help_panel=_PANEL)
def list_encryption_keys(*, as_json: options.AsJson = False) -> None:
    """List the configured and the missing encryption keys, with the rows that need each key."""

    async def count(session: "AsyncSession") -> "tuple[tuple[str, ...], list[EncryptionKeyUsage]]":
        provider = tiger_db.models.secrets.key_provider(session.sync_session)
        uses = await tiger_db.encryption_key_rotation.list_encryption_key_usage(session)
        return provider.key_ids if provider else (), uses

    _show_keys(*runtime.in_transaction(count), as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def rotate_encryption_key(
    *,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check that all secrets can be decrypted, but write nothing."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Re-encrypt all secrets with the first key of ENCRYPTION_KEYS, while the system runs.

    A rotation that was interrupted can be started again. The command fails if a row still needs a
    key other than the first key of ENCRYPTION_KEYS.
    """

    async def rotate(database: "tiger_db.Database") -> "tuple[tuple[str, ...], RotationReport]":
        async with database.session() as session:
            usage = await tiger_db.encryption_key_rotation.list_encryption_key_usage(session)
            provider = tiger_db.models.secrets.key_provider(session.sync_session)
        key_ids = provider.key_ids if provider else ()
        total = sum(use.unbound if use.key_id in key_ids[:1] else use.rows for use in usage)
        with output.progress("Checking" if dry_run else "Encrypting", total) as update:
            report = await tiger_db.encryption_key_rotation.rotate(
                database, dry_run=dry_run, progress=lambda done, _: update(completed=done)
            )
        return key_ids, report

    key_ids, report = runtime.with_database(rotate)
    if as_json:
        output.print_json(asdict(report))
    else:
        _show_keys(key_ids, report.uses, as_json=False)
    for problem in report.problems:
        output.print_message(problem)
    output.print_message(
        f"rows that {'can be' if dry_run else 'were'} re-encrypted with {report.key_id!r}:"
        f" {report.rotated:,}; rows that cannot be re-encrypted: {report.stuck:,}"
    )
    for key_id in report.retirable:
        output.print_message(
            f"no row needs the encryption key {key_id!r}. When {report.key_id!r} is the first key"
            f" of ENCRYPTION_KEYS in every process, remove {key_id!r}. Keep a copy of {key_id!r}"
            " for old backups"
        )
    needed = sorted({use.key_id for use in report.uses} - {report.key_id})
    if report.stuck or (needed and not dry_run):
        raise ConfigurationError(
            f"some rows still need other encryption keys: keep {', '.join(needed)} in"
            " ENCRYPTION_KEYS"
        )


def _show_keys(
    key_ids: Sequence[str], uses: "Sequence[EncryptionKeyUsage]", *, as_json: bool
) -> None:
    def role(key_id: str) -> str:
        if key_id not in key_ids:
            return "missing"
        return "encrypts" if key_id == key_ids[0] else "decrypts"

    tables_of: dict[str, list[tuple[str | None, int]]] = {key_id: [] for key_id in key_ids}
    for use in uses:
        tables_of.setdefault(use.key_id, []).append((use.table, use.rows))
    items = [
        {"key_id": key_id, "role": role(key_id), "table": table, "rows": rows}
        for key_id, tables in tables_of.items()
        for table, rows in tables or [(None, 0)]
    ]
    output.show_items(("Key", "Role", "Table", "Rows"), items, as_json=as_json)
