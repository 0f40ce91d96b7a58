"""What Alembic's autogenerate must know about this schema, beyond tables and columns."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import alembic_postgresql_enum  # noqa: F401  # registers its comparison of enum members
from alembic.autogenerate import comparators
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import ExecuteSQLOp, UpgradeOps
from alembic.util import DispatchPriority
from sqlalchemy import text
from sqlalchemy.types import TypeDecorator

from tiger_db.migrations.declared import Trigger, updated_at_triggers
from tiger_db.models import metadata

_PARTITION = re.compile(r"audit_logs_(default|\d{4}_\d{2})(_|$)")


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Partitions follow their parent: they are not tables to compare."""
    return not (kind == "table" and name is not None and _PARTITION.match(name))


def render_item(kind: str, item: object, _context: AutogenContext) -> str | Literal[False]:
    """Write our column types into a migration as what they are in the database, never by `repr`."""
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{item.impl_instance!r}"
    return False


def compare_server_default(
    _context: object,
    _inspected_column: object,
    _metadata_column: object,
    inspected_default: str | None,
    _metadata_default: object,
    rendered_metadata_default: str | None,
) -> bool | None:
    """Alembic has the server compare values; two of a sequence are never the same."""
    if inspected_default and inspected_default.startswith("nextval("):
        return inspected_default != rendered_metadata_default
    return None


class TriggerOp(ExecuteSQLOp):
    """Create or drop the trigger that keeps `updated_at` of a table."""

    def __init__(self, trigger: Trigger, *, create: bool = True) -> None:
        self.trigger = trigger
        self.create = create
        super().__init__(
            trigger.on(trigger.table)
            if create
            else f"DROP TRIGGER {trigger.name} ON {trigger.table}"
        )

    def reverse(self) -> "TriggerOp":
        return TriggerOp(self.trigger, create=not self.create)

    def to_diff_tuple(self) -> tuple[str, str]:
        return (
            "add_trigger" if self.create else "remove_trigger",
            f"{self.trigger.name} on {self.trigger.table}",
        )


@comparators.dispatch_for("schema", priority=DispatchPriority.LAST)
def _compare_triggers(context: AutogenContext, ops: UpgradeOps, _schemas: Iterable[object]) -> None:
    assert context.connection is not None
    present = set(
        context.connection.scalars(
            text(
                "SELECT relname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid"
                " WHERE tgname = 'set_updated_at'"
                " AND relnamespace = quote_ident(current_schema())::regnamespace"
            )
        )
    )
    missing = [trigger for trigger in updated_at_triggers() if trigger.table not in present]
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
