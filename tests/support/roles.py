"""Database roles with the grants of each kind, and settings that connect with them."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from tests.docs.pages import section
from tests.support.sql import sql
from tiger_db import Settings
from tiger_db.connections import maintenance_engine
from tiger_db.migrations import roles
from tiger_db.models import RoleKind


def connected_as(settings: Settings, role: str) -> Settings:
    """Return the same settings with another role, whose password is `x`."""
    assert settings.database_url is not None
    parts = urlsplit(settings.database_url.get_secret_value())
    netloc = f"{role}:x@{parts.netloc.rpartition('@')[2]}"
    url = urlunsplit(parts._replace(netloc=netloc))
    return settings.model_copy(update={"database_url": type(settings.database_url)(url)})


@asynccontextmanager
async def new_role(settings: Settings, options: str = "") -> AsyncIterator[str]:
    """Create a role that can log in, and drop it and its grants in the database at the end."""
    name = f"tiger_db_role_{uuid4().hex[:12]}"
    await sql(settings, f"CREATE ROLE {name} LOGIN PASSWORD 'x' {options}", "SELECT 1")
    try:
        yield name
    finally:
        await sql(settings, f"DROP OWNED BY {name} CASCADE", f"DROP ROLE {name}", "SELECT 1")


@asynccontextmanager
async def granted(settings: Settings, kind: RoleKind) -> AsyncIterator[str]:
    """Create a role with the grants of a kind."""
    async with new_role(settings) as role:
        async with maintenance_engine(settings) as engine:
            assert await roles.grant(engine, role, kind) == []
        yield role


def documented(heading: str) -> dict[str, dict[str, bool]]:
    """Return a table of docs/roles.md: for each name, whether each kind of role may use it."""
    table: dict[str, dict[str, bool]] = {}
    for row in re.findall(r"^\| (`.+) \|$", section("docs/roles.md", heading), re.MULTILINE):
        names, *cells = row.split(" | ")
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in table, name
            assert {*cells} <= {"yes", "no"}
            table[name] = {kind: cell == "yes" for kind, cell in zip(RoleKind, cells, strict=True)}
    return table
