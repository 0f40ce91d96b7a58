"""Fake gateway that records the SDK's requests and checks their signatures."""

import base64
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA1
from tigeropen.tiger_open_config import TigerOpenClientConfig

from tests.support.private_keys import KEY


class Gateway(HTTPServer):
    """Accepts requests that are signed with KEY, and records all requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/gateway"


class Answers(BaseHTTPRequestHandler):
    server: Gateway

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked.copy())
        self.server.headers.append(self.headers["Authorization"])
        sign = asked.pop("sign")
        # All parameters by name, joined by `&` (tigeropen 3.8.0, `get_sign_content`).
        content = "&".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for name, value in sorted(asked.items())
        )
        answer = {"code": 0} if signed(sign, content) else {"code": 1000}
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def signed(signature: str, content: str) -> bool:
    """Return whether KEY has signed the content."""
    try:
        KEY.public_key().verify(
            base64.b64decode(signature),
            content.encode(),
            PKCS1v15(),
            SHA1(),
        )
    except InvalidSignature:
        return False
    return True


def loaded(folder: Path) -> Any:
    """Return the SDK's configuration from the files of a folder."""
    return TigerOpenClientConfig(enable_dynamic_domain=False, props_path=str(folder))
