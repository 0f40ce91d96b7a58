import inspect
import re
import subprocess
import sys
from datetime import timedelta
from http import HTTPStatus

import pytest

from tests.docs.pages import PAGES
from tiger_db import errors
from tiger_db.errors import ConfigurationError, RateLimited, RefreshLimited, TigerDBError
from tiger_db.integrations.http import (
    STATUSES,
    client_address,
    parse_proxies,
    public_error,
    raw_key_of,
    request_actor,
)

CLASSES = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, TigerDBError)
]
TRUSTED = parse_proxies(["10.0.0.0/8", "2001:db8::1"])
INTERNAL = "SELECT secret FROM db.internal:5432"


def scope_of(peer: str | None, **headers: list[str]) -> dict[str, object]:
    names = ((name.replace("_", "-"), values) for name, values in headers.items())
    return {
        "client": (peer, 4711) if peer is not None else None,
        "headers": [(n.encode(), v.encode("latin-1")) for n, values in names for v in values],
    }


@pytest.mark.parametrize(
    ("peer", "headers", "expected"),
    [
        # Without a trusted proxy, no header counts.
        ("192.0.2.1", {"x_forwarded_for": ["198.51.100.1"]}, "192.0.2.1"),
        ("192.0.2.1", {"forwarded": ["for=198.51.100.1"]}, "192.0.2.1"),
        ("10.0.0.1", {}, "10.0.0.1"),
        (None, {"x_forwarded_for": ["198.51.100.1"]}, None),
        ("testclient", {"x_forwarded_for": ["198.51.100.1"]}, None),
        # The headers are read from the right, up to the first address that is no trusted proxy.
        ("10.0.0.1", {"x_forwarded_for": ["203.0.113.9, 198.51.100.1"]}, "198.51.100.1"),
        (
            "10.0.0.1",
            {"x_forwarded_for": ["203.0.113.9", "198.51.100.1, 10.0.0.2"]},
            "198.51.100.1",
        ),
        ("10.0.0.1", {"x_forwarded_for": ["evil, 198.51.100.1:80"]}, "198.51.100.1"),
        ("::ffff:10.0.0.1", {"x_forwarded_for": ["::ffff:198.51.100.1"]}, "198.51.100.1"),
        ("2001:db8::1", {"x_forwarded_for": ["[2001:db8::2]:80"]}, "2001:db8::2"),
        ("10.0.0.1", {"x_forwarded_for": ["10.0.0.3, 10.0.0.2"]}, "10.0.0.3"),
        ("10.0.0.1", {"forwarded": ["for=x, For=198.51.100.1;proto=https"]}, "198.51.100.1"),
        ("10.0.0.1", {"forwarded": ['for="[2001:db8::2]:80";by=10.0.0.1']}, "2001:db8::2"),
        ("10.0.0.1", {"forwarded": ['for="evil, for=198.51.100.1']}, "198.51.100.1"),
        # Nothing malformed is trusted, and no address behind it.
        ("10.0.0.1", {"x_forwarded_for": ["198.51.100.1, "]}, None),
        ("10.0.0.1", {"x_forwarded_for": [""]}, None),
        ("10.0.0.1", {"x_forwarded_for": ["198.51.100.1, evil"]}, None),
        ("10.0.0.1", {"x_forwarded_for": ["198.51.100.1, 10.0.0.2, 1.2.3.4.5"]}, None),
        ("10.0.0.1", {"x_forwarded_for": ["198.51.100.1 203.0.113.9"]}, None),
        ("10.0.0.1", {"x_forwarded_for": ["fe80::1%eth0"]}, None),
        ("10.0.0.1", {"forwarded": ["for=unknown"]}, None),
        ("10.0.0.1", {"forwarded": ["for=198.51.100.1;for=203.0.113.9"]}, None),
        ("10.0.0.1", {"forwarded": ['host="x;for=198.51.100.1"']}, None),
        ("10.0.0.1", {"forwarded": ["198.51.100.1"]}, None),
        # A client can send the header that the proxy does not set.
        (
            "10.0.0.1",
            {"x_forwarded_for": ["198.51.100.1"], "forwarded": ["for=203.0.113.9"]},
            None,
        ),
        (
            "10.0.0.1",
            {"x_forwarded_for": ["198.51.100.1"], "forwarded": ["for=198.51.100.1"]},
            "198.51.100.1",
        ),
    ],
)
def test_the_address_of_a_client_behind_proxies(
    peer: str | None, headers: dict[str, list[str]], expected: str | None
) -> None:
    address = client_address(scope_of(peer, **headers), TRUSTED)
    assert (None if address is None else str(address)) == expected
    alone = client_address(scope_of(peer, **headers), ())
    assert alone == client_address(scope_of(peer), ())


