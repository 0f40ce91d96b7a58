"""Checks the audit trail against its seals: in the database, or in an export without one."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiger_db.audit.checking import Check, Verification
from tiger_db.audit.exporting import read_lines
from tiger_db.audit.seal_format import Seal
from tiger_db.audit.storage import HOLD, clock, connected, trail
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, InvalidValue

_STEP = 1000  # places between two tellings of progress
_RETIREMENTS = """
SELECT statement, signature, ''::bytea FROM audit_seals WHERE statement LIKE '%"retired":%'
"""
Advance = Callable[[int, int], None]  # told how much is done of how much


def _untold(_done: int, _total: int) -> None: ...


async def verify(
    database: Database,
    *,
    keys: Sequence[Ed25519PublicKey] = (),
    checkpoint: Seal | None = None,
    advance: Advance = _untold,
) -> Verification:
    """Check every seal and every event in the database, as of one moment.

    `keys` are those that may have signed; none: that of `AUDIT_SIGNING_KEY`. The checkpoint was
    exported before, and kept elsewhere: without one, the newest seals may be missing together with
    their events, and nobody sees it. Memory is the same for any number of events.

    Raises:
        ConfigurationError: no key is given or set.
    """
    if not keys:
        own = await database.signing_key()
        keys = [own.public_key()] if own is not None else []
    check = _check(keys, checkpoint)
    async with (
        connected(database) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        await connection.execute(HOLD)
        total = await connection.fetchval("SELECT max(position) FROM audit_logs") or 0
        check.now(await clock(connection))
        check.retired([Seal(*row) for row in await connection.fetch(_RETIREMENTS)])
        async for item in trail(connection):
            if isinstance(item, Seal):
                check.seal(item)
            else:
                check.event(*item)
                if item[0] % _STEP == 0:
                    advance(item[0], total)
        advance(total, total)
    return check.finish()


def _check(keys: Sequence[Ed25519PublicKey], checkpoint: Seal | None) -> Check:
    if not keys:
        raise ConfigurationError(
            "give a public key, or set AUDIT_SIGNING_KEY: whose are the seals?"
        )
    return Check(keys, checkpoint)


async def verify_export(
    path: Path,
    *,
    keys: Sequence[Ed25519PublicKey],
    checkpoint: Seal | None = None,
    advance: Advance = _untold,
) -> Verification:
    """Check an export of the whole trail, as JSON Lines. No database is asked.

    Raises:
        ConfigurationError: no key is given.
        InvalidValue: the file is not such an export, or holds no seal and no checkpoint is given.
        OSError: it cannot be read.
    """
    check = _check(keys, checkpoint)

    def run() -> Verification:
        total = path.stat().st_size
        check.retired(line for line, _ in read_lines(path) if isinstance(line, Seal))
        done = 0
        for line, size in read_lines(path):
            done += size
            if isinstance(line, Seal):
                check.seal(line)
                advance(done, total)
            else:
                check.event(*line)
        advance(total, total)
        report = check.finish()
        if report.seals == 0 and checkpoint is None:
            raise InvalidValue(f"{path} holds no seal: export the whole trail, without criteria")
        return report

    return await asyncio.to_thread(run)
