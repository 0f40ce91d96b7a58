"""Extensions of Alembic's autogenerate for partitions, column types, defaults and triggers."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import alembic_postgresql_enum  # noqa: F401  # the import registers a comparison of enum members
from alembic.autogenerate import comparators
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import ExecuteSQLOp, UpgradeOps
from alembic.util import DispatchPriority
from sqlalchemy import text
from sqlalchemy.types import TypeDecorator

from tiger_db.migrations.declared import TRIGGERS, Trigger
from tiger_db.models import metadata
from tiger_db.models.columns import Json

_PARTITION = re.compile(r"audit_logs_(default|\d{4}_\d{2})(_|$)")


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Return False for partitions of audit_logs, because partitions have no model."""
    return not (kind == "table" and name is not None and _PARTITION.match(name))


def render_item(kind: str, item: object, context: AutogenContext) -> str | Literal[False]:
    """Render a column type of tiger_db as its underlying SQLAlchemy type."""
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{item.impl_instance!r}"
    if kind == "type" and isinstance(item, Json):
        context.imports.add("from sqlalchemy.dialects import postgresql")
        return "postgresql.JSONB()"
    return False


def compare_server_default(
    _context: object,
    _inspected_column: object,
    _metadata_column: object,
    inspected_default: str | None,
    _metadata_default: object,
    rendered_metadata_default: str | None,
) -> bool | None:
    """Compare column defaults that call nextval() by their texts, not by their values.

    Each call of nextval() returns a new value.

    For column defaults without nextval(), return None: Alembic then compares the values of the
    defaults.
    """
    if inspected_default and inspected_default.startswith("nextval("):
        return inspected_default != rendered_metadata_default
    return None


class TriggerOp(ExecuteSQLOp):
    """An Alembic operation that creates or drops a trigger `set_updated_at`."""

    def __init__(self, trigger: Trigger, *, create: bool = True) -> None:
        self.trigger, self.create = trigger, create
        drop = f"DROP TRIGGER {trigger.name} ON {trigger.table}"
        super().__init__(trigger.definition(trigger.table) if create else drop)

    def reverse(self) -> "TriggerOp":
        return TriggerOp(self.trigger, create=not self.create)

    def to_diff_tuple(self) -> tuple[str, str]:
        verb = "add" if self.create else "remove"
        return f"{verb}_trigger", f"{self.trigger.name} on {self.trigger.table}"


@comparators.dispatch_for("schema", priority=DispatchPriority.LAST)
def _compare_triggers(context: AutogenContext, ops: UpgradeOps, _schemas: Iterable[object]) -> None:
    assert context.connection is not None
    tables = text(
        "SELECT relname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid"
        " WHERE tgname = 'set_updated_at'"
        " AND relnamespace = quote_ident(current_schema())::regnamespace"
    )
    found = set(context.connection.scalars(tables))
    missing = [t for t in TRIGGERS if t.name == "set_updated_at" and t.table not in found]
    ops.ops.extend(map(TriggerOp, missing))


OPTIONS: dict[str, Any] = {
    "target_metadata": metadata,
    "include_name": include_name,
    "render_item": render_item,
    "compare_type": True,
    "compare_server_default": compare_server_default,
    "transaction_per_migration": True,
    "autogenerate_plugins": ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"],
}
