"""Fake Tiger gateway that replaces access tokens and fails as a test plans.

Small tests run the gateway in a thread. `python -m tests.support.refresh_gateway` runs it in a
process of its own, which receives its accounts and reports its state over HTTP.
"""

import base64
import json
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.serialization import load_pem_public_key

DAY = 86_400_000  # milliseconds
LIMIT_TEXT = "rate limit error(current limiting interface: user_token_refresh)"
# Answers in place of a new token: HTTP status and body.
ANSWERS: dict[str, tuple[int, bytes]] = {
    "limited 5": (200, b'{"code": 5, "message": "too often"}'),
    "limited 429": (429, b"slow down"),
    "limited 4": (200, json.dumps({"code": 4, "message": LIMIT_TEXT}).encode()),
    "forbidden": (200, b'{"code": 4, "message": "access forbidden"}'),
    "refused": (200, b'{"code": 1000, "message": "common param error(sign check failed)"}'),
    "denied": (200, b'{"code": 4000, "message": "permission denied"}'),
    "unauthorized": (401, b"no"),
    "server error": (200, b'{"code": 1, "message": "server error"}'),
    "timeout": (200, b'{"code": 2, "message": "timeout"}'),
    "HTTP 500": (500, b"oops"),
    "HTTP 404": (404, b"nothing here"),
    "nonsense": (200, b"<html>\xff\xfe"),
    "no object": (200, b"[1, 2]"),
    "no code": (200, b'{"message": "hello"}'),
    "no token": (200, b'{"code": 0, "data": {}}'),
    "other": (200, b'{"code": 1010, "message": "biz param error"}'),
}


@dataclass
class Refresh:
    """One request to the gateway. Times are those of `time.time`."""

    tiger_id: str
    worker: str  # the last part of the path
    token: str | None  # token of the request
    start: float
    outcome: str = "in flight"
    made: str | None = None
    end: float | None = None


@dataclass
class Known:
    """State of one account at the gateway."""

    token: str | None
    last: int = 0  # generation time of the newest token, epoch milliseconds
    in_flight: int = 0
    most: int = 0  # maximum of `in_flight`
    plan: deque[str] = field(default_factory=deque)


def make_token(generated: int, lasting: int = 30 * DAY) -> str:
    """Make a token in Tiger's format; both times are in milliseconds."""
    return base64.b64encode(f"{generated},{generated + lasting}".encode() + os.urandom(16)).decode()


def due_token() -> str:
    """Make a token that was generated a month ago and expires in ten minutes."""
    return make_token(round(time.time() * 1000) - 30 * DAY + 600_000)


@dataclass(frozen=True)
class Odds:
    """Probabilities of random faults, from 0 to 1. A slow answer takes up to `seconds`."""

    slow: float = 0.0
    seconds: float = 0.0
    drop_before: float = 0.0
    drop_after: float = 0.0
    limited: float = 0.0


class Gateway(ThreadingHTTPServer):
    """Fake gateway. The plan of a `tiger_id` determines the answers to its next requests."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, key: RSAPublicKey, odds: Odds | None = None, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.key = key
        self.odds = odds or Odds()
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.known: dict[str, Known] = {}
        self.refreshes: list[Refresh] = []
        self.gates: dict[str, threading.Event] = defaultdict(threading.Event)
        self.arrived = threading.Condition(self.lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/gateway"

    def add(self, tiger_id: str, token: str | None = None) -> str:
        """Add an account; return its token."""
        token = token or due_token()
        with self.lock:
            self.known[tiger_id] = Known(token)
        return token

    def plan(self, tiger_id: str, *what: str) -> None:
        """Plan the next answers: names in ANSWERS, or those that `Answers.answer` handles."""
        self.known[tiger_id].plan.extend(what)

    def of(self, tiger_id: str) -> list[Refresh]:
        with self.lock:
            return [refresh for refresh in self.refreshes if refresh.tiger_id == tiger_id]

    def wait_for(self, count: int, seconds: float = 10) -> None:
        """Wait until this many requests have arrived."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.refreshes) >= count, seconds)

    def state(self) -> dict[str, Any]:
        with self.lock:
            return {
                "tokens": {tiger_id: known.token for tiger_id, known in self.known.items()},
                "most": {tiger_id: known.most for tiger_id, known in self.known.items()},
                "refreshes": [asdict(refresh) for refresh in self.refreshes],
            }

    def decide(self, known: Known) -> list[str]:
        """Choose the outcome of a request."""
        if known.plan:
            return known.plan.popleft().split(" then ")
        odds, what = self.odds, []
        if self.random.random() < odds.slow:
            when = self.random.choice(["slow before", "slow after"])
            what.append(f"{when} {self.random.random() * odds.seconds:.3f}")
        chance = self.random.random()
        for name, share in (
            ("drop before", odds.drop_before),
            ("drop after", odds.drop_after),
            ("limited 5", odds.limited),
        ):
            if chance < share:
                return [*what, name]
            chance -= share
        return what

    def replace(self, known: Known, came: str | None) -> str | None:
        """Replace the current token; return the new one, or None if `token` is not current."""
        with self.lock:
            if known.token != came:
                return None
            known.last = max(known.last + 1, round(time.time() * 1000))
            known.token = make_token(known.last)
            return known.token


