"""Commands that pause and resume trading."""

from typing import TYPE_CHECKING, Annotated

import typer

import tiger_db
from tiger_db.cli import options, output, runtime

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

app = typer.Typer()
_PANEL = "API keys"


@app.command(rich_help_panel=_PANEL)
def pause(
    *,
    reason: Annotated[
        str, typer.Option(help="Reason for the pause, shown with each refused request.")
    ],
    as_json: options.AsJson = False,
) -> None:
    """Stop trading: refuse all requests with a scope of the family `trade` until `tiger-db resume`.

    If trading is paused already, the command changes nothing, and shows the earlier pause.
    """

    async def find_or_pause(
        session: "AsyncSession",
    ) -> "tuple[tiger_db.crud.api_keys.TradingPause | None, tiger_db.crud.api_keys.TradingPause]":
        earlier = await tiger_db.crud.api_keys.current_pause(session)
        return earlier, await tiger_db.crud.api_keys.pause(session, reason=reason)

    earlier, paused = runtime.in_transaction(find_or_pause)
    since_and_reason = str(paused)
    if earlier == paused:
        output.print_message(f"nothing is changed: trading has been paused {since_and_reason}")
    else:
        output.print_message(f"trading has been paused {since_and_reason}")
    if as_json:
        output.print_json({"trading_pause": paused.as_json()})


@app.command(rich_help_panel=_PANEL)
def resume(
    *,
    reason: Annotated[
        str | None, typer.Option(help="Reason for resuming trading, recorded in the audit trail.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """End the current pause of trading."""
    ended = runtime.in_transaction(
        lambda session: tiger_db.crud.api_keys.resume(session, reason=reason)
    )
    if ended is None:
        output.print_message("trading was not paused")
    else:
        since_and_reason = str(ended)
        output.print_message(f"trading is resumed; trading had been paused {since_and_reason}")
    if as_json:
        output.print_json({"trading_pause": None})
