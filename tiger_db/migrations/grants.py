"""Grants of the declared privileges, and their comparison with the privileges in a database.

A role that `tiger-db grant` has given a kind has the declared privileges of this kind only, and
`upgrade` grants them again after the migrations.
"""

import re
import shlex
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.migrations.comparison import SCHEMA, SET_LOCALLY, SchemaDifference
from tiger_db.migrations.declared import FUNCTIONS, GRANTS, SEQUENCE, grants_on
from tiger_db.migrations.locks import lock_key
from tiger_db.migrations.version_table import VERSION_TABLE
from tiger_db.models import TABLES, RoleKind
from tiger_db.models.audit_logs import SERVER_COLUMNS
from tiger_db.settings import quote_identifier

_COMPARED_FOR_ALL = {"TABLE", "SEQUENCE"}
_TRAIL = re.compile(r"audit_logs|audit_logs_(default|\d{4}_\d{2}|position_seq)|audit_seals")
# Two transactions cannot change the grants on the same object at the same time.
LOCK_GRANTS = text(f"SELECT pg_catalog.pg_advisory_xact_lock({lock_key(0x7469676572_03)})")
_ROLES = text("SELECT role, kind FROM granted_roles ORDER BY role")
_OBJECTS = """
WITH RECURSIVE objects AS (
    SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS type, c.oid,
        c.relname::text AS name, format('%I.%I', n.nspname, c.relname) AS ident,
        c.relowner AS owner, c.relacl AS acl
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relnamespace = :schema AND c.relkind IN ('r', 'p', 'S') AND
        coalesce((SELECT relname FROM pg_class WHERE oid = pg_partition_root(c.oid)), c.relname)
        = ANY (CAST(:names AS text[]))
    UNION ALL
    SELECT 'FUNCTION', oid, signature, oid::regprocedure::text, proowner, proacl
    FROM pg_proc, format('%I(%s)', proname, pg_get_function_arguments(oid)) AS signature
    WHERE pronamespace = :schema AND prokind <> 'a'
        AND signature = ANY (CAST(:functions AS text[]))
    UNION ALL
    SELECT 'SCHEMA', oid, '', quote_ident(nspname), nspowner, nspacl
    FROM pg_namespace WHERE oid = :schema
    UNION ALL
    SELECT 'DATABASE', oid, '', quote_ident(datname), datdba, datacl
    FROM pg_database WHERE datname = current_database()
)
"""
_SELECT_OBJECTS = text(f"{_OBJECTS} SELECT * FROM objects ORDER BY type, name")  # noqa: S608  # constants
# A superuser and an owner have all privileges, so that their privileges are not compared.
_ALL_PRIVILEGES = {"SUPERUSER", "OWNER"}
# The powers beside privileges on objects that weaken the audit trail. A role has a power itself, or
# can become the role `holder` with SET ROLE, because it is a member of the roles `memberships`.
# Before PostgreSQL 16, a role with CREATEROLE can make itself a member of any role but superusers.
# A role without powers has a row, too.
_POWERS = text(f"""
{_OBJECTS}, members AS (
    SELECT r.rolname::text AS role, m.*, m.oid <> r.oid AS other,
        ARRAY(SELECT quote_ident(pg_get_userbyid(roleid)) FROM pg_auth_members
            WHERE member = r.oid AND pg_has_role(roleid, m.oid, 'MEMBER') ORDER BY 1) AS memberships
    FROM pg_roles AS r JOIN pg_roles AS m
        ON m.oid = r.oid OR (pg_has_role(r.oid, m.oid, 'MEMBER') AND NOT r.rolsuper)
    WHERE r.rolname = ANY (CAST(:roles AS text[]))
)
SELECT role, CASE WHEN other THEN rolname::text END AS holder, memberships, power
FROM members LEFT JOIN LATERAL (
    SELECT power FROM (VALUES ('SUPERUSER', rolsuper), ('REPLICATION', rolreplication),
        ('BYPASSRLS', rolbypassrls), ('CREATEROLE', rolcreaterole AND
            current_setting('server_version_num')::int < 160000)) AS attributes (power, held)
    WHERE held AND (rolsuper = (power = 'SUPERUSER'))
    UNION ALL SELECT 'MEMBER' WHERE rolname IN ('pg_execute_server_program',
        'pg_read_server_files', 'pg_write_server_files', 'pg_write_all_data')
    UNION ALL SELECT 'OWNER' WHERE NOT rolsuper AND rolname <> 'pg_database_owner'
        AND oid IN (SELECT owner FROM objects)
    UNION ALL SELECT 'SET' WHERE NOT rolsuper AND EXISTS (
        SELECT FROM pg_parameter_acl, aclexplode(paracl)
        WHERE parname = 'session_replication_role'
            AND (grantee = members.oid OR (grantee = 0 AND NOT other)))
) AS powers ON true
ORDER BY role, other, rolname, power
""")  # noqa: S608  # constants
# Each privilege that a role has itself (`own`, for the `columns`), or with SET ROLE (for the
# columns `reachable`). Other roles than the role itself have it for the columns `of_others`, and
# the role can become one of them as a member of the roles `memberships`.
_EFFECTIVE = text(f"""
{_OBJECTS}, privileges (type, privilege, of_columns) AS (VALUES
    ('DATABASE', 'CONNECT', false), ('DATABASE', 'CREATE', false),
    ('SCHEMA', 'USAGE', false), ('SCHEMA', 'CREATE', false),
    ('TABLE', 'SELECT', true), ('TABLE', 'INSERT', true), ('TABLE', 'UPDATE', true),
    ('TABLE', 'REFERENCES', true), ('TABLE', 'DELETE', false), ('TABLE', 'TRUNCATE', false),
    ('TABLE', 'TRIGGER', false),
    ('SEQUENCE', 'USAGE', false), ('SEQUENCE', 'SELECT', false), ('SEQUENCE', 'UPDATE', false),
    ('FUNCTION', 'EXECUTE', false)
), members AS (
    SELECT r.oid AS role_id, r.rolname::text AS role, m.oid AS member_of
    FROM pg_roles AS r JOIN pg_roles AS m ON pg_has_role(r.oid, m.oid, 'MEMBER')
    WHERE r.rolname = ANY (CAST(:roles AS text[]))
), held AS (
    SELECT r.oid AS role_id, r.rolname::text AS role, o.*, privilege, of_columns, holders
    FROM pg_roles AS r CROSS JOIN objects AS o JOIN privileges USING (type)
    CROSS JOIN LATERAL (SELECT ARRAY(SELECT member_of FROM members
        WHERE role_id = r.oid AND CASE type
            WHEN 'DATABASE' THEN has_database_privilege(member_of, o.oid, privilege)
            WHEN 'SCHEMA' THEN has_schema_privilege(member_of, o.oid, privilege)
            WHEN 'SEQUENCE' THEN has_sequence_privilege(member_of, o.oid, privilege)
            WHEN 'FUNCTION' THEN has_function_privilege(member_of, o.oid, privilege)
            ELSE CASE WHEN of_columns THEN has_any_column_privilege(member_of, o.oid, privilege)
                ELSE has_table_privilege(member_of, o.oid, privilege) END END) AS holders) AS found
    WHERE r.rolname = ANY (CAST(:roles AS text[])) AND cardinality(holders) > 0
)
SELECT role, type, name, ident, privilege, role_id = ANY (holders) AS own,
    ARRAY(SELECT attname::text FROM pg_attribute
        WHERE of_columns AND attrelid = held.oid AND attnum > 0 AND NOT attisdropped) AS every,
    ARRAY(SELECT attname::text FROM pg_attribute
        WHERE of_columns AND attrelid = held.oid AND attnum > 0 AND NOT attisdropped
            AND has_column_privilege(role_id, attrelid, attnum, privilege)) AS columns,
    ARRAY(SELECT attname::text FROM pg_attribute
        WHERE of_columns AND attrelid = held.oid AND attnum > 0 AND NOT attisdropped
            AND EXISTS (SELECT FROM unnest(holders) AS holder
                WHERE has_column_privilege(holder, attrelid, attnum, privilege))) AS reachable,
    ARRAY(SELECT attname::text FROM pg_attribute
        WHERE of_columns AND attrelid = held.oid AND attnum > 0 AND NOT attisdropped
            AND EXISTS (SELECT FROM unnest(holders) AS holder WHERE holder <> role_id
                AND has_column_privilege(holder, attrelid, attnum, privilege))) AS of_others,
    ARRAY(SELECT quote_ident(pg_get_userbyid(roleid)) FROM pg_auth_members
        WHERE member = role_id AND EXISTS (SELECT FROM unnest(holders) AS holder
            WHERE holder <> role_id AND pg_has_role(roleid, holder, 'MEMBER'))
        ORDER BY 1) AS memberships,
    public, grantable
FROM held CROSS JOIN LATERAL (
    SELECT coalesce(bool_or(grantee = 0), false) AS public,
        coalesce(bool_or(is_grantable), false) AS grantable
    FROM (SELECT acl UNION ALL
        SELECT attacl FROM pg_attribute WHERE type = 'TABLE' AND attrelid = held.oid) AS acls,
        aclexplode(acl)
    WHERE privilege_type = privilege
        AND CASE grantee WHEN 0 THEN true ELSE pg_has_role(role_id, grantee, 'MEMBER') END
) AS granted
ORDER BY role, type, name, privilege
""")  # noqa: S608  # constants
_SELECT_GRANTEES = text(f"""
{_OBJECTS}
SELECT DISTINCT type, name, ident, privilege_type AS privilege, attname::text AS "column",
    CASE WHEN grantee <> 0 THEN pg_get_userbyid(grantee)::text END AS grantee
FROM (SELECT *, NULL::name AS attname FROM objects UNION ALL
    SELECT type, o.oid, name, ident, owner, attacl, attname
    FROM objects AS o JOIN pg_attribute ON attrelid = o.oid WHERE type = 'TABLE') AS acls,
    aclexplode(acl)
WHERE type IN ('TABLE', 'SEQUENCE') AND grantee <> owner
    AND pg_get_userbyid(grantee) <> ALL (CAST(:roles AS text[]))
ORDER BY grantee, name, privilege, "column"
""")  # noqa: S608  # constants

