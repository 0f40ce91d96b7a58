"""Write docs/schema.md from the models and the migrated database: `make schema`."""

import asyncio
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import asyncpg

from tests.support.index_queries import SERVES
from tiger_db.connections import connect, maintenance_engine
from tiger_db.migrations import schema_state
from tiger_db.models import Entity, metadata
from tiger_db.settings import Settings

PAGE = Path(__file__).parent.parent.parent / "docs" / "schema.md"
HEAD = """\
# The schema

`make schema` writes this page from the models and the migrated database. Do not edit the page:
change the models. `tests/docs/test_schema.py` fails if the page is out of date.

The diagram shows the keys only. After it, each table has its columns, constraints and indexes. The
column "serves" names the queries that use an index, as `tests/crud/test_indexes.py` proves with
`EXPLAIN`.
"""
TABLES = """
SELECT relname AS name, coalesce(obj_description(oid, 'pg_class'), '') AS comment,
    pg_get_partkeydef(oid) AS partitioned_by
FROM pg_class WHERE oid = ANY ($1::text[]::regclass[]) ORDER BY relname
"""
COLUMNS = """
SELECT attname AS name, format_type(atttypid, atttypmod) AS type, attnotnull AS not_null,
    CASE attcollation WHEN '"C"'::regcollation THEN ' COLLATE "C"' ELSE '' END AS collation,
    coalesce(pg_get_expr(adbin, adrelid), '') AS default,
    coalesce(col_description(attrelid, attnum), '') AS comment
FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
# Without NOT NULL, which the table of columns shows.
CONSTRAINTS = """
SELECT conname AS name, contype::text AS kind, pg_get_constraintdef(oid) AS rule,
    confrelid::regclass::text AS target,
    ARRAY(SELECT attname::text FROM unnest(conkey) WITH ORDINALITY AS k (number, n)
        JOIN pg_attribute ON attrelid = conrelid AND attnum = number ORDER BY n) AS columns
FROM pg_constraint WHERE conrelid = $1::text::regclass AND contype IN ('p', 'u', 'f', 'c')
ORDER BY array_position('{p,u,f,c}', contype::text), conname
"""
INDEXES = """
SELECT relname AS name, indisunique AS is_unique,
    substring(pg_get_indexdef(indexrelid) FROM ' USING (.*)') AS definition
FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
WHERE indrelid = $1::text::regclass ORDER BY indisprimary DESC, relname
"""
ENUMS = """
SELECT typname AS name, array_agg(enumlabel::text ORDER BY enumsortorder) AS labels
FROM pg_enum JOIN pg_type ON pg_type.oid = enumtypid
WHERE typnamespace = current_schema()::regnamespace GROUP BY typname ORDER BY typname
"""
SHORT = {"timestamp with time zone": "timestamptz"}
KEYS = {"p": "PK", "f": "FK", "u": "UK"}


async def page(connection: asyncpg.Connection) -> str:
    """Return the page about the current schema of a connection."""
    about = {m.local_table: cleandoc(m.class_.__doc__ or "") for m in Entity._sa_registry.mappers}
    entities: list[str] = []
    relations: list[str] = []
    sections: list[str] = []
    for table in await connection.fetch(TABLES, sorted(metadata.tables)):
        name = table["name"]
        columns = await connection.fetch(COLUMNS, name)
        constraints = await connection.fetch(CONSTRAINTS, name)
        indexes = await connection.fetch(INDEXES, name)
        entities += _entity(name, columns, constraints)
        relations += _relations(name, columns, constraints)
        sections += [f"## {name}", about.get(metadata.tables[name], f"{table['comment']}.")]
        if table["partitioned_by"]:
            sections.append(f"Partitioned by `{table['partitioned_by']}`.")
        sections += [_columns(columns), _constraints(constraints), _indexes(indexes)]
    diagram = "\n".join(["```mermaid", "erDiagram", *relations, *entities, "```"])
    enums = _table(
        ("type", "values"),
        [(_code(e["name"]), _codes(e["labels"])) for e in await connection.fetch(ENUMS)],
    )
    return "\n\n".join([HEAD.rstrip(), diagram, *sections, "## Enums", enums]) + "\n"


# https://mermaid.js.org/syntax/entityRelationshipDiagram.html


def _entity(
    table: str, columns: list[asyncpg.Record], constraints: list[asyncpg.Record]
) -> Iterator[str]:
    keys: dict[str, list[str]] = {}
    for constraint in constraints:
        for column in constraint["columns"] if constraint["kind"] in KEYS else ():
            keys.setdefault(column, []).append(KEYS[constraint["kind"]])
    yield f"    {table} {{"
    for column in columns:
        if column["name"] in keys:
            type_ = SHORT.get(column["type"], column["type"])
            yield f"        {type_} {column['name']} {', '.join(keys[column['name']])}"
    yield "    }"


def _relations(
    table: str, columns: list[asyncpg.Record], constraints: list[asyncpg.Record]
) -> Iterator[str]:
    required = {column["name"] for column in columns if column["not_null"]}
    unique = [set(c["columns"]) for c in constraints if c["kind"] in "pu"]
    for constraint in constraints:
        if constraint["kind"] == "f":
            one = "||" if required.issuperset(constraint["columns"]) else "|o"
            many = "o|" if set(constraint["columns"]) in unique else "o{"
            label = ", ".join(constraint["columns"])
            yield f'    {constraint["target"]} {one}--{many} {table} : "{label}"'


def _columns(columns: list[asyncpg.Record]) -> str:
    return _table(
        ("column", "type", "null", "default", ""),
        [
            (
                _code(c["name"]), SHORT.get(c["type"], c["type"]) + c["collation"],
                "" if c["not_null"] else "yes", _code(c["default"]), c["comment"],
            )
            for c in columns
        ],
    )  # fmt: skip


def _constraints(constraints: list[asyncpg.Record]) -> str:
    return _table(
        ("constraint", "rule"), [(_code(c["name"]), _code(c["rule"])) for c in constraints]
    )


def _indexes(indexes: list[asyncpg.Record]) -> str:
    return _table(
        ("index", "on", "serves"),
        [
            (
                _code(i["name"]), ("unique " if i["is_unique"] else "") + _code(i["definition"]),
                "<br>".join(str(call) for name, call in SERVES if name == i["name"]),
            )
            for i in indexes
        ],
    )  # fmt: skip


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`" if text else ""


def _codes(texts: list[str]) -> str:
    return ", ".join(map(_code, texts))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


async def write() -> None:
    settings = Settings()
    async with maintenance_engine(settings) as engine, engine.connect() as migrated:
        (await schema_state(migrated)).check()
    connection = await connect(settings)
    try:
        PAGE.write_text(await page(connection), encoding="utf-8")
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(write())
