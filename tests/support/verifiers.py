"""Helpers of the tests of KeyVerifier: changes of columns, counted checkouts, a killed server."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
from sqlalchemy import event

from tiger_db import Database, Settings, embedded

# Each column of api_keys whose change is told, and another value for it.
OTHER = {
    "name": "'another'",
    "key_prefix": "'tdb_test_000000000000'",
    "key_hash": "'{SSHA256}hash'",
    "pepper_id": "'another'",
    "root_id": "gen_random_uuid()",
    "successor_id": "gen_random_uuid()",
    "status": "'inactive'",
    "scopes": "'{trade:read}'",
    "tiger_account_id": "(SELECT id FROM tiger_accounts)",
    "expires_at": "now() + interval '1 day'",
    "rate_limit_per_hour": "7",
    "rate_limit_per_day": "7",
    "allowed_ips": "'{10.0.0.0/8}'",
    "allowed_user_agents": "'{claude/*}'",
    "created_by": "'somebody'",
    "revoked_at": "now()",
    "revocation_reason": "'none'",
    "description": "'another'",
    "tags": """'{"a": 1}'""",
    "mac": "'1:test:code'",
    "mac_denied_at": "now()",
}


@contextmanager
def checkouts(database: Database) -> Iterator[list[object]]:
    """Record the connections that the current task checks out. Without one, nothing is sent."""
    taken: list[object] = []
    task = asyncio.current_task()

    def take(connection: object, *rest: object) -> None:
        if asyncio.current_task() is task:
            taken.append(connection)

    engines = [database.engine.sync_engine, database.out_of_band.engine.sync_engine]
    for engine in engines:
        event.listen(engine, "checkout", take)
    try:
        yield taken
    finally:
        for engine in engines:
            event.remove(engine, "checkout", take)


def kill(settings: Settings, how: signal.Signals = signal.SIGKILL) -> None:
    server = embedded.running(settings)
    assert server
    postmaster = psutil.Process(server.pid)
    everyone = [postmaster, *postmaster.children()]
    postmaster.send_signal(how)
    deadline = time.monotonic() + 20
    while any(is_alive(process) for process in everyone):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
