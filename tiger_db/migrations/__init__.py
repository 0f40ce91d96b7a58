"""Functions that run or write migrations, and compare the schema with its declaration.

Alembic is imported inside functions: each Database imports this package, but runs no migrations.
"""

from tiger_db.migrations.alembic_scripts import alembic_config, history, script_location, scripts
from tiger_db.migrations.applications import include_object, render_item
from tiger_db.migrations.db_schema import (
    SEARCH_PATH,
    SearchPath,
    create_schema,
    search_path_sql,
)
from tiger_db.migrations.model_comparison import drift, revision
from tiger_db.migrations.running import (
    MONTHS_AHEAD,
    AppliedMigration,
    UpgradeResult,
    downgrade,
    migration_sql,
    pending,
    pending_sql,
    upgrade,
)
from tiger_db.migrations.state import SchemaState, schema_state, take_over_version_table

__all__ = [
    "MONTHS_AHEAD",
    "SEARCH_PATH",
    "AppliedMigration",
    "SchemaState",
    "SearchPath",
    "UpgradeResult",
    "alembic_config",
    "create_schema",
    "downgrade",
    "drift",
    "history",
    "include_object",
    "migration_sql",
    "pending",
    "pending_sql",
    "render_item",
    "revision",
    "schema_state",
    "script_location",
    "scripts",
    "search_path_sql",
    "take_over_version_table",
    "upgrade",
]
