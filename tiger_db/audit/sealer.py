"""The sealer: verifies the end of the chain of seals, and appends seals to it."""

import asyncio
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tiger_db.audit import storage
from tiger_db.audit.chain import AuditFinding, ChainVerifier
from tiger_db.audit.checkpoints import (
    checkpoint_numbers,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from tiger_db.audit.seal_format import (
    ARCHIVE_VERSION,
    RESTORE_VERSION,
    SEAL_VERSION,
    ArchivedFile,
    MerkleTree,
    Seal,
    SealPayload,
    make_seal,
)
from tiger_db.audit.storage import Connection
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, InvalidState, InvalidValue
from tiger_db.public import public
from tiger_db.signing import public_text

_MAX_CLOCK_DIFFERENCE = timedelta(minutes=1)
_SELECT_LAST_SEALS = f"{storage.SELECT_SEALS} DESC LIMIT 2"
_SELECT_NEWEST = "SELECT max(number) FROM audit_seals WHERE number > 0"
_SELECT_NEWEST_OF = "SELECT max(number) FROM audit_seals WHERE number = ANY($1::bigint[])"
# The digests of seals up to the seal $2 are not needed, because these seals are verified already.
_SELECT_SEALS_FROM = """
SELECT statement, signature, CASE WHEN number > $2 THEN digests ELSE bytea '' END, number
FROM audit_seals WHERE number >= $1 ORDER BY number
"""
_SELECT_STATEMENTS = """
SELECT statement, bytea '' AS signature, bytea '' AS digests, number
FROM audit_seals WHERE number BETWEEN $1 AND $2 ORDER BY number
"""


class Sealer:
    """The end of the chain of seals, which a sealer has verified, and the key that signs seals.

    The first call of `catch_up` verifies the seals after the newest checkpoint in the folder
    `AUDIT_CHECKPOINTS`, or all seals if the folder is empty. Without a folder, it verifies the last
    two seals. Each later call verifies the seals that were added since the call before.
    """

    def __init__(self, connection: Connection, key: Ed25519PrivateKey, folder: Path | None) -> None:
        self.connection = connection
        self.key = key
        self.chain = ChainVerifier([key.public_key()], _refuse)
        self.lost: Seal | None = None  # The newest checkpoint, if the database lacks its seal.
        self.verified_first = 0  # Number of seals that were verified to save the first checkpoint.
        self._folder = folder
        self._last: Seal | None = None  # The last verified seal.
        self._saved: Seal | None = None  # The newest checkpoint in the folder.

    @classmethod
    async def open(
        cls,
        connection: Connection,
        key: Ed25519PrivateKey,
        folder: Path | None = None,
        *,
        after_restore: bool = False,
    ) -> Self:
        """Verify the end of the chain of seals, and save a checkpoint of the newest seal.

        With `after_restore`, the newest checkpoint may be of a seal that the database has lost. The
        chain is then verified from the newest checkpoint whose seal the database has.

        Raises:
            FileError: The folder of checkpoints cannot be read or written.
            InvalidState: The chain of seals is broken, or does not continue the newest checkpoint.
        """
        sealer = cls(connection, key, folder)
        checkpoint = None
        if folder is not None:
            checkpoint = await asyncio.to_thread(newest_checkpoint, folder)
            if after_restore and checkpoint is not None:
                number = await connection.fetchval(
                    _SELECT_NEWEST_OF, await asyncio.to_thread(checkpoint_numbers, folder)
                )
                if number != checkpoint.payload().number:
                    sealer.lost, checkpoint = checkpoint, None
                if number is not None:
                    checkpoint = await asyncio.to_thread(load_checkpoint, folder, number)
        if checkpoint is not None:
            sealer.chain.start(checkpoint)
            sealer._last = sealer._saved = checkpoint
        elif folder is None:
            rows = await connection.fetch(_SELECT_LAST_SEALS)
            if len(rows) > 1:
                try:
                    sealer.chain.start_before(Seal(*rows[1]))
                except InvalidValue as error:
                    raise InvalidState(_refusal(f"seal {rows[1]['number']}: {error}")) from None
        async with connection.transaction(isolation="read_committed"):
            await sealer.catch_up()
        if folder is not None and sealer._saved is None:
            sealer.verified_first = sealer.chain.number
        await sealer._save_checkpoint()
        return sealer

    async def catch_up(self) -> None:
        """Verify the seals that were added since the last call. This needs a transaction.

        Raises:
            InvalidState: A new seal does not continue the chain, or the signing key was changed.
        """
        verified, expects_last = self.chain.number, self._last is not None
        first = verified if expects_last else verified + 1
        if verified == 0:  # rows with numbers below 1 break the chain, too
            first = -(2**63)
        async for row in self.connection.cursor(_SELECT_SEALS_FROM, first, verified, prefetch=20):
            seal = Seal(*row)
            if expects_last:
                expects_last = False
                self._check_last(seal)
                continue
            self.chain.add(seal)
            self._last = seal
        if expects_last:
            newest = await self.connection.fetchval(_SELECT_NEWEST) or 0
            reason = _refusal(f"the newest seals are missing, from seal {newest + 1} on")
            raise InvalidState(
                f"{reason}; if the database was restored from a backup, see docs/backup.md"
            )
        self.chain.check_trust()
        if self.chain.key not in (None, public_text(self.key.public_key())):
            raise ConfigurationError(
                "the signing key of the audit trail was changed: set AUDIT_SIGNING_KEY to the new"
                " key"
            )

    def _check_last(self, seal: Seal) -> None:
        assert self._last is not None
        number = self.chain.number
        if seal.row_number != number:
            raise InvalidState(_refusal(f"seal {number} is missing"))
        if (seal.payload_json, seal.signature) != (self._last.payload_json, self._last.signature):
            raise InvalidState(_refusal(f"seal {number} is not the seal that was verified earlier"))

    async def check_past(self, digests: Mapping[int, str]) -> None:
        """Verify that older seals belong to the verified chain. This needs a transaction.

        `digests` has the digests of the seals' payloads, by the numbers of the seals. Each payload
        has the digest of the payload before, so the last verified seal proves all seals before.

        Raises:
            InvalidState: One of the seals, or a seal after it, is another seal.
        """
        number, previous = min(digests), None
        rows = self.connection.cursor(_SELECT_STATEMENTS, number, self.chain.number, prefetch=1000)
        async for row in rows:
            seal = Seal(*row)
            digest, payload = seal.payload_digest, seal.payload()
            if payload.lost is not None:  # the numbers of lost seals are not used again
                number = max(number, payload.number)
            if (
                seal.row_number != number
                or digests.get(number, digest) != digest
                or (previous is not None and payload.previous != previous)
            ):
                break
            number, previous = number + 1, digest
        if number <= self.chain.number or previous != self.chain.payload_digest:
            raise InvalidState(_refusal(f"seal {number - 1} or seal {number} was replaced"))

    async def append(
        self,
        tree: MerkleTree | None = None,
        digests: bytes = b"",
        *,
        upto: int | None = None,
        closed_at: str | None = None,
        retired: str | None = None,
        next_key: str | None = None,
        lost: Seal | None = None,
        archive: tuple[ArchivedFile, ...] | None = None,
    ) -> None:
        """Sign and insert the next seal, in a transaction that holds the sealing lock.

        Call `catch_up` first, in the same transaction. A seal that records a retired month stores
        no digests of events. `lost` is the last seal that a restore has lost. The numbers of lost
        seals are not used again.
        """
        tree = tree or MerkleTree()
        last_lost = lost.payload() if lost else None
        version = RESTORE_VERSION if last_lost else SEAL_VERSION
        payload = SealPayload(
            version=version if archive is None else ARCHIVE_VERSION,
            number=(last_lost.number if last_lost else self.chain.number) + 1,
            previous=self.chain.payload_digest,
            after=self.chain.upto,
            upto=self.chain.upto if upto is None else upto,
            positions=tree.positions,
            root=tree.root,
            sealed_at=await storage.database_time(self.connection),
            key=public_text(self.key.public_key()),
            closed_at=closed_at,
            retired=retired,
            origin=self.chain.origin or (last_lost and last_lost.origin) or secrets.token_hex(16),
            next_key=next_key,
            lost=lost.payload_digest if lost else None,
            lost_upto=last_lost.upto if last_lost else None,
            archive=archive,
        )
        made = make_seal(self.key, payload, digests)
        await self.connection.execute(
            "INSERT INTO audit_seals (number, statement, signature, digests)"
            " VALUES ($1, $2, $3, $4)",
            payload.number,
            made.payload_json,
            made.signature,
            made.digests,
        )

    async def finish(self) -> None:
        """Verify the seals that this sealer has added, and save a checkpoint of the last one."""
        async with self.connection.transaction(isolation="read_committed"):
            await self.catch_up()
        await self._save_checkpoint()

    async def _save_checkpoint(self) -> None:
        if self._folder is not None and self._last is not None and self._last is not self._saved:
            await asyncio.to_thread(save_checkpoint, self._folder, self._last)
            self._saved = self._last


def _refuse(_position: int, finding: AuditFinding) -> None:
    raise InvalidState(_refusal(finding.message))


def _refusal(reason: str) -> str:
    return f"{reason}: nothing was sealed or removed; run `tiger-db verify-audit`"


def check_clocks(database_time: datetime, machine_time: datetime, consequence: str) -> None:
    """Compare the times of the database's clock and of this machine's clock.

    Raises:
        InvalidState: The clocks differ by more than a minute.
    """
    difference = database_time - machine_time
    if abs(difference) > _MAX_CLOCK_DIFFERENCE:
        raise InvalidState(
            f"the database's clock is {abs(difference).total_seconds():.0f} s"
            f" {'ahead of' if difference > timedelta() else 'behind'} this machine's clock:"
            f" {consequence} until both clocks are correct"
        )


@public
async def required_key(database: Database) -> Ed25519PrivateKey:
    """Return the private key that signs seals.

    Raises:
        ConfigurationError: `AUDIT_SIGNING_KEY` is not set.
    """
    key = await database.signing_key()
    if key is None:
        raise ConfigurationError(
            "AUDIT_SIGNING_KEY is not set: set it to the key of this audit trail, or for a new"
            " trail, make a key with `tiger-db generate-audit-signing-key`"
        )
    return key
