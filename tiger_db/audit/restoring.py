"""The step that continues sealing after the database was restored from a backup."""

from dataclasses import dataclass
from datetime import timedelta

from tiger_db.actor import attribute
from tiger_db.audit import storage
from tiger_db.audit.chain import describe_lost_seals
from tiger_db.audit.sealing import open_sealer
from tiger_db.audit.storage import DEFAULT_PATIENCE
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, InvalidState
from tiger_db.models import AuditAction, AuditLog
from tiger_db.models.audit_logs import insert_events
from tiger_db.public import public

_SELECT_KEPT = "SELECT count(*) FROM audit_logs WHERE position > $1 AND position <= $2"


@dataclass(frozen=True, slots=True)
class RecordedRestore:
    """The result of `record_restore`: what the restore has lost."""

    seal: int  # Number of the seal that records the restore.
    first_lost: int  # Number of the first lost seal. `seal - 1` is the number of the last one.
    after: int  # The lost seals covered the events at positions above `after`, up to `upto`.
    upto: int
    kept: int  # Number of events at these positions that the database has, to be sealed again.

    def __str__(self) -> str:
        return describe_lost_seals(self.first_lost, self.seal, self.after, self.upto)


@public
async def record_restore(
    database: Database, *, patience: timedelta = DEFAULT_PATIENCE
) -> RecordedRestore | None:
    """Record that a restore of the database has lost the newest seals, so that sealing can go on.

    The newest checkpoint in the folder `AUDIT_CHECKPOINTS` says which seals are lost. A new seal,
    which continues the newest seal of the database, names them and has the number after them. An
    event says the same. The sequence of positions moves past the positions of the lost seals. The
    checkpoints of lost seals stay in the folder as evidence. Return None if no seal is lost, or if
    the restore is recorded already.

    Raises:
        ConfigurationError: `AUDIT_CHECKPOINTS` or `AUDIT_SIGNING_KEY` is not set, or the key is not
            the key in force.
        InvalidState: The chain of seals in the database is broken, does not continue its newest
            checkpoint, or was continued after the restore.
        DatabaseUnavailable, FileError: See `seal`.
    """
    if database.settings.audit_checkpoints is None:
        raise ConfigurationError(
            "AUDIT_CHECKPOINTS is not set: only a checkpoint says which seals a restore has lost"
        )
    async with open_sealer(database, patience, after_restore=True) as sealer:
        connection, chain = sealer.connection, sealer.chain
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(storage.TAKE_SEALING_LOCK)
            # A writer takes a position only after the lock that this lock conflicts with.
            await connection.execute("LOCK TABLE audit_logs IN SHARE ROW EXCLUSIVE MODE")
            await sealer.catch_up()
            if sealer.lost is None or chain.find_loss(sealer.lost) is not None:
                return None
            last, first_lost, after = sealer.lost.payload(), chain.number + 1, chain.upto
            if last.number < first_lost or chain.origin not in (None, last.origin):
                raise InvalidState(
                    f"the database has other seals than the newest checkpoint, seal {last.number}:"
                    " nothing was recorded; run `tiger-db verify-audit`"
                )
            position, _ = await storage.fetch_writers(connection)
            if position < last.upto:
                await connection.execute("SELECT setval('audit_logs_position_seq', $1)", last.upto)
            kept = await connection.fetchval(_SELECT_KEPT, after, last.upto)
            event = AuditLog(
                action=AuditAction.SYSTEM_AUDIT_RESTORE,
                resource_type="audit_seals",
                details={
                    "seal": last.number + 1,
                    "lost_seals": [first_lost, last.number],
                    "lost_positions": [after + 1, last.upto],
                    "kept_events": kept,
                },
            )
            await insert_events(connection, [attribute(event)])
            await sealer.append(lost=sealer.lost)
        await sealer.finish()
    return RecordedRestore(last.number + 1, first_lost, after, last.upto, kept)
