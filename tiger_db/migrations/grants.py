"""The declared privileges of database roles, and their comparison with those in a database.

`GRANTS` classifies each object of the schema. A role that `tiger-db grant` has given a kind has the
declared privileges of this kind only, and `upgrade` grants them again after the migrations.
"""

import re
import shlex
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.migrations.comparison import SCHEMA, SET_LOCALLY, SchemaDifference
from tiger_db.migrations.declared import FUNCTIONS
from tiger_db.migrations.locks import lock_key
from tiger_db.migrations.version_table import VERSION_TABLE
from tiger_db.models import SECRET_COLUMNS, TABLES, RoleKind, metadata
from tiger_db.models.audit_logs import SERVER_COLUMNS
from tiger_db.settings import quote_identifier

# The columns of each privilege. An empty tuple stands for the whole object.
Privileges: TypeAlias = Mapping[str, tuple[str, ...]]


def _without(table: str, excluded: Collection[str]) -> tuple[str, ...]:
    """Return the names of the columns of a table, except the excluded columns."""
    return tuple(name for name in metadata.tables[table].c.keys() if name not in excluded)  # noqa: SIM118  # a collection of columns


def _for_all(privileges: Privileges) -> dict[RoleKind, Privileges]:
    return dict.fromkeys(RoleKind, privileges)


_APP, _AUDITOR, _SEALER = RoleKind
_READ: Privileges = {"SELECT": ()}
_CRUD: Privileges = {"SELECT": (), "INSERT": (), "UPDATE": (), "DELETE": ()}
_RECORD: Privileges = {"SELECT": (), "INSERT": _without("audit_logs", SERVER_COLUMNS)}
_NON_SECRET = {
    table: {"SELECT": _without(table, columns)} for table, columns in SECRET_COLUMNS.items()
}
SEQUENCE = "audit_logs_position_seq"
# USAGE allows nextval(). UPDATE would allow setval(). SELECT shows the last position.
_NEXT: Privileges = {"USAGE": (), "SELECT": ()}
_FUNCTIONS: dict[str, dict[RoleKind, Privileges]] = {
    # A trigger calls its function without a privilege. Only the owner creates partitions.
    signature: _for_all({"EXECUTE": ()}) if signature.startswith("uuid7_") else {}
    for signature in FUNCTIONS
}
# The privileges of each kind of role on each object. The keys are the class and the name of an
# object. Values of the enum types need no privilege on the type.
GRANTS: dict[tuple[str, str], dict[RoleKind, Privileges]] = {
    ("DATABASE", ""): _for_all({"CONNECT": ()}),
    ("SCHEMA", ""): _for_all({"USAGE": ()}),
    ("TABLE", "tiger_accounts"): {_APP: _CRUD, _AUDITOR: _NON_SECRET["tiger_accounts"]},
    ("TABLE", "api_keys"): {_APP: _CRUD, _AUDITOR: _NON_SECRET["api_keys"]},
    ("TABLE", "api_key_limits"): {_APP: _CRUD, _AUDITOR: _READ},
    ("TABLE", "api_key_usage"): {_APP: _CRUD, _AUDITOR: _READ},
    ("TABLE", "token_statuses"): {_APP: _CRUD, _AUDITOR: _NON_SECRET["token_statuses"]},
    ("TABLE", "trading_pauses"): {_APP: _CRUD, _AUDITOR: _READ},
    ("TABLE", "audit_logs"): {_APP: _RECORD, _AUDITOR: _READ, _SEALER: _RECORD},
    ("TABLE", "audit_logs_YYYY_MM"): {},  # the partitions are read and written through audit_logs
    ("TABLE", "audit_logs_default"): _for_all(_READ),  # `health-check` reads this partition
    ("TABLE", "audit_seals"): {
        _APP: _READ,
        _AUDITOR: _READ,
        _SEALER: {"SELECT": (), "INSERT": ()},
    },
    ("TABLE", "granted_roles"): _for_all(_READ),
    ("TABLE", VERSION_TABLE): _for_all(_READ),
    ("SEQUENCE", SEQUENCE): {_APP: _NEXT, _AUDITOR: _READ, _SEALER: _NEXT},
    **{("FUNCTION", signature): grants for signature, grants in _FUNCTIONS.items()},
}
_COMPARED_FOR_ALL = {"TABLE", "SEQUENCE"}
_PARTITION = re.compile(r"audit_logs_\d{4}_\d{2}")
_TRAIL = re.compile(r"audit_logs|audit_logs_(default|\d{4}_\d{2}|position_seq)|audit_seals")
# Two transactions cannot change the grants on the same object at the same time.
LOCK_GRANTS = text(f"SELECT pg_catalog.pg_advisory_xact_lock({lock_key(0x7469676572_03)})")
_ROLES = text("SELECT role, kind FROM granted_roles ORDER BY role")
_OBJECTS = """
WITH objects AS (
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
# Grants do not restrict a superuser, an owner, or a role that can become one of them. Three
# predefined roles reach the files of the server, and so do everything.
_UNRESTRICTED = text(f"""
{_OBJECTS}
SELECT r.rolname::text AS role,
    ARRAY(SELECT rolname::text FROM pg_roles
        WHERE pg_has_role(r.oid, oid, 'MEMBER') AND (oid = r.oid OR NOT r.rolsuper)
            AND (rolsuper OR rolname IN ('pg_execute_server_program', 'pg_read_server_files',
                'pg_write_server_files')) ORDER BY 1) AS superusers,
    ARRAY(SELECT DISTINCT quote_ident(pg_get_userbyid(owner)) FROM objects
        WHERE pg_has_role(r.oid, owner, 'MEMBER') AND pg_get_userbyid(owner) <> 'pg_database_owner'
        ORDER BY 1) AS owners,
    EXISTS (SELECT FROM pg_roles WHERE pg_has_role(r.oid, oid, 'MEMBER')
        AND has_parameter_privilege(oid, 'session_replication_role', 'SET')) AS disables_triggers
