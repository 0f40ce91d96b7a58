"""Keeping the audit trail: sealed, verified, in months."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

import tiger_db
from tiger_db.cli.audit_events import PANEL
from tiger_db.cli.options import finish, settings
from tiger_db.cli.output import (
    AsJson,
    Out,
    Overwrite,
    output,
    print_json,
    progress_to,
    show_table,
    talk,
)
from tiger_db.errors import DatabaseUnavailable, InvalidValue

if TYPE_CHECKING:
    from tiger_db.audit import Maintenance, Sealing, Verification

T = TypeVar("T")
_SHOWN = 20  # findings
app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def generate_audit_signing_key() -> None:
    """Print a new random key, as AUDIT_SIGNING_KEY takes it. It is stored nowhere."""
    typer.echo(tiger_db.signing.generate_signing_key())
    talk(
        "only who seals needs it. Who verifies needs what `tiger-db print-audit-public-key` prints"
    )


@app.command(rich_help_panel=PANEL)
def print_audit_public_key() -> None:
    """Print the public key of AUDIT_SIGNING_KEY, in PEM: with it, anyone can verify."""

    async def find() -> str:
        async with tiger_db.Database(settings()) as database:
            key = await tiger_db.audit.required_key(database)
        return tiger_db.signing.public_pem(key.public_key())

    typer.echo(finish(find()), nl=False)


@app.command(rich_help_panel=PANEL)
def seal_audit(
    *,
    patience: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to wait for open transactions."),
    ] = 10,
    as_json: AsJson = False,
) -> None:
    """Seal the events that can no longer change. Run it often, from cron."""

    async def run() -> "Sealing":
        async with tiger_db.Database(settings()) as database:
            return await tiger_db.audit.seal(database, patience=patience)

    done = finish(run())
    if as_json:
        print_json(asdict(done))
    if done.waits_for:
        pids = ", ".join(str(pid or "a prepared one") for pid in done.waits_for)
        raise DatabaseUnavailable(
            f"nothing was sealed: transactions that wrote events are still open (processes {pids})"
        )
    talk(f"{done.rows} events were sealed in {done.seals} seals")


@app.command(rich_help_panel=PANEL)
def verify_audit(
    *,
    export: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="What `export-events` wrote; no database is asked."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `export-checkpoint` wrote earlier.")
    ] = None,
    public_key: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Whose seals; else that of AUDIT_SIGNING_KEY."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every event against the seals. It fails on any finding, and names the first."""
    keys = [_read(file, tiger_db.signing.parse_public_key) for file in public_key or ()]
    head = _read(checkpoint, tiger_db.audit.read_checkpoint) if checkpoint is not None else None
    if export is not None and not keys:
        own = tiger_db.keys_in_force.configured(
            settings(), tiger_db.keys_in_force.AUDIT_SIGNING_KEY
        )
        keys = [own.public_key()] if own is not None else []

    async def run() -> "Verification":
        with progress_to("Verifying") as advance:
            if export is not None:
                return await tiger_db.audit.verify_export(
                    export, keys=keys, checkpoint=head, advance=advance
                )
            async with tiger_db.Database(settings()) as database:
                return await tiger_db.audit.verify(
                    database, keys=keys, checkpoint=head, advance=advance
                )

    report = finish(run())
    if as_json:
        print_json({"sound": report.sound, **asdict(report)})
    elif not report.sound:
        rows = [(f.position, f.seal, f.kind, f.message) for f in report.findings[:_SHOWN]]
        show_table(("Position", "Seal", "Finding", "Message"), rows)
    talk(
        f"{report.rows:,} events verified against {report.seals:,} seals;"
        f" {report.unsealed:,} events not sealed yet; {report.retired:,} retired"
    )
    if not report.sound:
        first = report.findings[0]
        which = f" ({first.event_id})" if first.event_id else ""
        more = f"; {report.count:,} findings in all" if report.count > 1 else ""
        raise InvalidValue(f"{first.kind}: {first.message}{which}{more}")


@app.command(rich_help_panel=PANEL)
def export_checkpoint(
    *,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Write out the newest seal. Keep it elsewhere: it shows when seals are missing or replaced."""

    async def run() -> str:
        async with tiger_db.Database(settings()) as database:
            return await tiger_db.audit.export_checkpoint(database)

    text = finish(run())
    with output(out, overwrite=overwrite) as file:
        file.write(text)


@app.command(rich_help_panel=PANEL)
def maintain_audit(*, as_json: AsJson = False) -> None:
    """Make the months ahead, move strays into theirs, let months go as AUDIT_RETENTION_MONTHS says.

    Run it from cron, on any number of machines.
    """

    async def run() -> "Maintenance":
        async with tiger_db.Database(settings()) as database:
            return await tiger_db.audit.maintain(database)

    done = finish(run())
    if as_json:
        print_json(asdict(done))
    talk(f"{done.made} months were made" + "".join(f"; {m} has left" for m in done.retired))
    for month, why in done.kept.items():
        raise InvalidValue(f"{month} stays: {why}")


def _read(file: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InvalidValue(f"{file}: not text") from None
    except InvalidValue as error:
        raise InvalidValue(f"{file}: {error}") from None
