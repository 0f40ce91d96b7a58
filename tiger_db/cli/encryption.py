"""The keys under which secrets are stored."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

import tiger_db
from tiger_db.cli.options import finish, query, settings
from tiger_db.cli.output import AsJson, print_json, progress, show_table, talk
from tiger_db.errors import ConfigurationError

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession
    from tiger_db.encryption_key_rotation import EncryptionKeyUsage, RotationReport

app = typer.Typer()
_PANEL = "Encryption keys"


@app.command(rich_help_panel=_PANEL)
def generate_encryption_key(
    *,
    key_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="Its id; made of today's date if not given."),
    ] = None,
) -> None:
    """Print a new random key, as ENCRYPTION_KEYS takes it. It is stored nowhere."""
    typer.echo(tiger_db.encryption.generate_key(key_id or new_id()))
    talk(
        "put it first in ENCRYPTION_KEYS, before a comma and the keys that are there, and keep it:"
        " nothing else decrypts what it encrypts. Then run `tiger-db rotate-encryption-key`"
    )


@app.command(rich_help_panel=_PANEL)
def list_encryption_keys(*, as_json: AsJson = False) -> None:
    """List the keys, configured or needed, with the number of rows that need each."""

    async def count(session: "AsyncSession") -> "tuple[tuple[str, ...], list[EncryptionKeyUsage]]":
        provider = tiger_db.models.secrets.key_provider(session.sync_session)
        uses = await tiger_db.encryption_key_rotation.list_encryption_key_usage(session)
        return provider.key_ids if provider else (), uses

    _show_keys(*query(count), as_json=as_json)


@app.command(rich_help_panel=_PANEL)
def rotate_encryption_key(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and decrypt everything, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Encrypt all stored secrets under the first key, while others read and write.

    It may be stopped at any time and run again. It fails as long as a row needs another key.
    """

    async def run() -> "tuple[tuple[str, ...], RotationReport]":
        async with tiger_db.Database(settings()) as database:
            async with database.session() as session:
                total = await tiger_db.encryption_key_rotation.count_rows_to_rotate(session)
                provider = tiger_db.models.secrets.key_provider(session.sync_session)
            assert provider is not None
            with progress("Checking" if dry_run else "Encrypting", total) as advance:
                report = await tiger_db.encryption_key_rotation.rotate(
                    database, dry_run=dry_run, advance=advance
                )
            return provider.key_ids, report

    key_ids, report = finish(run())
    if as_json:
        print_json(asdict(report))
    else:
        _show_keys(key_ids, report.uses, as_json=False)
    for problem in report.problems:
        talk(problem)
    talk(
        f"{report.rotated} rows {'can be' if dry_run else 'were'} encrypted under"
        f" {report.key_id!r}, {report.stuck} cannot"
    )
    for key_id in report.retirable:
        talk(
            f"no row needs {key_id!r}: remove it once every process has {report.key_id!r} first,"
            " and keep it for as long as a backup of now may be restored"
        )
    needed = sorted({use.key_id for use in report.uses} - {report.key_id})
    if report.stuck or (needed and not dry_run):
        raise ConfigurationError(f"rows still need other keys: keep {', '.join(needed)}")


def new_id() -> str:
    """Today and a little chance, because an id must never stand for two keys."""
    import secrets  # noqa: PLC0415  # slow, and `--help` is to be fast

    return f"{datetime.now(UTC):%Y-%m-%d}-{secrets.token_hex(2)}"


def _show_keys(
    key_ids: Sequence[str], uses: "Sequence[EncryptionKeyUsage]", *, as_json: bool
) -> None:
    def role(key_id: str) -> str:
        if key_id not in key_ids:
            return "missing"
        return "encrypts" if key_id == key_ids[0] else "decrypts"

    found: dict[str, list[tuple[str | None, int]]] = {key_id: [] for key_id in key_ids}
    for use in uses:
        found.setdefault(use.key_id, []).append((use.table, use.rows))
    items = [
        {"key_id": key_id, "role": role(key_id), "table": table, "rows": rows}
        for key_id, tables in found.items()
        for table, rows in tables or [(None, 0)]
    ]
    if as_json:
        print_json({"items": items, "next_cursor": None})
    else:
        show_table(("Key", "Role", "Table", "Rows"), [list(item.values()) for item in items])
