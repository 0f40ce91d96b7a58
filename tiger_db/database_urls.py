"""Parsers for database URLs and lists of hosts, in the grammar of libpq.

`urllib.parse.urlsplit` is not used, because in some patch releases of Python, `urlsplit` refuses a
URL with a list of hosts. The grammar of libpq:
https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, unquote, urlencode

from tiger_db.url_parameters import check_parameters

DEFAULT_PORT = 5432
# `_SCHEME` matches the URL schemes of libpq, and SQLAlchemy's URL scheme for asyncpg.
_SCHEME = r"(?:postgres|postgresql|postgresql\+asyncpg)://"
# Unlike libpq, `_URL` refuses a password with an "@" that is not percent-encoded. If `_URL`
# accepted an "@" in a password, the text after the "@" would be parsed as a host name. Error
# messages show host names.
_URL = (
    _SCHEME + r"(?:(?P<user>[^:@/?]*)(?::(?P<password>[^@/?]*))?@)?"
    r"(?P<hosts>[^@/?]*)(?:/(?P<dbname>[^@?]*))?(?:\?(?P<query>[^@]*))?"
)
_HOST = r"(?:\[([^\[\]]+)\]|([^\[\]:]*))(?::([0-9]*))?"
# An IPv6 address without brackets, or with percent-encoded brackets, and possibly with a port.
_BARE_IPV6 = r"(?i:%5B)?[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f.:]*(?:%.*)?"
_NEEDS_BRACKETS = (
    "DATABASE_URL: write an IPv6 address in brackets that are not percent-encoded, such as"
    " [2001:db8::1]:5432"
)
_MALFORMED = "DATABASE_URL is not a valid URL: percent-encode special characters"


class Address(NamedTuple):
    """The address of a server: its host and its port.

    The host is a host name, an IP address or the absolute path of a socket folder. If the host is
    empty, clients try the usual socket folders, then localhost.
    """

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        host = self.host or "localhost"
        if ":" in host and not host.startswith("/"):
            host = f"[{host}]"
        return f"{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether the host is a socket folder, a loopback address or `localhost`.

        Host names other than `localhost` count as remote, because their addresses can change.
        """
        if not self.host or self.host.startswith("/"):
            return True
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host.lower() == "localhost"
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@dataclass(frozen=True, slots=True)
class DatabaseURL:
    """The decoded parts of a `DATABASE_URL`, which has at least one address.

    As in libpq, a host, port, user, password or database in the query string takes precedence over
    the rest of the URL. The field `parameters` has the parameters of the query string, except host,
    port, user, password and database.
    """

    addresses: tuple[Address, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: str | None = None
    parameters: dict[str, str] = field(default_factory=dict, repr=False)

    def to_text(self) -> str:
        """Return the URL with the password, in a form that `parse_url` accepts."""
        login = quote(self.user or "", safe="")
        if self.password is not None:
            login += ":" + quote(self.password, safe="")
        hosts = ",".join(f"{quote(host, safe='')}:{port}" for host, port in self.addresses)
        return (
            f"postgresql://{login}{'@' if login else ''}{hosts}"
            f"/{quote(self.database or '', safe='')}?{encode_query(self.parameters)}"
        )


def parse_url(text: str) -> DatabaseURL:
    """Parse a `DATABASE_URL`. White space and quotes around the URL are removed.

    Raises:
        ValueError: the URL is malformed, or a parameter of the URL is unknown or has an invalid
            value. The error message is one line that names DATABASE_URL and shows no value.
    """
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    if not re.match(_SCHEME, text):
        raise ValueError("DATABASE_URL must start with postgresql://")
    found = re.fullmatch(_URL, text)
    if found is None or re.search(r"[\x01-\x20\x7f]", text):  # libpq 18 also refuses spaces
        raise ValueError(_MALFORMED)
    hosts = [re.fullmatch(_HOST, host) for host in found["hosts"].split(",")]
    if not all(hosts):
        ipv6 = any(re.fullmatch(_BARE_IPV6, host) for host in found["hosts"].split(","))
        raise ValueError(_NEEDS_BRACKETS if ipv6 else _MALFORMED)
    named = [(_decode(host[1] or host[2]), "") for host in hosts if host]
    if any(host.startswith("[") for host, _ in named):
        raise ValueError(_NEEDS_BRACKETS)
    ports = [host[3] or "" for host in hosts if host]
    given = {name: _decode(found[name] or "") for name in ("user", "password", "dbname")}
    query = _parse_query(found["query"] or "")
    check_parameters(query)
    given |= query
    if mode := given.pop("ssl", ""):
        given["sslmode"] = given.get("sslmode") or ("require" if mode == "true" else mode)
    if "host" in given:
        named = [_split_port(host) for host in given.pop("host").split(",")]
    if "port" in given:
        ports = given.pop("port").split(",")
    asyncpg_name = given.pop("database", "")
    url = DatabaseURL(
        addresses=_pair("DATABASE_URL", named, ports),
        user=given.pop("user") or None,
        password=given.pop("password") or None,
        database=given.pop("dbname") or asyncpg_name or None,
        parameters={name: value for name, value in given.items() if value},
    )
    timeout = given.get("connect_timeout") or "1"
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", timeout, re.ASCII) or not float(timeout):
        raise ValueError("DATABASE_URL: connect_timeout must be a positive number of seconds")
    return url


def parse_hosts(name: str, text: str, port: int) -> tuple[Address, ...]:
    """Parse the list of hosts in the environment variable `name`, with the default port `port`.

    A text that begins with a slash is the path of one socket folder, and can contain commas.

    Raises:
        ValueError: the list of hosts is malformed. The error message is one line that names the
            environment variable.
    """
    if text.startswith("/"):
        named = [(text, "")]
    else:
        named = [_split_port(host.strip()) for host in text.split(",")]
        if not all(host for host, _ in named):
            raise ValueError(_list_error(name))
    return _pair(name, named, [str(port)])


def encode_query(parameters: dict[str, str]) -> str:
    return urlencode(parameters, quote_via=quote)


def _parse_query(text: str) -> dict[str, str]:
    """Parse a query string like libpq: the last value of a name wins, and "+" is not a space."""
    items = [item.split("=") for item in text.removesuffix("&").split("&")] if text else []
    if not all(len(item) == 2 for item in items):  # noqa: PLR2004  # each item must be a name and a value
        raise ValueError(_MALFORMED)
    return {_decode(name): _decode(value) for name, value in items}


def _decode(text: str) -> str:
    if re.search("%(?![0-9A-Fa-f]{2})", text):
        raise ValueError(_MALFORMED)
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(_MALFORMED) from None
    if "\0" in decoded:
        raise ValueError("DATABASE_URL must not contain a NUL character")
    return decoded


def _split_port(text: str) -> tuple[str, str]:
    """Split a text into a host and a port. If the text has no port, return an empty port."""
    found = None if text.startswith("/") else re.fullmatch(_HOST, text)
    host = found and (found[1] or found[2])
    return (host, found[3] or "") if found and host else (text, "")


def _pair(name: str, hosts: Sequence[tuple[str, str]], ports: Sequence[str]) -> tuple[Address, ...]:
    """Return one address per host. A host without a port gets a port from `ports`.

    The argument `ports` has either one port for all hosts, or one port per host.
    """
    if len(ports) == 1:
        ports = list(ports) * len(hosts)
    if len(ports) != len(hosts) or (len(hosts) > 1 and not all(host for host, _ in hosts)):
        raise ValueError(_list_error(name))
    numbers = [
        own or port or str(DEFAULT_PORT) for (_, own), port in zip(hosts, ports, strict=True)
    ]
    if not all(re.fullmatch(r"\d{1,5}", n, re.ASCII) and 1 <= int(n) <= 65535 for n in numbers):  # noqa: PLR2004  # TCP ports are 1 to 65535
        raise ValueError(f"{name}: a port must be a number from 1 to 65535")
    if not hasattr(socket, "AF_UNIX") and any(host.startswith("/") for host, _ in hosts):
        raise ValueError(
            f"{name}: a path is the folder of a Unix socket, which Python does not support on this"
            " system: write a host name"
        )
    return tuple(
        Address(host, int(number)) for (host, _), number in zip(hosts, numbers, strict=True)
    )


def _list_error(name: str) -> str:
    return (
        f"{name}: separate hosts by single commas,"
        " and give one port for all hosts or one port per host"
    )
