"""Benchmark of an audit trail by its size, with the memory of each step: `make bench-trail`."""

import asyncio
import multiprocessing
import os
import resource
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pydantic import SecretStr
from uuid_utils.compat import uuid7

from tests.support.servers import create_database
from tiger_db import Database, Settings, audit
from tiger_db.connections import connect, maintenance_engine
from tiger_db.migrations import upgrade
from tiger_db.signing import generate_signing_key
from tiger_db.testing import databases, servers

NAME = "tiger_db_bench_by_size"
SIZES = (100_000, 1_000_000)
RESULTS = Path(__file__).with_name("RESULTS.md")
HEADING = "## The audit trail by its size\n"
COLUMNS = [
    "id", "action", "result", "severity", "resource_type", "resource_id", "user_id", "session_id",
    "user_agent", "request_id", "details", "duration_ms",
]  # fmt: skip


def events(count: int) -> Iterator[tuple[object, ...]]:
    """Yield the values of COLUMNS of typical events."""
    for n in range(count):
        details = b'\x01{"symbol": "AAPL", "side": "BUY", "quantity": %d}' % (n % 1000)
        yield (
            uuid7(), "trade:place_order", "success", "medium", "order", str(31318009878020096 + n),
            f"user-{n % 250}", f"{n // 20:016x}", "claude-desktop/1.2", f"{n:08x}", details,
            n % 500,
        )  # fmt: skip


async def load(database: Database, count: int) -> None:
    connection = await connect(database.settings)
    try:
        await connection.execute("SET statement_timeout = 0")
        # COPY needs binary values. The binary form of jsonb is a version byte and the text.
        await connection.set_type_codec(
            "jsonb", schema="pg_catalog", encoder=bytes, decoder=bytes, format="binary"
        )
        await connection.copy_records_to_table(
            "audit_logs", columns=COLUMNS, records=events(count), timeout=3600
        )
        await connection.execute("VACUUM ANALYZE audit_logs", timeout=3600)
    finally:
        await connection.close()


async def seal(database: Database, count: int) -> None:
    assert (await audit.seal(database)).rows == count


async def verify(database: Database, count: int) -> None:
    report = await audit.verify(database)
    assert report.sound
    assert report.rows == count


STEPS: list[Callable[[Database, int], Awaitable[None]]] = [load, seal, verify]


def run_step(index: int, variables: dict[str, str], count: int) -> tuple[float, float, float]:
    """Run a step in this process. Return its seconds, its CPU seconds, and the peak in MiB."""
    os.environ.update(variables)

    async def run() -> tuple[float, float]:
        async with Database(Settings()) as database:
            start, cpu = time.perf_counter(), time.process_time()
            await STEPS[index](database, count)
            return time.perf_counter() - start, time.process_time() - cpu

    seconds, cpu = asyncio.run(run())
    return seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


async def measure_size(server: servers.Server, count: int) -> str:
    """Return a row of the table for a new audit trail of `count` events."""
    settings = await create_database(server.url, NAME)
    settings = settings.model_copy(update={"audit_signing_key": SecretStr(generate_signing_key())})
    try:
        async with maintenance_engine(settings) as engine:
            await upgrade(engine)
        cells = [f"{count:,}"]
        for index, _ in enumerate(STEPS):
            # A new process for each step, whose peak is that of the step.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                step = pool.submit(run_step, index, servers.environment_of(settings), count)
                seconds, cpu, peak = await asyncio.wrap_future(step)
            cells += [f"{seconds:.1f} s", f"{cpu:.1f} s", f"{peak:.0f} MiB"]
        return f"| {' | '.join(cells)} |"
    finally:
        await databases.drop(server.url, NAME)


def kept_sections() -> str:
    """Return the sections that `make bench` does not write: of this benchmark and of drills."""
    _, heading, text = RESULTS.read_text(encoding="utf-8").partition(HEADING)
    return f"\n{heading}{text}" if heading else ""


def report(server: servers.Server) -> str:
    rows = "\n".join(asyncio.run(measure_size(server, count)) for count in SIZES)
    return f"""
{HEADING}
Events are loaded with COPY, sealed and verified, each in a process of its own. The CPU time and the
peak memory are those of this process, without PostgreSQL.

| events | load | CPU | peak | seal | CPU | peak | verify | CPU | peak |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}

PostgreSQL {servers.version(server)} ({server.kind}). This section was written by
`make bench-trail`.
"""


def main() -> None:
    server = servers.choose(in_memory=False)
    try:
        text = report(server)
    finally:
        server.stop()
    before, _, old = RESULTS.read_text(encoding="utf-8").partition(f"\n{HEADING}")
    _, heading, after = old.partition("\n## ")
    RESULTS.write_text(before + text + heading + after, encoding="utf-8")


if __name__ == "__main__":
    main()
