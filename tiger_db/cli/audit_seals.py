"""Commands that seal, verify and maintain the audit trail."""

from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import tiger_db
from tiger_db.cli import options, output, runtime
from tiger_db.cli.audit_events import PANEL
from tiger_db.errors import ConfigurationError, DatabaseUnavailable, InvalidValue

if TYPE_CHECKING:
    from tiger_db.audit import Sealing, Verification

T = TypeVar("T")
_MAX_FINDINGS_SHOWN = 20
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def generate_audit_signing_key() -> None:
    """Print a new random signing key for AUDIT_SIGNING_KEY, without storing the key."""
    typer.echo(tiger_db.signing.generate_signing_key())
    output.print_message(
        "only `tiger-db seal-audit` and `tiger-db maintain-audit` need the signing key. To verify"
        " the audit trail, use the public key that `tiger-db print-audit-public-key` prints"
    )


@app.command(rich_help_panel=PANEL)
def print_audit_public_key() -> None:
    """Print the public key of AUDIT_SIGNING_KEY as PEM, for `verify-audit`."""
    key = runtime.with_database(tiger_db.audit.required_key)
    typer.echo(tiger_db.signing.public_pem(key.public_key()), nl=False)


@app.command(rich_help_panel=PANEL)
def seal_audit(
    *,
    patience: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Maximum time to wait for open transactions that wrote events, and for each lock.",
        ),
    ] = 10,
    repair_sequence: Annotated[
        bool,
        typer.Option(
            "--repair-sequence",
            help="First move a sequence of positions that is behind the newest seal, for example"
            " after a logical copy of the database. The repair is recorded as an event.",
        ),
    ] = False,
    after_restore: Annotated[
        bool,
        typer.Option(
            "--after-restore",
            help="First record that a restore of the database from a backup has lost the seals up"
            " to the newest checkpoint in AUDIT_CHECKPOINTS.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Seal all committed audit events without a seal. Run this command every minute from cron.

    The command first verifies the seals since its newest checkpoint in the folder
    AUDIT_CHECKPOINTS, and seals nothing if they are not valid.
    """
    wait = timedelta(seconds=patience)

    async def seal(database: "tiger_db.Database") -> "Sealing":
        if repair_sequence:
            moved = await tiger_db.audit.repair_sequence(database, patience=wait)
            output.print_message(
                "the sequence of positions is not behind the newest seal"
                if moved is None
                else f"moved the sequence of positions from {moved[0]} to {moved[1]}"
            )
        if after_restore:
            restore = await tiger_db.audit.record_restore(database, patience=wait)
            output.print_message(
                "the database has the seal of the newest checkpoint, or its loss is recorded"
                if restore is None
                else f"{restore}; {output.count_of(restore.kept, 'event')} can be sealed again"
            )
        with output.progress("Sealing") as update:

            def progress(events: int, _total: int | None) -> None:
                update(description=output.count_of(events, "event"))

            return await tiger_db.audit.seal(database, patience=wait, progress=progress)

    result = runtime.with_database(seal)
    if result.verified:
        output.print_message(
            f"verified the chain of {output.count_of(result.verified, 'seal')}, and saved the first"
            " checkpoint in AUDIT_CHECKPOINTS"
        )
    if as_json:
        output.print_json(asdict(result))
    if result.waits_for:
        pids = ", ".join(str(pid or "a prepared transaction") for pid in result.waits_for)
        raise DatabaseUnavailable(
            "no event was sealed, because transactions that wrote events are still open"
            f" (server processes: {pids})"
        )
    output.print_message(
        f"sealed {output.count_of(result.rows, 'event')} in {output.count_of(result.seals, 'seal')}"
    )


@app.command(rich_help_panel=PANEL)
def verify_audit(
    *,
    export: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Verify a file that `export-events` wrote without filters. No database is used.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Checkpoint that `export-checkpoint` exported earlier."),
    ] = None,
    public_key: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="File with a public key. Default: the key of AUDIT_SIGNING_KEY."
        ),
    ] = None,
    archive: Annotated[
        bool,
        typer.Option(
            "--archive",
            help="Verify the retired events in AUDIT_ARCHIVE, too, as one trail with the database.",
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Verify all audit events against the seals, and show events and seals that are not valid."""
    if archive and export is not None:
        raise typer.BadParameter("give either --from or --archive", param_hint="--archive")
    keys = [_read(file, tiger_db.signing.parse_public_key) for file in public_key or ()]
    head = _read(checkpoint, tiger_db.audit.read_checkpoint) if checkpoint is not None else None

    async def verify(database: "tiger_db.Database") -> "Verification":
        return await tiger_db.audit.verify(
            database, keys=keys, checkpoint=head, archive=archive, progress=progress
        )

    with output.progress("Verifying") as update:

        def progress(done: int, total: int | None) -> None:
            update(completed=done, total=total)

        if export is None:
            report = runtime.with_database(verify)
        else:
            if not keys:
                setting = tiger_db.keys_in_force.AUDIT_SIGNING_KEY
                own = tiger_db.keys_in_force.configured(runtime.settings(), setting)
                keys = [own.public_key()] if own is not None else []
            report = runtime.run_async(
                tiger_db.audit.verify_export(
                    export,
                    keys=keys,
                    checkpoint=head,
                    folder=runtime.settings().audit_checkpoints,
                    progress=progress,
                )
            )
    _show_verification(report, as_json=as_json, has_archive=archive)


def _show_verification(report: "Verification", *, as_json: bool, has_archive: bool) -> None:
    """Show the result of a verification. Raise InvalidValue if the trail is not valid."""
    if as_json:
        output.print_json({"sound": report.sound, **asdict(report)})
    elif report.findings or report.warnings:
        found = [*report.findings, *report.warnings]
        rows = [(f.position, f.seal, f.kind, f.message) for f in found]
        output.show_table(("Position", "Seal", "Finding", "Message"), rows[:_MAX_FINDINGS_SHOWN])
    output.print_message(
        f"verified {output.count_of(report.rows, 'event')} against"
        f" {output.count_of(report.seals, 'seal')}; not sealed yet:"
        f" {output.count_of(report.unsealed, 'event')}; removed by `tiger-db maintain-audit`:"
        f" {output.count_of(report.retired, 'event')}"
        + (f", of which {report.archived:,} are in the archive" if has_archive else "")
    )
    for line in report.basis:
        output.print_message(line)
    if report.warnings:
        output.print_message(f"{output.count_of(len(report.warnings), 'warning')}: see the table")
    if not report.sound:
        first = report.findings[0]
        event_id = f" ({first.event_id})" if first.event_id else ""
        more = f"; {report.count:,} findings in total" if report.count > 1 else ""
        raise InvalidValue(f"{first.kind}: {first.message}{event_id}{more}")


@app.command(rich_help_panel=PANEL)
def change_audit_signing_key(
    *,
    new_key: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Private file with the new key of `generate-audit-signing-key`."
        ),
    ],
) -> None:
    """Introduce a new signing key by a seal that the key in AUDIT_SIGNING_KEY signs.

    Afterwards, set AUDIT_SIGNING_KEY to the new key on each machine that seals. The public key of
    the old key, or of the new key, verifies the whole audit trail.
    """
    key = _read(new_key, tiger_db.signing.parse_signing_key)
    number = runtime.with_database(
        lambda database: tiger_db.audit.change_signing_key(database, key)
    )
    output.print_message(
        f"seal {number} introduces the new signing key: set AUDIT_SIGNING_KEY to the new key on"
        " each machine that seals"
    )


