"""Two PostgreSQL servers under Patroni, with etcd, on the loopback address."""

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.clusters import LOOPBACK, PROGRAMS, Server, free_port
from tests.support.waiting import wait_until

MISSING = [name for name in ("etcd", "patroni") if shutil.which(name) is None]
# The shortest times that Patroni accepts. A silent primary is lost after `ttl` seconds.
TIMES = {"ttl": 20, "loop_wait": 1, "retry_timeout": 3}


def _start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    root = os.geteuid() == 0
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            user="postgres" if root else None,
            group="postgres" if root else None,
            extra_groups=[] if root else None,
        )


def _descendants(pid: int) -> list[int]:
    """Return a process and all processes that descend from it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(found for child in children for found in _descendants(int(child)))]
    return []


@dataclass
class Node:
    """A server and its Patroni."""

    name: str
    server: Server
    port: int  # of Patroni's REST API
    configuration: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        command = [str(shutil.which("patroni")), str(self.configuration)]
        self.process = _start(command, self.configuration.with_suffix(".log"))

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{LOOPBACK}:{self.port}/{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def is_primary(self) -> bool:
        return self.ask("primary")[0] == 200

    def is_synchronous(self) -> bool:
        return self.ask("synchronous")[0] == 200

    def processes(self) -> list[int]:
        """Return the process ids of Patroni and PostgreSQL."""
        found = _descendants(self.process.pid) if self.process else []
        file = self.server.data / "postmaster.pid"
        with suppress(FileNotFoundError, IndexError):
            found += _descendants(int(file.read_text().splitlines()[0]))
        return [*dict.fromkeys(found)]

    def signal(self, number: int) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all processes, as when the machine is lost."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()  # Patroni stops PostgreSQL
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.kill()


@dataclass
class PatroniCluster:
    nodes: tuple[Node, ...]

    def primary(self) -> Node:
        wait_until(lambda: any(node.is_primary() for node in self.nodes), 90)
        return next(node for node in self.nodes if node.is_primary())

    def other(self, node: Node) -> Node:
        return next(other for other in self.nodes if other is not node)


@contextmanager
def patroni_cluster(home: Path) -> Iterator[PatroniCluster]:
    """Run two servers. The first one is the primary, and the second one its synchronous standby."""
    client, peer = f"http://{LOOPBACK}:{free_port()}", f"http://{LOOPBACK}:{free_port()}"
    etcd = _start(
        ["etcd", "--data-dir", f"{home}/etcd", "--listen-client-urls", client,
         "--advertise-client-urls", client, "--listen-peer-urls", peer,
         "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"],
        home / "etcd.log",
    )  # fmt: skip
    nodes = tuple(_node(home, name, client) for name in ("one", "two"))
    cluster = PatroniCluster(nodes)
    try:
        nodes[0].start()
        wait_until(nodes[0].is_primary, 90)
        nodes[1].start()
        wait_until(nodes[1].is_synchronous, 90)
        yield cluster
    finally:
        for node in nodes:
            node.stop()
        etcd.terminate()
        etcd.wait()


def _node(home: Path, name: str, etcd: str) -> Node:
    node = Node(name, Server(home / name, free_port()), free_port(), home / f"{name}.json")
    api = f"{LOOPBACK}:{node.port}"
    configuration = {
        "scope": "tiger",
        "name": name,
        "restapi": {"listen": api, "connect_address": api},
        "etcd3": {"url": etcd},
        "bootstrap": {
            "dcs": {**TIMES, "synchronous_mode": True, "postgresql": {"use_pg_rewind": True}},
            "initdb": [{"auth": "trust"}, {"encoding": "UTF8"}, {"locale": "C"}, "no-sync"],
        },
        "postgresql": {
            "listen": node.server.location,
            "connect_address": node.server.location,
            "data_dir": str(node.server.data),
            "bin_dir": str(PROGRAMS),
            "pgpass": f"{home}/{name}.pgpass",
            "authentication": {
                "superuser": {"username": "tiger_db", "password": "-"},
                "replication": {"username": "replicator", "password": "-"},
                "rewind": {"username": "tiger_db", "password": "-"},
            },
            "parameters": {
                "unix_socket_directories": "",
                "dynamic_shared_memory_type": "mmap",
                "wal_log_hints": "on",
                "wal_retrieve_retry_interval": "100ms",
            },
            "pg_hba": [
                f"host all all {LOOPBACK}/32 trust",
                f"host replication all {LOOPBACK}/32 trust",
            ],
        },
    }
    node.configuration.write_text(json.dumps(configuration))
    return node
