"""An attacker with SQL as the application's role and without a pepper; and ways to use a key."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tiger_db import Database, KeyVerifier, crud
from tiger_db.connections import connect
from tiger_db.settings import Settings

Execute = Callable[..., Awaitable[object]]
Use = Callable[[str], Awaitable[object]]
# Drop the constraints that refuse values that Python cannot read.
DROP_READABLE_RULES = """
DO $$
DECLARE rule record;
BEGIN
    FOR rule IN SELECT conrelid::regclass AS place, conname FROM pg_constraint
        WHERE conname ~ '_(years_1_to_9999|objects?|array|list)$' AND coninhcount = 0
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', rule.place, rule.conname);
    END LOOP;
END $$
"""


@asynccontextmanager
async def attacker(settings: Settings) -> AsyncIterator[Execute]:
    """SQL statements as the application's role, on a connection of the attacker's own."""
    connection = await connect(settings)
    try:
        yield connection.execute
    finally:
        await connection.close()


@asynccontextmanager
async def in_sessions(database: Database) -> AsyncIterator[Use]:
    async def use(raw_key: str) -> object:
        async with database.session() as session:
            return await crud.api_keys.authorize_api_key(session, raw_key)

    yield use


@asynccontextmanager
async def by_a_verifier(database: Database) -> AsyncIterator[Use]:
    async with KeyVerifier(database) as verifier:
        yield verifier.authorize


@asynccontextmanager
async def from_memory(database: Database) -> AsyncIterator[Use]:
    async with KeyVerifier(database, memory=True) as verifier:
        yield verifier.authorize


PATHS = (in_sessions, by_a_verifier, from_memory)
