"""A sealed audit trail, and a superuser for whom triggers are disabled."""

import os
import random
from collections.abc import AsyncIterator
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tests.support.trail import (
    SEALS,
    Trail,
    exported,
    fetch_seals,
    fill,
    typical,
    with_signing_key,
    without_triggers,
)
from tiger_db import Database, Settings, crud
from tiger_db.audit import export_checkpoint, read_checkpoint, seal
from tiger_db.audit.storage import Connection


@pytest.fixture
def chance() -> random.Random:
    """Random numbers; a failed test prints their seed."""
    seed = int(os.environ.get("TIGER_DB_SEED") or random.randrange(2**32))
    print(f"again with TIGER_DB_SEED={seed}")  # noqa: T201
    return random.Random(seed)


@pytest.fixture
def key_settings(clone_settings: Settings) -> Settings:
    """Those of a database for this test alone, with a key that signs."""
    return with_signing_key(clone_settings)


@pytest.fixture
async def signing(key_settings: Settings) -> AsyncIterator[Database]:
    async with Database(key_settings) as database:
        yield database


@pytest.fixture
async def superuser(clone_settings: Settings) -> AsyncIterator[Connection]:
    async with without_triggers(clone_settings) as connection:
        yield connection


@pytest.fixture
async def trail(signing: Database, superuser: Connection, chance: random.Random) -> Trail:
    """60 events in 5 seals, with gaps between them, and 3 that are not sealed."""
    for _ in range(SEALS):
        await fill(signing, chance)
        await seal(signing)
    async with signing.session() as session:
        await crud.audit_logs.log_events(session, [typical(chance) for _ in range(3)])
    payloads = [kept.payload() for _, kept in await fetch_seals(superuser, 0, SEALS)]
    rows = await superuser.fetch(
        "SELECT position, id FROM audit_logs WHERE position <= $1", payloads[-1].upto
    )
    ids = dict(sorted((row["position"], UUID(str(row["id"]))) for row in rows))
    return Trail(
        signing,
        superuser,
        payloads,
        read_checkpoint(await export_checkpoint(signing)),
        ids,
        sorted(set(range(1, payloads[-1].upto + 1)) - set(ids)),
        chance,
    )


@pytest.fixture
async def key(trail: Trail) -> Ed25519PublicKey:
    own = await trail.database.signing_key()
    assert own is not None
    return own.public_key()


@pytest.fixture
async def lines(trail: Trail) -> list[str]:
    return await exported(trail.database)