# Functions, views and rules that a role may call or write, and that have the privileges of an owner
# of the audit trail: functions with SECURITY DEFINER, and views and rules that lead to its tables.
# An owner is a superuser, owns objects of tiger_db, or is a member of such a role. The callers are
# granted roles, and PUBLIC. Functions of PostgreSQL and of extensions are omitted, and those of
# tiger_db, which find_differences() compares.
_DEFINERS = text(f"""
{_OBJECTS}, owners AS (
    SELECT oid, quote_ident(rolname) AS name FROM pg_roles WHERE rolsuper OR EXISTS (
        SELECT FROM objects WHERE type <> 'DATABASE' AND pg_has_role(pg_roles.oid, owner, 'MEMBER'))
), callers AS (
    SELECT quote_ident(r.rolname) AS role, m.rolname AS member
    FROM pg_roles AS r JOIN pg_roles AS m ON pg_has_role(r.oid, m.oid, 'MEMBER')
    WHERE r.rolname = ANY (CAST(:roles AS text[]))
    UNION ALL SELECT 'PUBLIC', 'public'
), trail AS (
    SELECT oid FROM objects WHERE type IN ('TABLE', 'SEQUENCE')
    UNION SELECT ev_class FROM trail JOIN pg_depend ON refobjid = trail.oid
        JOIN pg_rewrite ON pg_rewrite.oid = objid
    WHERE refclassid = 'pg_class'::regclass AND classid = 'pg_rewrite'::regclass
), definers AS (
    SELECT CASE prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END AS type, p.oid,
        p.oid::regprocedure::text AS ident, proowner AS owner, pronamespace AS schema
    FROM pg_proc AS p WHERE prosecdef AND p.oid >= 16384
        AND p.oid NOT IN (SELECT oid FROM objects WHERE type = 'FUNCTION')
        AND ('pg_proc'::regclass, p.oid) NOT IN (
            SELECT classid, objid FROM pg_depend WHERE deptype = 'e')
    UNION ALL
    SELECT CASE relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, c.oid, c.oid::regclass::text,
        relowner, relnamespace
    FROM trail JOIN pg_class AS c USING (oid)
    WHERE c.oid NOT IN (SELECT oid FROM objects)
        AND pg_relation_is_updatable(c.oid, true) & 28 <> 0  -- UPDATE, INSERT or DELETE
        AND NOT coalesce(lower(reloptions::text) ~ 'security_invoker=(true|on|yes|1)', false)
)
SELECT type, ident, name AS owner, array_agg(DISTINCT role ORDER BY role) AS callers
FROM definers AS d JOIN owners ON owners.oid = d.owner JOIN callers
    ON has_schema_privilege(member, schema, 'USAGE') AND CASE WHEN type IN ('VIEW', 'TABLE')
        THEN has_any_column_privilege(member, d.oid, 'INSERT, UPDATE')
            OR has_table_privilege(member, d.oid, 'DELETE')
        ELSE has_function_privilege(member, d.oid, 'EXECUTE') END
GROUP BY type, ident, name ORDER BY ident
""")  # noqa: S608  # constants


