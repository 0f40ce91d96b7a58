"""Shared functions of the integrations: API keys, client addresses, actors and error responses."""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from math import ceil
from typing import Any, NamedTuple

from uuid_utils.compat import uuid7

from tiger_db.actor import Actor
from tiger_db.errors import (
    ConfigurationError,
    Conflict,
    InvalidAPIKey,
    RateLimited,
    RefreshLimited,
    TigerDBError,
)
from tiger_db.models.api_keys import parse_address, parse_network
from tiger_db.redaction import redact_start

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# The HTTP status of each error, by its code. docs/errors.md shows the same statuses.
STATUSES = {
    "error": 500,
    "configuration_error": 500,
    "database_unavailable": 503,
    "outcome_unknown": 500,  # 503 would ask the client to repeat an action that may be done
    "query_timeout": 503,
    "conflict": 409,
    "statement_refused": 500,
    "privilege_missing": 500,
    "schema_mismatch": 500,
    "migration_error": 500,
    "embedded_error": 500,
    "encryption_error": 500,
    "file_error": 500,
    "not_found": 404,
    "already_exists": 409,
    "missing_reference": 409,
    "invalid_value": 422,
    "invalid_fields": 422,
    "invalid_cursor": 422,
    "invalid_state": 409,
    "stale_token": 409,
    "lease_lost": 409,
    "refresh_failed": 502,
    "refresh_limited": 503,
    "credentials_refused": 502,
    "answer_lost": 502,
    "wait_timeout": 504,
    "access_denied": 403,
    # A client with a wrong key, and a client that may not use the key, get the same response.
    "invalid_api_key": 401,
    "api_key_expired": 401,
    "api_key_revoked": 401,
    "account_not_active": 401,
    "address_not_allowed": 401,
    "user_agent_not_allowed": 401,
    "account_not_allowed": 403,
    "scope_missing": 403,
    "trading_paused": 403,
    "rate_limited": 429,
}
# The name of a constraint or column at the end of a message.
_CONSTRAINT = re.compile(r" \(\w+\)$")
_VALUE = r'(?:[^\s",;=]+|"[^"\\]*")'
_FORWARDED = re.compile(rf"[\w-]+={_VALUE}(?:;[\w-]+={_VALUE})*")  # one element of `Forwarded`
_PAIR = re.compile(rf"([\w-]+)=({_VALUE})")
_NODE = re.compile(
    r"\[(?P<v6>[0-9a-f:.]+)\](?::\d{1,5})?|(?P<v4>[\d.]+)(?::\d{1,5})?|(?P<bare>[0-9a-f:.]+)",
    re.IGNORECASE,
)


class PublicError(NamedTuple):
    """The parts of an error that a client may see."""

    status: int
    code: str
    message: str
    headers: dict[str, str]


def public_error(error: TigerDBError) -> PublicError:
    """Return the parts of an error that a client may see.

    The message of an error with a status from 500 on can contain names of servers and settings, and
    the message of a `Conflict` comes from PostgreSQL, so a client sees the description of the class
    instead. All errors with the status 401 look like `InvalidAPIKey`: a thief of a key does not
    learn that the key is valid at another address.
    """
    status = STATUSES.get(error.code, 500)
    headers = {}
    if isinstance(error, RateLimited | RefreshLimited):
        headers["Retry-After"] = str(max(ceil(error.retry_after.total_seconds()), 1))
    if status == HTTPStatus.UNAUTHORIZED:
        return PublicError(
            status, InvalidAPIKey.code, str(InvalidAPIKey()), {"WWW-Authenticate": "Bearer"}
        )
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or isinstance(error, Conflict):
        message = (type(error).__doc__ or "").strip()
    else:
        message = _CONSTRAINT.sub("", str(error))
    return PublicError(status, error.code, message, headers)


