"""The declared triggers, functions and privileges of the schema.

Triggers and functions are read from `declared.sql`. `find_differences` compares a database with
them. A database can differ from the declaration by accident. If `pg_restore --disable-triggers` is
interrupted, for example, the triggers of the database stay disabled.

`GRANTS` classifies each object of the schema, and declares the privileges of roles on it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tiger_db.migrations.version_table import VERSION_TABLE
from tiger_db.models import SECRET_COLUMNS, TABLES, RoleKind, metadata
from tiger_db.models.audit_logs import SERVER_COLUMNS


@dataclass(frozen=True, slots=True)
class Trigger:
    """A declared trigger, with the parts of its SQL in the format of `pg_get_triggerdef`.

    In the SQL of `action`, `{schema}.` precedes the name of each table and each function.
    """

    table: str
    name: str
    events: str
    action: str
    enabled: str = "O"  # Value of pg_trigger.tgenabled, O (ENABLE) or A (ENABLE ALWAYS).
    partitions: bool = False  # True if all partitions of the table also have the trigger.

    def definition(self, table: str, schema: str | None = None) -> str:
        """Return the SQL that creates the trigger on its table, or on a partition of the table.

        If `schema` is given, the names in the SQL are qualified with the schema's name.
        """
        action = self.action.replace("{schema}.", f"{schema}." if schema else "")
        return f"CREATE TRIGGER {self.name} {self.events} ON {table} {action}"


_SQL = Path(__file__).with_name("declared.sql").read_text(encoding="utf-8")
_TRIGGER = re.compile(r"CREATE TRIGGER (\w+) (.+) ON public\.(\w+) (FOR EACH .+);(.*)")


def _read_triggers() -> list[Trigger]:
    triggers = []
    for name, events, table, printed, comment in _TRIGGER.findall(_SQL):
        action = printed.replace("public.", "{schema}.")
        enabled = "A" if f"{table} ENABLE ALWAYS TRIGGER {name};" in _SQL else "O"
        triggers.append(Trigger(table, name, events, action, enabled, "partition" in comment))
    action = "FOR EACH ROW EXECUTE FUNCTION {schema}.set_updated_at()"
    tables = [name for name in sorted(TABLES) if "updated_at" in metadata.tables[name].c]
    return triggers + [Trigger(t, "set_updated_at", "BEFORE UPDATE", action) for t in tables]


def _read_functions() -> dict[str, str]:
    sql = _SQL.replace("SET search_path TO 'public',", "SET search_path TO {schema},")
    functions = {}
    for definition in sql.split("CREATE OR REPLACE FUNCTION public.")[1:]:
        signature, _, rest = definition.partition("\n")
        functions[signature] = f"{rest.rstrip().removesuffix(';')}\n"
    return functions


TRIGGERS = _read_triggers()
# FUNCTIONS maps the signature of each SQL function to the output of `pg_get_functiondef` without
# the first line. In the SQL, the placeholder {schema} stands for the schema's name in quotes.
FUNCTIONS = _read_functions()

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
_PARTITION = re.compile(r"audit_logs_\d{4}_\d{2}")


def grants_on(kind: RoleKind, type_: str, name: str) -> Privileges:
    """Return the declared privileges of a kind of role on an object."""
    key = "audit_logs_YYYY_MM" if type_ == "TABLE" and _PARTITION.fullmatch(name) else name
    return GRANTS[type_, key].get(kind, {})