async def find_granted_roles(connection: AsyncConnection) -> dict[str, RoleKind]:
    """Return the kind of each role that `tiger-db grant` has given privileges."""
    return {row.role: RoleKind(row.kind) for row in await connection.execute(_ROLES)}


@asynccontextmanager
async def _catalog(connection: AsyncConnection) -> AsyncIterator[dict[str, Any]]:
    """Set the search path to pg_catalog in the block, and yield the parameters of the queries."""
    schema = (await connection.execute(SCHEMA)).one()
    before = await connection.scalar(text("SELECT pg_catalog.current_setting('search_path')"))
    await connection.execute(SET_LOCALLY, {"name": "search_path", "value": "pg_catalog, pg_temp"})
    names = [*TABLES, VERSION_TABLE, SEQUENCE]
    yield {"schema": schema.oid, "names": names, "functions": [*FUNCTIONS]}
    await connection.execute(SET_LOCALLY, {"name": "search_path", "value": before})


async def find_objects(connection: AsyncConnection) -> Sequence[Row[Any]]:
    """Return the objects of tiger_db in the schema, with the schema and the database themselves."""
    async with _catalog(connection) as values:
        return (await connection.execute(_SELECT_OBJECTS, values)).all()


def grant_statements(objects: Iterable[Row[Any]], role: str, kind: RoleKind) -> list[str]:
    """Return the statements that give a role the privileges of its kind, and no other ones."""
    granted = [
        f"GRANT {', '.join(map(_quoted, privileges.items()))} ON {found.type} {found.ident}"
        f" TO {quote_identifier(role)}"
        for found in objects
        if (privileges := grants_on(kind, found.type, found.name))
    ]
    return [*revoke_statements(objects, role), *granted]


