"""Configuration of Alembic for tiger_db: comparison of the models with tiger_db's own objects.

Alembic compares triggers and enums only in tiger_db's own `env.py`, which names the plugin of this
module. In the `env.py` of an application, the plugin has no effect.
"""

import io
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal

from alembic.autogenerate.api import AutogenContext
from alembic.operations import Operations
from alembic.operations.ops import AlterColumnOp, ExecuteSQLOp, MigrationScript, UpgradeOps
from alembic.runtime.migration import MigrationContext
from alembic.runtime.plugins import Plugin
from alembic.util import DispatchPriority, PriorityDispatchResult
from sqlalchemy import (
    Column,
    Computed,
    DefaultClause,
    Enum,
    ForeignKeyConstraint,
    Identity,
    Index,
    text,
)
from sqlalchemy.types import TypeDecorator

from tiger_db.migrations.alembic_scripts import history
from tiger_db.migrations.applications import render_item
from tiger_db.migrations.declared import TRIGGERS
from tiger_db.migrations.version_table import VERSION_TABLE
from tiger_db.models import TABLES, metadata

_CREATED_OR_DROPPED = re.compile(
    r"^(CREATE|DROP) (?:UNIQUE )?(?:TABLE|TYPE|INDEX) (?:CONCURRENTLY )?(?:IF (?:NOT )?EXISTS )?"
    r"(\w+)\b(?! PARTITION OF)",
    re.MULTILINE,
)


@cache
def _migrated_names() -> frozenset[str]:
    """Return the names of the tables, enums and indexes that exist after all migrations.

    The names come from the SQL of the migrations. If a model is removed, its table still has a
    migration that creates it, so the table differs from the models. A table without such a
    migration belongs to another application.
    """
    buffer, names = io.StringIO(), set[str]()
    context = MigrationContext.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        opts={"as_sql": True, "literal_binds": True, "output_buffer": buffer},
    )
    with Operations.context(context):
        for script in reversed(history()):
            script.module.upgrade()
    for verb, name in _CREATED_OR_DROPPED.findall(buffer.getvalue()):
        (names.add if verb == "CREATE" else names.discard)(name)
    return frozenset(names)


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Return whether a table in the database is a table of tiger_db, or was one before a change."""
    return kind != "table" or name in TABLES | _migrated_names()


def include_object(
    item: object,
    name: str | None,
    kind: str,
    reflected: bool,  # noqa: FBT001  # Alembic's signature
    compare_to: object,
) -> bool:
    """Return False for objects of an application.

    An application can add tables to `metadata`, and can add indexes and foreign keys to its own
    tables to the tables of tiger_db in the database. An added unique index is a difference, because
    the index can refuse writes of tiger_db.
    """
    if kind == "table" and not reflected:
        return name in TABLES
    if reflected and compare_to is None and isinstance(item, Index):
        return bool(item.unique) or name in _migrated_names()
    if reflected and compare_to is None and isinstance(item, ForeignKeyConstraint):
        return item.elements[0].target_fullname.rpartition(".")[0] in TABLES | _migrated_names()
    return True


def _render_item(kind: str, item: object, context: AutogenContext) -> str | Literal[False]:
    enum = _native_enum(item) if kind == "type" else None
    if enum is None:
        return render_item(kind, item, context)
    context.imports.add("from sqlalchemy.dialects import postgresql")
    labels = ", ".join(map(repr, enum.enums))
    return f"postgresql.ENUM({labels}, name={enum.name!r}, create_type=False)"


def _native_enum(type_: object) -> Enum | None:
    while isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    return type_ if isinstance(type_, Enum) and type_.native_enum else None


def _labels(labels: Iterable[str]) -> str:
    return ", ".join("'" + label.replace("'", "''") + "'" for label in labels)


def _compare_server_default(
    _context: AutogenContext,
    operation: AlterColumnOp,
    _schema: str | None,
    _table: str,
    _column: str,
    found: Column[Any],
    declared: Column[Any],
) -> PriorityDispatchResult:
    """Report generated columns, and compare column defaults that call nextval() by their texts.

    Alembic compares the values of other defaults. Each call of nextval() returns a new value.
    """
    default, expected = found.server_default, declared.server_default
    if isinstance(default, DefaultClause):
        if not str(default.arg).startswith("nextval("):
            return PriorityDispatchResult.CONTINUE
        if isinstance(expected, DefaultClause) and str(default.arg) == str(expected.arg):
            return PriorityDispatchResult.STOP
    elif not isinstance(default, Computed | Identity):
        return PriorityDispatchResult.CONTINUE
    operation.modify_server_default = expected
    return PriorityDispatchResult.STOP


class SchemaOp(ExecuteSQLOp):
    """An operation that autogenerate of Alembic lacks, as SQL with the SQL of its reverse."""

    def __init__(self, sql: str, undo: str, *difference: str) -> None:
        super().__init__(sql)
        self._sql, self._undo, self._difference = sql, undo, difference

    def reverse(self) -> "SchemaOp":
        return SchemaOp(self._undo, self._sql, *self._difference)

    def to_diff_tuple(self) -> tuple[str, str]:
        kind, description = self._difference
        return kind, description


def _compare_triggers(
    context: AutogenContext, ops: UpgradeOps, _schemas: Iterable[object]
) -> PriorityDispatchResult:
    assert context.connection is not None
    tables = text(
        "SELECT relname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid"
        " WHERE tgname = 'set_updated_at'"
        " AND relnamespace = quote_ident(current_schema())::regnamespace"
    )
    found = set(context.connection.scalars(tables))
    for trigger in TRIGGERS:
        if trigger.name == "set_updated_at" and trigger.table not in found:
            create = trigger.definition(trigger.table)
            drop = f"DROP TRIGGER {trigger.name} ON {trigger.table}"
            difference = f"{trigger.name} on {trigger.table}"
            ops.ops.append(SchemaOp(create, drop, "add_trigger", difference))
    return PriorityDispatchResult.CONTINUE


def _compare_enums(
    context: AutogenContext, ops: UpgradeOps, _schemas: Iterable[object]
) -> PriorityDispatchResult:
    assert context.connection is not None
    query = text(
        "SELECT typname::text, array_agg(enumlabel::text ORDER BY enumsortorder) FROM pg_type"
        " JOIN pg_enum ON enumtypid = pg_type.oid"
        " WHERE typnamespace = quote_ident(current_schema())::regnamespace GROUP BY typname"
    )
    declared = _declared_enums()
    found = {
        name: labels
        for name, labels in context.connection.execute(query)
        if name in declared.keys() | _migrated_names()
    }
    for name, labels in declared.items():
        if name not in found:
            create = f"CREATE TYPE {name} AS ENUM ({_labels(labels)})"
            ops.ops.insert(0, SchemaOp(create, f"DROP TYPE {name}", "create_enum", name))
        else:
            ops.ops.extend(_label_ops(name, found[name], labels))
    for name, labels in found.items():
        if name not in declared:
            create = f"CREATE TYPE {name} AS ENUM ({_labels(labels)})"
            ops.ops.append(SchemaOp(f"DROP TYPE {name}", create, "drop_enum", name))
    return PriorityDispatchResult.CONTINUE


def _declared_enums() -> dict[str, list[str]]:
    """Return the labels of each enum of tiger_db's models."""
    columns = [column for table in sorted(TABLES) for column in metadata.tables[table].columns]
    enums = [_native_enum(getattr(column.type, "item_type", column.type)) for column in columns]
    return {str(enum.name): list(enum.enums) for enum in enums if enum is not None}