class Answers(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        self.say(200, json.dumps(self.server.state()).encode())

    def do_PUT(self) -> None:
        for tiger_id, token in json.loads(self.body()).items():
            self.server.add(tiger_id, token)
        self.say(200, b"{}")

    def do_PATCH(self) -> None:
        """End the random faults."""
        self.server.odds = Odds()
        self.say(200, b"{}")

    def do_POST(self) -> None:
        gateway = self.server
        try:
            asked = json.loads(self.body())
        except ValueError:  # the client was killed
            self.close_connection = True
            return
        sign = asked.pop("sign")
        # All parameters by name, joined by `&` (tigeropen 3.8.0, `get_sign_content`).
        content = "&".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for name, value in sorted(asked.items())
        )
        refresh = Refresh(
            asked["tiger_id"], self.path.rpartition("/")[2], self.headers["Authorization"],
            time.time(),
        )  # fmt: skip
        with gateway.arrived:
            known = gateway.known.setdefault(refresh.tiger_id, Known(None))
            known.in_flight += 1
            known.most = max(known.most, known.in_flight)
            gateway.refreshes.append(refresh)
            what = gateway.decide(known)
            gateway.arrived.notify_all()
        fine = asked["method"] == "user_token_refresh" and self.signed(sign, content)
        answer = self.answer(refresh, known, what) if fine else "refused"
        with gateway.lock:
            known.in_flight -= 1
            refresh.outcome, refresh.end = answer, time.time()
        if answer.startswith("drop"):
            # A reset, as if the machine failed.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif answer == "new token":
            self.say(200, json.dumps({"code": 0, "data": {"token": refresh.made}}).encode())
        else:
            self.say(*ANSWERS[answer])

    def answer(self, refresh: Refresh, known: Known, what: list[str]) -> str:
        """Answer as planned; return the outcome: new token, drop before or after, or an answer."""
        gateway, after = self.server, []
        for step in what:
            if step.startswith("slow before "):
                time.sleep(float(step.rpartition(" ")[2]))
            elif step == "gate":
                gateway.gates[refresh.tiger_id].wait(30)
            elif step.startswith("slow after ") or step in {"gate after", "drop after"}:
                after.append(step)
            else:
                return step
        refresh.made = gateway.replace(known, refresh.token)
        if refresh.made is None:
            return "refused"
        for step in after:
            if step == "drop after":
                return step
            if step == "gate after":
                gateway.gates[refresh.tiger_id].wait(30)
            else:
                time.sleep(float(step.rpartition(" ")[2]))
        return "new token"

    def signed(self, signature: str, content: str) -> bool:
        try:
            self.server.key.verify(
                base64.b64decode(signature), content.encode(), PKCS1v15(), SHA1()
            )
        except InvalidSignature:
            return False
        return True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def say(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            self.close_connection = True  # the client is gone

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def serving(key: RSAPublicKey) -> Iterator[Gateway]:
    """Run a gateway in a thread."""
    with Gateway(key) as gateway:
        thread = threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield gateway
        finally:
            for gate in gateway.gates.values():
                gate.set()
            gateway.shutdown()
            thread.join()


def state_of(url: str) -> dict[str, Any]:
    """Return the state of a gateway in another process."""
    with urlopen(url, timeout=60) as answer:
        return dict(json.load(answer))


def tell(url: str, method: str, body: object = None) -> None:
    """Send a command: PUT adds accounts and tokens, PATCH ends the random faults."""
    with urlopen(Request(url, json.dumps(body).encode(), method=method), timeout=60) as answer:
        answer.read()


def outcomes(refreshes: list[dict[str, Any]]) -> Counter[str]:
    return Counter(refresh["outcome"] for refresh in refreshes)


def main() -> None:
    """Serve until standard input ends. Its first line has the key and the odds."""
    given = json.loads(sys.stdin.readline())
    key = load_pem_public_key(given["key"].encode())
    assert isinstance(key, RSAPublicKey)
    with Gateway(key, Odds(**given["odds"]), given["seed"]) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        sys.stdout.write(f"{gateway.url}\n")
        sys.stdout.flush()
        sys.stdin.read()
        gateway.shutdown()


if __name__ == "__main__":
    main()