def revoke_statements(objects: Iterable[Row[Any]], role: str) -> list[str]:
    """Return the statements that revoke the privileges of a role on the objects of the schema."""
    idents: dict[str, list[str]] = {"TABLE": [], "SEQUENCE": [], "FUNCTION": []}
    for found in objects:
        if found.type in idents:
            idents[found.type].append(found.ident)
    revoked_from = quote_identifier(role)
    # CASCADE also revokes what the role has granted to others.
    return [
        *(
            f"REVOKE ALL ON {t} {', '.join(names)} FROM {revoked_from} CASCADE"
            for t, names in idents.items()
        ),
        *(
            f"REVOKE {privileges} ON {found.type} {found.ident} FROM {revoked_from} CASCADE"
            for found in objects
            if found.type in ("SCHEMA", "DATABASE")
            for privileges in ("CREATE", "GRANT OPTION FOR ALL")
        ),
    ]


def _quoted(item: tuple[str, Iterable[str]]) -> str:
    columns = ", ".join(map(quote_identifier, item[1]))
    return f"{item[0]} ({columns})" if columns else item[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantDifference(SchemaDifference):
    """A difference between the privileges in a database and the declared ones."""

    # Name of the granted role whose privileges differ, or None if another role, PUBLIC, or
    # something else than a privilege is the problem.
    role: str | None = None
    lacks: bool = False  # True if the role lacks a declared privilege


async def apply_grants(connection: AsyncConnection) -> None:
    """Grant the privileges of each role again that lacks some of them, or has other ones."""
    await connection.execute(LOCK_GRANTS)
    differing = {found.role for found in await find_grant_differences(connection)}
    objects = await find_objects(connection)
    for role, kind in (await find_granted_roles(connection)).items():
        if role in differing:
            for statement in grant_statements(objects, role, kind):
                await connection.exec_driver_sql(statement)


async def find_grant_differences(connection: AsyncConnection) -> list[GrantDifference]:
    """Compare the privileges in the database with the declared ones.

    A granted role must have the declared privileges of its kind and no other ones. No other role
    may have privileges that weaken the audit trail.
    """
    roles = await find_granted_roles(connection)
    async with _catalog(connection) as values:
        everyone = {**values, "roles": [*roles]}
        powers = (await connection.execute(_POWERS, everyone)).all()
        restricted = _restricted(powers)
        held = (await connection.execute(_EFFECTIVE, {**values, "roles": restricted})).all()
        grantees = (await connection.execute(_SELECT_GRANTEES, everyone)).all()
    differences = [*_compare_roles(roles, powers)]
    # A member of pg_write_all_data has privileges on all tables: one line is enough.
    repairs = {difference.repair for difference in differences}
    for role in restricted:
        rows = [row for row in held if row.role == role]
        found = _compare_privileges(role, roles[role], rows)
        differences += [difference for difference in found if difference.repair not in repairs]
    differences += await find_definers(connection)
    return [*differences, *_compare_grantees(grantees)]


async def find_definers(connection: AsyncConnection) -> list[GrantDifference]:
    """Find functions, views and rules that give roles the privileges of an owner of the trail."""
    roles = await find_granted_roles(connection)
    async with _catalog(connection) as values:
        everyone = {**values, "roles": [*roles]}
        restricted = _restricted((await connection.execute(_POWERS, everyone)).all())
        found = (await connection.execute(_DEFINERS, {**values, "roles": restricted})).all()
    return [_compare_definer(row) for row in found]


def _compare_definer(row: Row[Any]) -> GrantDifference:
    title, privilege, type_ = f"the {row.type.lower()} {row.ident}", "execute", row.type
    revoked = "EXECUTE"
    if row.type in ("VIEW", "TABLE"):
        title = f"{'the rules of ' * (row.type == 'TABLE')}{title}"
        privilege, type_, revoked = "write", "TABLE", "INSERT, UPDATE, DELETE"
    roles = "".join(f", {name}" for name in row.callers if name != "PUBLIC")
    return _difference(
        f"{title}, which {', '.join(row.callers)} may {privilege}, can change the audit trail with"
        f" the privileges of the owner {row.owner}",
        f"REVOKE {revoked} ON {type_} {row.ident} FROM PUBLIC{roles}, or give the"
        f" {row.type.lower()} an owner who may not change the audit trail",
    )


def _restricted(powers: Iterable[Row[Any]]) -> list[str]:
    """Return the roles that do not have all privileges."""
    unrestricted = {row.role for row in powers if row.power in _ALL_PRIVILEGES}
    return sorted({row.role for row in powers} - unrestricted)


async def find_powers(connection: AsyncConnection, role: str) -> Sequence[Row[Any]]:
    """Return a row for each power of a role that no grant restricts, for `describe_power`.

    If the role does not exist, the result is empty. A role without powers has one row.
    """
    async with _catalog(connection) as values:
        return (await connection.execute(_POWERS, {**values, "roles": [role]})).all()


_OWN_POWERS = {
    "SUPERUSER": "is a superuser",
    "OWNER": "owns the database, the schema or objects of tiger_db",
    "SET": "may disable triggers with session_replication_role",
}


def describe_power(row: Row[Any]) -> str | None:
    """Describe a power of a role that weakens the audit trail, or return None without a power."""
    if row.power is None:
        return None
    if row.power == "MEMBER":
        return f"is a member of {row.holder}"
    power = _OWN_POWERS.get(row.power, f"has {row.power}")
    return f"is a member of {row.holder}, which {power}" if row.holder else power


def _compare_roles(
    roles: Mapping[str, RoleKind], powers: Iterable[Row[Any]]
) -> Iterator[GrantDifference]:
    """Yield roles that are missing, and powers that no grant restricts."""
    missing = {*roles}
    for row in powers:
        missing.discard(row.role)
        if description := describe_power(row):
            title = f"the {roles[row.role]} role {row.role}"
            yield _difference(f"{title} {description}", _end_power(row))
    for name in sorted(missing):
        repair = f"create the role, or run `tiger-db revoke-grants {shlex.quote(name)}`"
        yield _difference(f"the {roles[name]} role {name} does not exist", repair)


def _end_power(row: Row[Any]) -> str:
    role = quote_identifier(row.role)
    if row.holder:
        return f"REVOKE {', '.join(row.memberships)} FROM {role}"
    if row.power == "OWNER":
        return "change the owner"
    if row.power == "SET":
        return f"REVOKE ALL ON PARAMETER session_replication_role FROM {role}, PUBLIC"
    return f"ALTER ROLE {role} NO{row.power}"


def _compare_privileges(
    role: str, kind: RoleKind, held: Iterable[Row[Any]]
) -> Iterator[GrantDifference]:
    """Yield privileges that a role lacks, and privileges that it has and should not have."""
    declared = {
        (type_, name, privilege): columns
        for (type_, name), grants in GRANTS.items()
        for privilege, columns in grants.get(kind, {}).items()
    }
    title = f"the {kind} role {role}"
    again = f"run `tiger-db grant {shlex.quote(role)} --as {kind}`"

    def differ(state: str, repair: str = again, *, lacks: bool = False) -> GrantDifference:
        return _difference(f"{title} {state}", repair, role=role, lacks=lacks)

    for row in held:
        type_ = row.type
        every = {*row.every} or {""}  # a privilege on a whole object has one column without a name
        wanted = declared.pop((type_, row.name, row.privilege), None)
        expected = set() if wanted is None else {*wanted} or every
        present = ({*row.columns} or {""}) if row.own else set()
        if lacking := expected - present:
            what = _of_columns(row.privilege, lacking, every)
            yield differ(f"lacks {what} on {_label(type_, row.name)}", lacks=True)
        # PostgreSQL lets PUBLIC execute functions, which have the privileges of their caller.
        # _compare_grantees() reports grants to PUBLIC on tables.
        excess = ({*row.reachable} or {""}) - expected
        if row.grantable and not excess:
            yield differ(f"may grant {row.privilege} on {_label(type_, row.name)}")
        if not excess or type_ == "FUNCTION":
            continue
        if row.public and type_ in _COMPARED_FOR_ALL:
            continue
        what = _of_columns(row.privilege, excess, every)
        yield differ(f"has {what} on {_label(type_, row.name)}", _revoke(row, excess) or again)
    for (type_, name, privilege), columns in declared.items():
        what = _of_columns(privilege, columns, ())
        yield differ(f"lacks {what} on {_label(type_, name)}", lacks=True)


def _revoke(row: Row[Any], excess: Collection[str]) -> str | None:
    """Return a statement that ends a privilege in excess, or None if a new grant ends it."""
    if row.public:
        return f"REVOKE {row.privilege} ON {row.type} {row.ident} FROM PUBLIC"
    if row.memberships and not ({*row.of_others} or {""}).isdisjoint(excess):
        return f"REVOKE {', '.join(row.memberships)} FROM {quote_identifier(row.role)}"
    return None


def _compare_grantees(found: Iterable[Row[Any]]) -> Iterator[GrantDifference]:
    """Yield grants to PUBLIC, and grants to unknown roles that weaken the audit trail."""
    harmless = {"SELECT", "USAGE"}
    for row in found:
        if row.grantee is not None:  # None stands for PUBLIC
            recordable = row.column is not None and row.column not in SERVER_COLUMNS
            may_record = row.name == "audit_logs" and row.privilege == "INSERT" and recordable
            if may_record or row.privilege in harmless or not _TRAIL.fullmatch(row.name):
                continue
        columns = () if row.column is None else (row.column,)
        what = _of_columns(row.privilege, columns, ())
        holder, revoked_from = "PUBLIC", "PUBLIC"
        if row.grantee is not None:
            holder, revoked_from = f"the role {row.grantee}", quote_identifier(row.grantee)
        revoked = _quoted((row.privilege, columns))
        repair = f"REVOKE {revoked} ON {row.type} {row.ident} FROM {revoked_from}"
        if row.grantee is not None:
            command = f"tiger-db grant {shlex.quote(row.grantee)} --as app|auditor|sealer"
            repair = f"run `{command}`, or {repair}"
        yield _difference(f"{holder} has {what} on {_label(row.type, row.name)}", repair)


def _of_columns(privilege: str, columns: Collection[str], every: Collection[str]) -> str:
    listed = "" if {*columns} == {*every} else ", ".join(sorted(columns))
    return f"{privilege} ({listed})" if listed else privilege


def _label(type_: str, name: str) -> str:
    return f"the {type_.lower()} {name}".rstrip()


def _difference(
    description: str, repair: str, *, role: str | None = None, lacks: bool = False
) -> GrantDifference:
    return GrantDifference(("audit_logs",), description, repair, role=role, lacks=lacks)