def header_values(scope: Mapping[str, Any], name: str) -> list[str]:
    """Return the values of all headers of a request with the same name, which is in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name.encode()]


def raw_key_of(scope: Mapping[str, Any]) -> str:
    """Return the API key of `Authorization: Bearer` or `X-API-Key`.

    Return an empty text, which is no valid API key, if a request has no key or different keys.
    """
    keys = {key.strip() for key in header_values(scope, "x-api-key")}
    for authorization in header_values(scope, "authorization"):
        scheme, _, credentials = authorization.strip().partition(" ")
        if scheme.lower() == "bearer":
            keys.add(credentials.strip())
    return keys.pop() if len(keys) == 1 else ""


def user_agent_of(scope: Mapping[str, Any]) -> str | None:
    """Return the User-Agent of a request."""
    return next(iter(header_values(scope, "user-agent")), None)


def parse_proxies(trusted_proxies: Iterable[str]) -> tuple[Network, ...]:
    """Parse the IP addresses and networks of trusted proxies.

    Raises:
        ConfigurationError: an item is neither an IP address nor an IP network.
    """
    if isinstance(trusted_proxies, str):
        raise ConfigurationError("trusted_proxies must be a list of IP addresses and networks")
    try:
        return tuple(parse_network(proxy) for proxy in trusted_proxies)
    except ValueError as error:
        raise ConfigurationError(f"trusted_proxies: {error}") from None


def client_address(scope: Mapping[str, Any], trusted: tuple[Network, ...]) -> Address | None:
    """Return the IP address of the client of a request, or None if the address is not known.

    Each trusted proxy appends the address of its client to `X-Forwarded-For` or `Forwarded`. The
    headers are therefore read from the right, and only as far as each address is a trusted proxy.
    A client can send a header that the proxy does not set. If both headers are present and name
    different clients, or if an element that must be read is malformed, the address is not known.
    """
    host, *_ = scope.get("client") or (None,)  # servers on a Unix socket can give (None, None)
    peer = _parse_node(host) if host else None
    if peer is None or not _contains(trusted, peer):
        return peer
    chains = [
        _elements(header_values(scope, "x-forwarded-for")),
        [_forwarded_for(element) for element in _elements(header_values(scope, "forwarded"))],
    ]
    found = {_last_untrusted(peer, chain, trusted) for chain in chains if chain}
    return found.pop() if len(found) == 1 else None if found else peer


def _elements(values: list[str]) -> list[str]:
    return [element.strip() for element in ",".join(values).split(",")] if values else []


def _forwarded_for(element: str) -> str:
    """Return the node in the parameter `for` of an element of `Forwarded`, or an empty text."""
    pairs = _PAIR.findall(element) if _FORWARDED.fullmatch(element) else []
    nodes = [value.strip('"') for name, value in pairs if name.lower() == "for"]
    return nodes[0] if len(nodes) == 1 else ""


def _last_untrusted(
    peer: Address, chain: list[str], trusted: tuple[Network, ...]
) -> Address | None:
    address: Address | None = peer
    while chain and address is not None and _contains(trusted, address):
        address = _parse_node(chain.pop())
    return address


def _parse_node(text: str) -> Address | None:
    """Parse an IP address with an optional port, or return None. An IPv6 zone is not accepted."""
    match = _NODE.fullmatch(text)
    try:
        return parse_address(match["v6"] or match["v4"] or match["bare"]) if match else None
    except ValueError:
        return None


def _contains(networks: tuple[Network, ...], address: Address) -> bool:
    return any(address in network for network in networks)


def request_actor(scope: Mapping[str, Any], trusted: tuple[Network, ...]) -> Actor:
    """Return an Actor with the details of a request, and a new request id."""
    user_agent = user_agent_of(scope)
    return Actor(
        ip_address=client_address(scope, trusted),
        # Redaction of a whole long header at each audit event would stall the event loop.
        user_agent=None if user_agent is None else redact_start(user_agent),
        request_id=str(uuid7()),
        request_method=scope.get("method"),  # a WebSocket has none
        request_path=scope["path"],
    )