FROM pg_roles AS r WHERE r.rolname = ANY (CAST(:roles AS text[])) ORDER BY 1
""")  # noqa: S608  # constants
# Each privilege that a role has itself (`own`, for the `columns`), or with SET ROLE (for the
# columns `reachable`). `sources` are those to whom the privilege is granted: the role itself (an
# empty text), PUBLIC, or roles of which the role is a member.
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
    ARRAY(SELECT CASE grantee WHEN 0 THEN 'PUBLIC' WHEN role_id THEN ''
            ELSE quote_ident(pg_get_userbyid(grantee)) END FROM unnest(grantees) AS grantee
        UNION SELECT rolname::text FROM pg_roles -- predefined roles have privileges without grants
        WHERE oid = ANY (holders) AND oid <> role_id AND starts_with(rolname, 'pg_')) AS sources,
    grantable
FROM held CROSS JOIN LATERAL (
    SELECT array_agg(grantee) AS grantees, coalesce(bool_or(is_grantable), false) AS grantable
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


def grants_on(kind: RoleKind, type_: str, name: str) -> Privileges:
    """Return the declared privileges of a kind of role on an object."""
    key = "audit_logs_YYYY_MM" if type_ == "TABLE" and _PARTITION.fullmatch(name) else name
    return GRANTS[type_, key].get(kind, {})


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
        found = (await connection.execute(_UNRESTRICTED, everyone)).all()
        restricted = [row.role for row in found if not (row.superusers or row.owners)]
        held = (await connection.execute(_EFFECTIVE, {**values, "roles": restricted})).all()
        grantees = (await connection.execute(_SELECT_GRANTEES, everyone)).all()
    differences = [*_compare_roles(roles, found)]
    for role in restricted:
        rows = [row for row in held if row.role == role]
        differences += _compare_privileges(role, roles[role], rows)
    return [*differences, *_compare_grantees(grantees)]


async def find_unrestricted(connection: AsyncConnection, role: str) -> Row[Any] | None:
    """Return what `describe_unrestricted` describes, or None if the role does not exist."""
    async with _catalog(connection) as values:
        found = await connection.execute(_UNRESTRICTED, {**values, "roles": [role]})
        return found.one_or_none()


def describe_unrestricted(row: Row[Any]) -> str | None:
    """Return why no grant restricts a role, or None."""
    if row.superusers:
        if row.role in row.superusers:
            return "is a superuser"
        return f"can do what a superuser can do, as a member of {', '.join(row.superusers)}"
    if row.owners:
        return (
            "owns the database, the schema or objects of tiger_db, or is a member of their owner"
            f" ({', '.join(row.owners)})"
        )
    return None


def _compare_roles(
    roles: Mapping[str, RoleKind], found: Iterable[Row[Any]]
) -> Iterator[GrantDifference]:
    """Yield roles that are missing, and roles that no grant restricts."""
    missing = {*roles}
    for row in found:
        missing.discard(row.role)
        role, title = quote_identifier(row.role), f"the {roles[row.role]} role {row.role}"
        if reason := describe_unrestricted(row):
            repair = f"REVOKE {', '.join(row.owners)} FROM {role}, or change the owner"
            if row.role in row.superusers:
                repair = f"ALTER ROLE {role} NOSUPERUSER"
            elif row.superusers:
                groups = ", ".join(map(quote_identifier, row.superusers))
                repair = f"REVOKE {groups} FROM {role}"
            yield _difference(f"{title} {reason}", repair)
        elif row.disables_triggers:
            yield _difference(
                f"{title} may disable triggers",
                f"REVOKE SET ON PARAMETER session_replication_role FROM {role}",
            )
    for name in sorted(missing):
        repair = f"create the role, or run `tiger-db revoke-grants {shlex.quote(name)}`"
        yield _difference(f"the {roles[name]} role {name} does not exist", repair)


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
        if "PUBLIC" in row.sources and type_ in _COMPARED_FOR_ALL:
            continue
        what = _of_columns(row.privilege, excess, every)
        yield differ(f"has {what} on {_label(type_, row.name)}", _revoke_excess(row) or again)
    for (type_, name, privilege), columns in declared.items():
        what = _of_columns(privilege, columns, ())
        yield differ(f"lacks {what} on {_label(type_, name)}", lacks=True)


def _revoke_excess(row: Row[Any]) -> str | None:
    """Return a statement that ends a privilege in excess, or None if a new grant ends it."""
    if "PUBLIC" in row.sources:
        return f"REVOKE {row.privilege} ON {row.type} {row.ident} FROM PUBLIC"
    groups = [name for name in row.sources if name.startswith("pg_")]
    if not groups and "" not in row.sources:
        groups = row.sources
    if groups:
        return f"REVOKE {', '.join(groups)} FROM {quote_identifier(row.role)}"
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
