"""Run all benchmarks on a test server, and write RESULTS.md: `make bench`."""

import asyncio
import json
import os
import platform
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import asyncpg

from benchmarks import accounts, audit, bare, growth, keys, processes, refreshes, trail
from benchmarks.work import ROUNDS, Result, Work, measure
from tests.support.servers import create_database
from tiger_db import Database
from tiger_db.connections import connect_args, maintenance_engine
from tiger_db.migrations import upgrade
from tiger_db.testing import databases, servers

NAME = "tiger_db_bench"
PACKAGES = ("tiger-db", "asyncpg", "sqlalchemy", "sqlmodel", "pydantic", "keyshield")


async def compared_with_bare(server: servers.Server) -> list[Result]:
    """Measure the most important paths, compared with what a user of SQLModel writes by hand."""
    async with other_database(server, "bare") as database:
        await accounts.fill(database, bare.ACCOUNTS + 1)
        await audit.fill(database)
        async with bare.works(database) as works:
            results = [await measured(work) for work in works]
    with processes.command_work() as work:
        return [*results, await measured(work), await measured(processes.import_work())]


async def growth_rows(server: servers.Server, sizes: Sequence[int]) -> list[str]:
    rows = []
    for size in sizes:
        async with other_database(server, "growth") as database:
            rows.append(await growth.row(database, size))
            print(rows[-1])
    return rows


async def run(server: servers.Server) -> tuple[list[Result], list[str]]:
    settings = await create_database(server.url, NAME)
    try:
        async with maintenance_engine(settings) as engine:
            await upgrade(engine)
        arguments = await connect_args(settings)
        async with (
            Database(settings) as database,
            asyncpg.create_pool(**arguments, init=_json, min_size=1) as pool,
        ):
            results: list[Result] = []
            for works in (accounts.works, keys.works, audit.works):
                results += [await measured(work) for work in await works(database, pool)]
            async with keys.memory_works(database, pool) as more:
                results += [await measured(work) for work in more]
            async with (
                other_database(server, "peer", migrated=False) as peer,
                keys.keyshield_works(database, peer) as more,
            ):
                results += [await measured(work) for work in more]
            async with other_database(server, "few") as few, other_database(server, "many") as many:
                results.append(await measured(await keys.depth_work(few, many)))
            async with other_database(server, "trail") as trail:
                results_, facts = await trail_results(trail, _writing(results))
            more_results, more_facts = await refresh_results(server)
            starts = [*processes.facts()]
            print(*starts, sep="\n")
            return results + results_ + more_results, facts + more_facts + starts
    finally:
        await databases.drop(server.url, NAME)


async def trail_results(trail: Database, writing: float) -> tuple[list[Result], list[str]]:
    await audit.fill(trail)
    async with asyncpg.create_pool(
        **await connect_args(trail.settings), init=_json, min_size=1
    ) as pool:
        results = [await measured(work) for work in await audit.page_works(trail, pool)]
        facts = []
        async for fact in audit.facts(trail, pool, writing):
            print(fact)
            facts.append(fact)
    return results, facts


async def refresh_results(server: servers.Server) -> tuple[list[Result], list[str]]:
    facts = []
    async with (
        other_database(server, "refreshes") as made,
        # With fewer connections than the pool below, many concurrent tasks would open and close
        # connections.
        Database(made.settings.model_copy(update={"db_pool_size": 20})) as database,
        other_database(server, "queues", migrated=False) as queues,
        asyncpg.create_pool(
            **await connect_args(made.settings), init=_json, min_size=1, max_size=20
        ) as pool,
    ):
        results = [await measured(work) for work in await refreshes.works(database, pool)]
        async for fact in refreshes.facts(database, pool, queues):
            print(fact)
            facts.append(fact)
    async with other_database(server, "some") as some, other_database(server, "most") as most:
        results.append(await measured(await refreshes.depth_work(some, most)))
    return results, facts


