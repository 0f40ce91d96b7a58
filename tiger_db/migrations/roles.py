"""Functions that grant the privileges of an application, an auditor or a sealer to a role."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tiger_db.errors import InvalidValue, NotFound, PrivilegeMissing
from tiger_db.migrations.grants import (
    LOCK_GRANTS,
    describe_power,
    find_grant_differences,
    find_objects,
    find_powers,
    grant_statements,
    revoke_statements,
)
from tiger_db.migrations.state import schema_state
from tiger_db.models import RoleKind
from tiger_db.settings import quote_identifier

_REMEMBER = (
    "INSERT INTO {schema}.granted_roles (role, kind) VALUES ({role}, '{kind}')"
    " ON CONFLICT (role) DO UPDATE SET kind = excluded.kind"
)
FORGET = "DELETE FROM granted_roles WHERE role = $1"
# Whether a role owns an object of this database, or has a privilege on one beside the schema.
_HAS_OTHER_GRANTS = text("""
SELECT EXISTS (SELECT FROM pg_shdepend JOIN pg_roles AS r ON r.oid = refobjid
    WHERE rolname = :role AND refclassid = 'pg_authid'::regclass
    AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND NOT (classid = 'pg_namespace'::regclass AND objid = :schema))
""")


async def grant(engine: AsyncEngine, role: str, kind: RoleKind) -> list[str]:
    """Give a role the privileges of its kind, and revoke its other privileges on tiger_db's tables.

    What the role has granted to others is revoked, too.
    Later migrations grant the privileges on new tables to the role. Return a description of each
    privilege that the role still has in excess, for example because PUBLIC has it.

    Raises:
        InvalidValue: no grant restricts the role, or the role is predefined by PostgreSQL.
        NotFound: the role does not exist.
        PrivilegeMissing: the current role may not grant the privileges.
        SchemaMismatch: the schema does not fit this release.
    """
    async with engine.begin() as connection:
        for statement in await statements_for(connection, role, kind):
            await connection.exec_driver_sql(statement)
        differences = [d for d in await find_grant_differences(connection) if d.role == role]
        for difference in differences:
            if difference.lacks:
                raise PrivilegeMissing(
                    f"{difference.description}, which the current role may not grant: run `tiger-db"
                    " grant` as the owner of the database and of its tables"
                )
        return [str(difference) for difference in differences]


async def grant_sql(engine: AsyncEngine, role: str, kind: RoleKind) -> str:
    """Return the SQL that `grant` would execute, as a script for `psql -v ON_ERROR_STOP=1`.

    Raises:
        InvalidValue, NotFound, SchemaMismatch: see `grant`.
    """
    async with engine.connect() as connection:
        statements = await statements_for(connection, role, kind)
    return ";\n".join(["BEGIN", *statements, "COMMIT"]) + ";\n"


async def statements_for(connection: AsyncConnection, role: str, kind: RoleKind) -> list[str]:
    """Return the statements of `grant`, and lock the grants until the end of the transaction."""
    (await schema_state(connection)).check()
    found = await find_powers(connection, role)
    if not found:
        raise NotFound(
            f"there is no role {role}: create it with CREATE ROLE {quote_identifier(role)} LOGIN"
        )
    if role.startswith("pg_"):
        raise InvalidValue(f"the role {role} is predefined by PostgreSQL: create a role")
    for row in found:
        if reason := describe_power(row):
            raise InvalidValue(f"the role {role} {reason}, so that no grant restricts it")
    await connection.execute(LOCK_GRANTS)
    objects = await find_objects(connection)
    schema = next(found.ident for found in objects if found.type == "SCHEMA")
    literal = "'" + role.replace("'", "''") + "'"
    remember = _REMEMBER.format(schema=schema, role=literal, kind=kind)
    return [remember, *grant_statements(objects, role, kind)]


async def revoke_grants(engine: AsyncEngine, role: str) -> None:
    """Revoke all privileges of a role on tiger_db's tables, and forget the kind of the role.

    The privileges to connect to the database and to use the schema stay if the role owns other
    objects in the database or has privileges on them.

    Raises:
        NotFound: `tiger-db grant` has not given the role any privileges.
        PrivilegeMissing: the current role may not revoke the privileges.
        SchemaMismatch: the schema does not fit this release.
    """
    async with engine.begin() as connection:
        (await schema_state(connection)).check()
        await connection.execute(LOCK_GRANTS)
        if not (await connection.exec_driver_sql(FORGET, (role,))).rowcount:
            raise NotFound(f"`tiger-db grant` has not given the role {role} any privileges")
        if not await find_powers(connection, role):
            return
        objects = await find_objects(connection)
        for statement in revoke_statements(objects, role):
            await connection.exec_driver_sql(statement)
        schema = next(found for found in objects if found.type == "SCHEMA")
        values = {"role": role, "schema": schema.oid}
        if await connection.scalar(_HAS_OTHER_GRANTS, values):
            return
        for found in objects:
            if found.type in ("SCHEMA", "DATABASE"):
                await connection.exec_driver_sql(
                    f"REVOKE ALL ON {found.type} {found.ident} FROM {quote_identifier(role)}"
                )