@app.command(rich_help_panel=PANEL)
def export_checkpoint(*, out: options.Out = None, overwrite: options.Overwrite = False) -> None:
    """Export the newest seal as a checkpoint. Keep the checkpoint on another machine.

    With a checkpoint, `verify-audit` detects missing and replaced seals, up to the seal in the
    checkpoint.
    """
    text = runtime.with_database(tiger_db.audit.export_checkpoint)
    with output.open_output(out, overwrite=overwrite) as file:
        file.write(text)


@app.command(rich_help_panel=PANEL)
def maintain_audit(*, as_json: options.AsJson = False) -> None:
    """Create audit partitions for the next months, and remove the expired audit partitions.

    An audit partition expires AUDIT_RETENTION_MONTHS months after the end of its month. If
    AUDIT_ARCHIVE is set, the command first writes the events of the partition to the archive. The
    command also moves events from the default partition to the partitions of the events' months.
    Run this command every day from cron. Several machines may run this command.
    """
    with output.progress("Archiving") as update:

        def progress(done: int, total: int | None) -> None:
            update(completed=done, total=total)

        result = runtime.with_database(
            lambda database: tiger_db.audit.maintain(database, progress=progress)
        )
    if as_json:
        output.print_json(asdict(result))
    removed = "".join(f"; removed {month}" for month in result.retired)
    output.print_message(f"created {output.count_of(result.made, 'partition')}{removed}")
    reasons = [
        f"the events of {month} were not removed: {reason}" for month, reason in result.kept.items()
    ]
    for reason in reasons[:-1]:
        output.print_message(f"error: {reason}")
    if reasons:
        raise InvalidValue(reasons[-1])


@app.command(rich_help_panel=PANEL)
def archive_audit(
    *,
    month: Annotated[str, typer.Option(metavar="YYYY-MM", help="Month that has ended.")],
    as_json: options.AsJson = False,
) -> None:
    """Write the events of a month to AUDIT_ARCHIVE as Parquet, and leave them in the database.

    `maintain-audit` does this itself before it removes a month.
    """
    month = options.parse_month(month, "--month")
    with output.progress("Archiving") as update:

        def progress(done: int, total: int | None) -> None:
            update(completed=done, total=total)

        archived = runtime.with_database(
            lambda database: tiger_db.audit.archive(database, month, progress=progress)
        )
    if as_json:
        output.print_json(None if archived is None else asdict(archived))
    elif archived is not None:
        rows = [(name, rows, digest) for name, rows, digest in archived.files]
        output.show_table(("File", "Rows", "SHA-256"), rows)
    output.print_message(
        f"the database has no events of {month}"
        if archived is None
        else f"archived {output.count_of(archived.events, 'event')} of {month}"
    )


def _read(file: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InvalidValue(f"{file}: the file is not UTF-8 text") from None
    except (ConfigurationError, InvalidValue) as error:
        raise InvalidValue(f"{file}: {error}") from None
