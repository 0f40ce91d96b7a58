"""Run the migrations on the connection in the Alembic configuration, or on a new connection."""

import asyncio
import warnings

from sqlalchemy import Connection
from sqlalchemy.exc import SAWarning

from alembic import context
from tiger_db.connections import maintenance_engine
from tiger_db.migrations import create_schema, search_path_sql, take_over_version_table
from tiger_db.migrations.autogenerate import OPTIONS
from tiger_db.settings import DEFAULT_SCHEMA, Settings


def run(connection: Connection) -> None:
    context.configure(connection=connection, **OPTIONS)
    with warnings.catch_warnings(), context.begin_transaction():
        # SQLAlchemy 2.1 and Alembic warn about each NOT VALID constraint that Alembic reads.
        for argument in ("dialect_options", "not_valid"):
            message = f"Can't validate argument '{argument}'"
            warnings.filterwarnings("ignore", message, SAWarning)
        context.run_migrations()


async def connect_and_run() -> None:
    async with maintenance_engine(Settings()) as engine, engine.connect() as connection:
        await connection.run_sync(create_schema)
        await connection.run_sync(take_over_version_table)
        await connection.commit()
        await connection.run_sync(run)


if context.is_offline_mode():
    # With the dialect's default parameter style, the printed SQL would contain %% for each %.
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        **OPTIONS,
    )
    # If a user runs `alembic` itself, env.py writes the search path into the SQL script. If the user
    # runs `tiger-db`, the function `pending_sql` writes the search path into the script.
    if "connection" not in context.config.attributes:
        schema = Settings().db_schema
        context.get_context().impl.static_output(
            search_path_sql(schema, create=schema != DEFAULT_SCHEMA).strip()
        )
    with context.begin_transaction():
        context.run_migrations()
elif context.config.attributes.get("connection") is not None:
    run(context.config.attributes["connection"])
else:
    asyncio.run(connect_and_run())
