"""One look at the database that tells what is wrong, and what to do about it.

Each check is one statement, in a transaction of its own that waits for hardly anybody: what it may
not see, or not in time, is a finding too, and the others go on. The tables that grow are read by
their indexes; those of the accounts and the API keys once, for what their secrets are stored under.
"""

import asyncio

from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.connections import maintenance_engine
from tiger_db.doctor import server, tables
from tiger_db.doctor.findings import Finding, Found, checked
from tiger_db.errors import SchemaMismatch, TigerDBError
from tiger_db.health import explain
from tiger_db.migrations import schema_state
from tiger_db.settings import Settings

__all__ = ["Finding", "doctor"]


async def doctor(settings: Settings) -> list[Finding]:
    """Look at everything, change and start nothing.

    Raises:
        ConfigurationError: the encryption keys are malformed.
    """
    if settings.embedded:
        from tiger_db import embedded  # noqa: PLC0415  # needs POSIX and an extra

        if await asyncio.to_thread(embedded.running, settings) is None:
            seen = f"{settings.location} is not running"
            return [Finding("server", "problem", seen, "run `tiger-db start-embedded`")]
    findings: list[Finding] = []
    try:
        async with maintenance_engine(settings) as engine, engine.connect() as connection:
            for name, check in server.CHECKS.items():
                findings.append(await checked(connection, name, check))
            findings.append(await server.search_path(connection, settings))
            findings.append(schema := await checked(connection, "schema", _schema))
            if schema.status == "ok":
                for name, check in tables.CHECKS.items():
                    findings.append(await checked(connection, name, check))
                findings.append(await tables.api_key_hashes(connection, settings))
                findings.append(await tables.encryption_keys(connection, settings))
    except (TigerDBError, OSError) as error:
        findings.append(Finding("server", "problem", explain(error) or type(error).__name__))
    return findings


async def _schema(connection: AsyncConnection) -> Found:
    try:
        state = await schema_state(connection)
        state.check()
    except SchemaMismatch as mismatch:
        seen, _, advice = str(mismatch).partition(": ")
        return "problem", seen, advice
    return "ok", f"revision {state.current}, the newest", None
