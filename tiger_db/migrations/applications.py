"""Functions for the `env.py` of an application whose tables are beside the tables of tiger_db."""

import re
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Enum, Table
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeDecorator

from tiger_db.migrations.version_table import KEY_COLUMNS, VERSION_TABLE
from tiger_db.models import TABLES, metadata
from tiger_db.models.columns import Json, List

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

_PARTITION = re.compile(r"audit_logs_(default|\d{4}_\d{2})")


def include_object(
    item: object,
    name: str | None,
    kind: str,
    reflected: bool,  # noqa: FBT001  # Alembic's signature
    compare_to: object,
) -> bool:
    """Return False for the tables of tiger_db, so that autogenerate of Alembic ignores them.

    The function is for the parameter `include_object` of `context.configure` in the `env.py` of an
    application. A table `api_keys` or `audit_logs` of the application, in another schema, is not
    ignored, because it lacks the columns of tiger_db's table or their comments.
    """
    del compare_to
    if kind != "table" or name is None or not isinstance(item, Table):
        return True
    if not reflected:
        return item.metadata is not metadata or name not in TABLES
    if name == VERSION_TABLE or _PARTITION.fullmatch(name):
        return False
    column = item.columns.get(KEY_COLUMNS.get(name, ""))
    return name not in TABLES or (name in KEY_COLUMNS and (column is None or not column.comment))


def render_item(kind: str, item: object, context: "AutogenContext") -> str | Literal[False]:
    """Render the SQL types of tiger_db and SQLModel as types of SQLAlchemy.

    The function is for the parameter `render_item` of `context.configure`. Without it, migrations
    would need imports of tiger_db and sqlmodel.
    """
    if kind != "type":
        return False
    decorated = isinstance(item, TypeDecorator)
    while isinstance(item, TypeDecorator):
        item = item.impl_instance
    if isinstance(item, Enum) and item.native_enum:
        return f"sa.Enum({', '.join(map(repr, item.enums))}, name={item.name!r})"
    if isinstance(item, Json | List):
        context.imports.add("from sqlalchemy.dialects import postgresql")
    if isinstance(item, Json):
        return "postgresql.JSONB()"
    if isinstance(item, List):
        array = ARRAY(item.item_type, dimensions=item.dimensions)
        return context.migration_context.impl.render_type(array, context)
    return f"sa.{item!r}" if decorated else False
