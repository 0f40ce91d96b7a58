"""Checks of the seals and checkpoints of the audit trail."""

import asyncio

from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.audit.checkpoints import newest_checkpoint
from tiger_db.audit.seal_format import Seal
from tiger_db.checks import DAY, HOUR, Outcome, duration, fetch_all, grade
from tiger_db.errors import FileError, InvalidState, InvalidValue
from tiger_db.keys_in_force import AUDIT_SIGNING_KEY, in_force
from tiger_db.settings import Settings

# The minimum ages in seconds of an unsealed event for a warning, and for a problem.
UNSEALED_SECONDS = (HOUR, DAY)

# The column `age` is the age in seconds of the oldest audit event in the first 1,000 unsealed
# positions. The column `beyond` is the number of events at positions that the sequence has not
# assigned yet. PostgreSQL reads the index ix_audit_logs_position for both: it expects few rows of a
# range with two bounds.
UNSEALED_EVENTS = """
SELECT taken - upto AS events, seals, extract(epoch FROM clock_timestamp() - (
    SELECT min(created_at) FROM audit_logs WHERE position > upto AND position <= upto + 1000
))::float AS age, (
    SELECT count(*) FROM audit_logs WHERE position > taken AND position <= 9223372036854775807
) AS beyond
FROM (SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS taken FROM audit_logs_position_seq)
    AS t,
    (SELECT coalesce(max((statement::json ->> 'upto')::bigint), 0) AS upto, count(*) AS seals
    FROM (SELECT statement FROM audit_seals ORDER BY number DESC LIMIT 1) AS s) AS last
"""


# Number and payload of the newest seal.
_NEWEST_SEAL = "SELECT number, statement FROM audit_seals ORDER BY number DESC LIMIT 1"


async def check_unsealed(connection: AsyncConnection) -> Outcome:
    for seal in await fetch_all(connection, _NEWEST_SEAL):
        try:
            Seal(seal.statement, b"", b"").payload()
        except InvalidValue as error:
            seen = f"the newest seal has the number {seal.number}: {error}"
            return Outcome("problem", seen, "run `tiger-db verify-audit`")
    row = (await fetch_all(connection, UNSEALED_EVENTS))[0]
    if row.events < 0:
        return Outcome(
            "problem",
            f"the sequence of positions is {-row.events:,} behind the newest seal",
            "run `tiger-db seal-audit --repair-sequence`",
        )
    if row.beyond:  # an event gets its position from the sequence before it is visible
        return Outcome(
            "problem",
            f"events at positions that the sequence has not assigned: {row.beyond:,}",
            "find out who has set the positions: `tiger-db seal-audit` does not seal these events",
        )
    if row.age is None:
        return Outcome("ok", "none")
    status = grade(row.age, UNSEALED_SECONDS)
    if status == "problem" and not row.seals:
        status = "warning"  # some installations do not seal audit events
    return Outcome(
        status,
        f"unsealed events: at most {row.events:,}, the oldest {duration(row.age)} old",
        None if status == "ok" else "run `tiger-db seal-audit` every minute",
    )


async def check_checkpoints(connection: AsyncConnection, *, settings: Settings) -> Outcome:
    folder = settings.audit_checkpoints
    if await asyncio.to_thread(in_force, settings, AUDIT_SIGNING_KEY, generate=False) is None:
        return Outcome("ok", "this process does not seal audit events")
    if folder is None:
        return Outcome(
            "warning",
            "no folder of checkpoints is set, so the sealer cannot notice that seals were replaced",
            "set AUDIT_CHECKPOINTS to a folder that the owner of the database cannot change",
        )
    try:
        newest = await asyncio.to_thread(newest_checkpoint, folder)
    except (FileError, InvalidState) as error:
        return Outcome("problem", str(error), "see AUDIT_CHECKPOINTS in the documentation")
    number = 0 if newest is None else newest.payload().number
    last = (await fetch_all(connection, "SELECT coalesce(max(number), 0) FROM audit_seals"))[0][0]
    if number > last:
        seen = f"the newest seal is {last}, but {folder} has a checkpoint of seal {number}"
        return Outcome("problem", seen, "run `tiger-db verify-audit`")
    return Outcome("ok", f"the newest checkpoint is of seal {number}, the newest seal is {last}")
