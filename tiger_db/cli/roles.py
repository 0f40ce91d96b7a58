"""Commands that grant privileges to database roles, and revoke them."""

from typing import Annotated, Literal

import typer

import tiger_db
from tiger_db.cli import output, runtime
from tiger_db.cli.database import PANEL, with_engine

app = typer.Typer()


def _check_name(role: str) -> str:
    if not role:
        raise typer.BadParameter("the name is empty")
    return role


RoleArgument = Annotated[
    str,
    typer.Argument(metavar="ROLE", help="Name of the database role.", callback=_check_name),
]


@app.command(rich_help_panel=PANEL)
def grant(
    role: RoleArgument,
    *,
    kind: Annotated[
        Literal["app", "auditor", "sealer"],
        typer.Option("--as", help="What the role is for."),
    ],
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL for psql without executing it.")
    ] = False,
) -> None:
    """Give a database role the privileges of an app, an auditor or a sealer, and no other ones.

    Run this command as the owner of the tables. Create the role before, with CREATE ROLE. After
    each migration, the role gets the privileges on new tables, too.

    An app reads and writes accounts, API keys and refreshes, and reads and records events. An
    auditor reads everything except secrets. A sealer reads and records events, and adds seals.
    """
    from tiger_db.migrations import roles  # noqa: PLC0415  # slow import, not needed by `--help`

    config, wanted = runtime.settings(), tiger_db.models.RoleKind(kind)
    if sql:
        script = with_engine(config, lambda engine: roles.grant_sql(engine, role, wanted))
        typer.echo(runtime.run_async(script), nl=False)
        return
    excess = runtime.run_async(
        with_engine(config, lambda engine: roles.grant(engine, role, wanted))
    )
    for line in excess:
        output.print_warning(line)
    output.print_message(f"the role {role} has the privileges of the kind {wanted}")


@app.command(rich_help_panel=PANEL)
def revoke_grants(role: RoleArgument) -> None:
    """Revoke all privileges that `tiger-db grant` has given to a database role."""
    from tiger_db.migrations import roles  # noqa: PLC0415  # slow import, not needed by `--help`

    work = with_engine(runtime.settings(), lambda engine: roles.revoke_grants(engine, role))
    runtime.run_async(work)
    output.print_message(f"the role {role} has no privileges on tables of tiger_db any more")
