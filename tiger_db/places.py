"""Where servers are: hosts, ports and URLs, as people write them."""

import re
from enum import StrEnum
from urllib.parse import parse_qsl, unquote, urlsplit

# What libpq calls itself besides the asyncpg form that SQLAlchemy users write.
SCHEME = re.compile(r"^(postgres|postgresql|postgresql\+asyncpg)://", re.ASCII)
_NOT_A_URL = "DATABASE_URL is not a valid URL: percent-encode its parts"
_HOST = r"(?:\[[^\[\]@]*\]|[^\[\]@:,]*)(?::\d{1,5})?"
_HOSTS = re.compile(f"{_HOST}(?:,{_HOST})*", re.ASCII)
# A host with its port; what is neither this nor a folder is an IPv6 address.
_PLACE = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::(\d{1,5}))?", re.ASCII)
_SSL_PARAMETERS = {"sslmode", "sslrootcert", "sslcert", "sslkey"}
# Passed on by asyncpg itself; anything else in a URL's query would become a server setting.
_URL_PARAMETERS = _SSL_PARAMETERS | {
    "host", "port", "user", "password", "database", "dbname", "passfile", "application_name",
    "connect_timeout", "options", "target_session_attrs", "sslcrl", "sslpassword",
    "sslnegotiation", "ssl_min_protocol_version", "ssl_max_protocol_version",
}  # fmt: skip


class SSLMode(StrEnum):
    """https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


def check_url(text: str) -> None:
    """Raise ValueError, which quotes nothing, for what is not a good `DATABASE_URL`."""
    if not SCHEME.match(text):
        raise ValueError("DATABASE_URL must start with postgresql://")
    if "\0" in unquote(text):
        raise ValueError("DATABASE_URL must not contain a NUL character")
    try:
        url = urlsplit(text)
        query = dict(parse_qsl(url.query, strict_parsing=True)) if url.query else {}
    except ValueError:
        raise ValueError(_NOT_A_URL) from None
    login, _, hosts = url.netloc.rpartition("@")
    # Of a password that is not percent-encoded, a part would pass for a host, and be shown.
    if "#" in text or "@" in login + url.path + url.query or not _HOSTS.fullmatch(hosts):
        raise ValueError(_NOT_A_URL)
    ports = [*re.findall(r":(\d+)(?:,|$)", hosts), *query.get("port", "1").split(",")]
    if not all(re.fullmatch(r"\d{1,5}", port) and 1 <= int(port) <= 65535 for port in ports):  # noqa: PLR2004  # TCP's
        raise ValueError("DATABASE_URL: a port must be a number from 1 to 65535")
    hosts_in_url(url.netloc, query)
    if unknown := sorted(query.keys() - _URL_PARAMETERS):
        raise ValueError(f"DATABASE_URL has an unknown parameter: {', '.join(unknown)}")
    if "sslmode" in query and query["sslmode"] not in list(SSLMode):
        raise ValueError(f"DATABASE_URL: sslmode must be one of {', '.join(SSLMode)}")
    timeout = query.get("connect_timeout", "1")
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", timeout, re.ASCII) or not float(timeout):
        raise ValueError("DATABASE_URL: connect_timeout must be a positive number of seconds")


def hosts_in_url(netloc: str, query: dict[str, str]) -> list[tuple[str, int]]:
    """The hosts of a URL, if it lists several."""
    named = netloc.rpartition("@")[2]
    listed = named or query.get("host", "")
    if "," not in listed or unquote(listed).startswith("/"):
        return []
    hosts = hosts_in("DATABASE_URL", listed, query.get("port", "5432"))
    return [(unquote(host) if named else host, port) for host, port in hosts]


def hosts_in(name: str, text: str, default: str) -> list[tuple[str, int]]:
    """The hosts of a list, with their ports. What begins with a slash is one folder, all of it.

    Raises:
        ValueError: it names the variable.
    """
    if "," not in text or text.startswith("/"):
        texts = [text]
    else:
        texts = [part.strip() for part in text.split(",")]
    ports = default.split(",")
    if len(ports) == 1:
        ports *= len(texts)
    if not all(texts) or len(ports) != len(texts):
        raise ValueError(f"{name}: hosts are separated by one comma each, ports are one or as many")
    hosts = []
    for place, port in zip(texts, ports, strict=True):
        found = None if place.startswith("/") else _PLACE.fullmatch(place)
        host, number = (
            (found[1] or found[2], int(found[3] or port)) if found else (place, int(port))
        )
        if not 1 <= number <= 65535:  # noqa: PLR2004  # TCP's
            raise ValueError(f"{name}: a port must be a number from 1 to 65535")
        hosts.append((host, number))
    return hosts