def _label_ops(name: str, found: list[str], declared: list[str]) -> Iterator[SchemaOp]:
    """Yield an operation for each label that an enum lacks."""
    added = [label for label in declared if label not in found]
    if [label for label in declared if label in found] != found:
        message = f"PostgreSQL cannot remove or reorder labels of the enum {name}: write SQL"
        fail = f"DO $$BEGIN RAISE '{message}'; END$$"
        yield SchemaOp(fail, fail, "change_enum_labels", f"{name} {found} {declared}")
        return
    for label in added:
        index = declared.index(label)
        at = f"AFTER {_labels(declared[index - 1 : index])}" if index else ""
        if not index and found:
            at = f"BEFORE {_labels(found[:1])}"
        add = f"ALTER TYPE {name} ADD VALUE IF NOT EXISTS {_labels([label])} {at}".rstrip()
        keep = f"SELECT 'PostgreSQL cannot remove a label of the enum {name}'"
        yield SchemaOp(add, keep, "add_enum_value", f"{name} {_labels([label])}")


def _keep_own_operations(
    _context: MigrationContext, _revision: object, directives: list[MigrationScript]
) -> None:
    """Remove the operations of other extensions of Alembic that the process has imported."""
    own = ("alembic.operations.ops", __name__)
    for script in directives:
        for operations in (*script.upgrade_ops_list, *script.downgrade_ops_list):
            operations.ops[:] = [op for op in operations.ops if type(op).__module__ in own]


_PLUGIN = Plugin("tiger_db")
_PLUGIN.add_autogenerate_comparator(
    _compare_server_default, "column", "server_default", priority=DispatchPriority.FIRST
)
for _compare in (_compare_triggers, _compare_enums):
    _PLUGIN.add_autogenerate_comparator(
        _compare, "schema", _compare.__name__, priority=DispatchPriority.LAST
    )

OPTIONS: dict[str, Any] = {
    "target_metadata": metadata,
    "version_table": VERSION_TABLE,
    "include_name": include_name,
    "include_object": include_object,
    "render_item": _render_item,
    "compare_type": True,
    "compare_server_default": True,
    "process_revision_directives": _keep_own_operations,
    "transaction_per_migration": True,
    "autogenerate_plugins": [
        "alembic.autogenerate.*",
        "alembic.ext.checkconstraint_byname",
        _PLUGIN.name,
    ],
}