@pytest.mark.parametrize("client", [None, (), (None, None), ("", 0), ["testclient", 1]])
def test_a_request_without_an_address(client: object) -> None:
    assert client_address({"client": client, "headers": []}, TRUSTED) is None


@pytest.mark.parametrize("proxies", ["10.0.0.1", ["10.0.0.1/8"], ["proxy.example"]])
def test_wrong_proxies_are_refused(proxies: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="trusted_proxies"):
        parse_proxies(proxies)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, ""),
        ({"authorization": ["Bearer a"]}, "a"),
        ({"authorization": ["bearer  a "]}, "a"),
        ({"x_api_key": ["a"]}, "a"),
        ({"authorization": ["Bearer a"], "x_api_key": ["a"]}, "a"),
        ({"authorization": ["Basic b"], "x_api_key": ["a"]}, "a"),
        ({"authorization": ["a"]}, ""),
        ({"authorization": ["Bearer a"], "x_api_key": ["b"]}, ""),
        ({"authorization": ["Bearer a", "Bearer b"]}, ""),
        ({"x_api_key": ["a", "b"]}, ""),
    ],
)
def test_the_key_of_a_request(headers: dict[str, list[str]], expected: str) -> None:
    assert raw_key_of(scope_of("192.0.2.1", **headers)) == expected


def test_each_error_has_a_status_and_the_page_of_errors_shows_it() -> None:
    assert STATUSES.keys() == {kind.code for kind in CLASSES}
    rows = re.findall(r"^\| `\w+` \| `(\w+)` \| (\d+) \|", PAGES["docs/errors.md"], re.MULTILINE)
    assert {code: int(status) for code, status in rows} | {"error": 500} == STATUSES


def made(kind: type[TigerDBError]) -> TigerDBError:
    if kind is errors.InvalidFields:
        return errors.InvalidFields.of("function", [])
    if issubclass(kind, RateLimited | RefreshLimited):
        return kind(INTERNAL, retry_after=timedelta(seconds=1.2))
    if kind is errors.TradingPaused:
        return errors.TradingPaused(reason="stop")
    return kind(INTERNAL)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_client_sees_no_internal_text(kind: type[TigerDBError]) -> None:
    error = made(kind)
    shown = public_error(error)
    assert shown.message
    if shown.status == HTTPStatus.UNAUTHORIZED:
        assert (shown.code, shown.message) == ("invalid_api_key", "The API key is not valid.")
        assert shown.headers == {"WWW-Authenticate": "Bearer"}
    elif shown.status >= 500 or kind is errors.Conflict:
        assert (shown.code, shown.message) == (kind.code, kind.__doc__)
    else:
        assert (shown.code, shown.message) == (kind.code, str(error))
    limited = issubclass(kind, RateLimited | RefreshLimited)
    assert shown.headers.get("Retry-After") == ("2" if limited else None)


def test_a_client_sees_no_name_of_a_constraint() -> None:
    error = errors.AlreadyExists("an account with this number already exists (uq_accounts_number)")
    assert public_error(error).message == "an account with this number already exists"


def test_an_error_of_an_application_has_the_status_of_its_base() -> None:
    class OrderUnknown(errors.NotFound):
        """No such order."""

    class Other(TigerDBError):
        code = "other"

    assert public_error(OrderUnknown()).status == 404
    assert public_error(Other(INTERNAL)).status == 500


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), [("fastapi", "FastAPI"), ("mcp", "the MCP SDK")])
def test_without_its_extra_an_integration_says_what_to_install(name: str, what: str) -> None:
    program = f"""
import sys
import tiger_db, tiger_db.integrations.http
assert not {{"fastapi", "starlette", "mcp", "fastmcp"}} & sys.modules.keys()
sys.modules[{name!r}] = None  # as if it was not installed
try:
    import tiger_db.integrations.{name}
except ImportError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    needs = f"tiger_db.integrations.{name} needs {what}: install tiger_db with the extra `{name}`"
    assert (run.stdout, run.stderr) == (f"{needs}\n", "")


def test_a_long_user_agent_is_shortened_before_it_is_recorded() -> None:
    agent = b"http://a:b@" * 100_000
    scope = {"type": "http", "path": "/", "headers": [(b"user-agent", agent)]}
    found = request_actor(scope, ()).user_agent
    assert found is not None
    assert len(found) <= 200
    assert "a:b@" not in found