def _writing(results: Sequence[Result]) -> float:
    return next(result.ours for result in results if result.name.startswith("record one event"))


async def measured(work: Work) -> Result:
    result = await measure(work)
    print(f"{result.ratio:8.4f}  {result.name}")
    return result


@asynccontextmanager
async def other_database(
    server: servers.Server, name: str, *, migrated: bool = True
) -> AsyncIterator[Database]:
    """Create another database on the same server, and drop it at the end."""
    settings = await create_database(server.url, f"{NAME}_{name}")
    try:
        if migrated:
            async with maintenance_engine(settings) as engine:
                await upgrade(engine)
        async with Database(settings) as database:
            yield database
    finally:
        await databases.drop(server.url, f"{NAME}_{name}")


async def _json(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    # COPY needs binary values. The binary form of jsonb is a version byte and the text.
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: b"\x01" + json.dumps(value).encode(),
        decoder=lambda value: json.loads(value[1:]),
        format="binary",
    )


def _rows(results: Sequence[Result]) -> str:
    return "\n".join(
        f"| {result.name} | {_micro(result.ours)} | {_micro(result.plain)}"
        f" | {result.ratio:.{2 if result.ratio > 0.1 else 4}f} |"
        for result in results
        if result.name != audit.DEPTH
    )


def report(
    bare_results: Sequence[Result],
    results: Sequence[Result],
    facts: Sequence[str],
    growing: Sequence[str],
    server: servers.Server,
) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    depth = next(result for result in results if result.name == audit.DEPTH)
    growing_ = "\n".join(growing)
    facts_ = "\n".join(f"- {fact}" for fact in facts)
    return f"""# Results

## Compared with SQLModel

Each row compares tiger_db with what a user of SQLModel writes by hand for the same work:
[bare.py](bare.py) and [processes.py](processes.py) have this code. It has no validation,
decryption, change tracking, audit events and typed errors. The times are microseconds per
operation: the median of {ROUNDS} rounds, in which both sides take turns. The garbage collector
ignores the objects that the process has before a row is measured (`gc.freeze`).

| work | tiger_db | SQLModel | ratio |
|---|---:|---:|---:|
{_rows(bare_results)}

`make bench-check` measures these rows again, and reports the ratios that are worse by a quarter.

## Compared with plain asyncpg

Each row compares tiger_db with the same work in plain asyncpg, over a Unix socket. The times are
microseconds per operation: the median of {ROUNDS} rounds, in which both sides take turns. If the
ratio is above 1, tiger_db takes longer: it validates, wraps secrets for decryption on demand, and
converts errors. If the name of a row contains "compared with", tiger_db is compared with that work
instead of plain asyncpg.

| work | tiger_db | plain asyncpg, or the other work | ratio |
|---|---:|---:|---:|
{_rows(results)}

With tiger_db, page {audit.ROWS // audit.PAGE:,} takes {depth.ratio:.2f} times as long as page 1.

{facts_}

## Growth of the audit trail

The events are spread over twelve months. A day has fewer security events than a page.
`make bench SIZES=10000000` adds a row with ten million events, for which the disk needs 10 GB.

{growth.HEADER}
{growing_}

{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python \
{platform.python_version()}, PostgreSQL {servers.version(server)} ({server.kind}); {versions}.
This page was written by `make bench`.
"""


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.{0 if seconds > 1e-4 else 1}f}"


def main() -> None:
    server = servers.choose(in_memory=False)
    try:
        bare_results = asyncio.run(compared_with_bare(server))
        results, facts = asyncio.run(run(server))
        sizes = [*growth.SIZES, *map(int, sys.argv[1:])]
        growing = asyncio.run(growth_rows(server, sizes))
        text = report(bare_results, results, facts, growing, server) + trail.kept_sections()
        Path(__file__).with_name("RESULTS.md").write_text(text, encoding="utf-8")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
