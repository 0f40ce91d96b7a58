"""URLs and lists of hosts have the meaning of libpq."""

import re
from ipaddress import IPv6Address
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from psycopg import OperationalError, pq

from tests.support.refused_settings import SECRET
from tiger_db.database_urls import Address, DatabaseURL, parse_hosts, parse_url

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
NAMES = st.from_regex(r"[a-z0-9_-]{1,8}(\.[a-z0-9é-]{1,8}){0,2}", fullmatch=True)
FOLDERS = TEXTS.map(lambda name: f"/{name.replace(',', ';')}")  # which libpq takes for a list
ZONES = st.sampled_from(["", "%eth0", "%25", "%1", "%en 1"])
IPV6 = st.builds("{}{}".format, st.ip_addresses(v=6), ZONES)
HOSTS = NAMES | st.ip_addresses(v=4).map(str) | IPV6 | FOLDERS
PORTS = st.integers(1, 65535).map(str)


def by_libpq(text: str) -> DatabaseURL | None:
    """The URL as libpq itself parses it; None: it refuses."""
    try:
        options = pq.Conninfo.parse(text.encode())
    except OperationalError:
        return None
    given = {o.keyword.decode(): o.val.decode() for o in options if o.val}  # an empty one is unset
    hosts = given.pop("host", "").split(",")
    ports = given.pop("port", "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    return DatabaseURL(
        tuple(Address(host, int(port or 5432)) for host, port in zip(hosts, ports, strict=True)),
        given.pop("user", None),
        given.pop("password", None),
        given.pop("dbname", None),
        given,
    )


@st.composite
def urls(draw: st.DrawFn) -> str:
    """URLs that libpq accepts, with a port of each host, of all, or of none."""

    def encoded(text: str, safe: str = "") -> str:
        return quote(text, safe=draw(st.sampled_from(["", safe])))

    def authority(host: str, port: str | None) -> str:
        named = (
            f"[{encoded(host, ':')}]" if ":" in host and host[0] != "/" else encoded(host, "-._é")
        )
        return named if port is None else f"{named}:{port}"

    login = ""
    if draw(st.booleans()):
        login = encoded(draw(TEXTS), "!$&'()*+,;=[]#")
        if draw(st.booleans()):
            login += ":" + encoded(draw(TEXTS), "!$&'()*+,;=:[]#")
        login += "@"
    hosts = draw(st.lists(st.tuples(HOSTS, st.none() | st.just("") | PORTS), max_size=4))
    path = draw(st.just("") | TEXTS.map(lambda name: "/" + encoded(name, "/:+,#")))
    query = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "user": TEXTS, "password": TEXTS, "dbname": TEXTS, "application_name": TEXTS,
                "sslrootcert": FOLDERS, "sslmode": st.sampled_from(["require", "verify-full"]),
                "connect_timeout": st.integers(1, 9999).map(str), "port": PORTS,
            },
        )
    )  # fmt: skip
    if draw(st.booleans()):
        others = draw(st.lists(NAMES | FOLDERS, min_size=len(hosts) or 1, max_size=len(hosts) or 1))
        query["host"] = ",".join(others)
    items = "&".join(f"{name}={encoded(value, '/:+,#')}" for name, value in query.items())
    scheme = draw(st.sampled_from(["postgres", "postgresql"]))
    return f"{scheme}://{login}{','.join(authority(*host) for host in hosts)}{path}?{items}"


@given(text=urls())
@example(text="postgresql://u:p@h1:1,[fd00::1]:2,[fe80::1%25eth0],h4/d?sslmode=require")
@example(text="postgresql://u@localhost:5433/d?host=/cloudsql/one")
@example(text="postgresql://h1:1,h2:2/d?port=3")
@example(text="postgresql://h/d?options=-csearch_path%3Dx+y&user=u&user=v&password=")
@pytest.mark.slow
def test_a_url_has_the_meaning_of_libpq(text: str) -> None:
    expected = by_libpq(text)
    assert expected is not None
    url = parse_url(text)
    assert url == expected
    assert by_libpq(url.to_text()) == parse_url(url.to_text()) == url


TOKENS = [
    *"@:/?&=,[]#+% \n", "u", "h", "1", "5433", "::1", "%41", "%2F", "%3A", "%40", "%ff", "é",
    "host=", "port=", "user=", "password=", "dbname=", "sslmode=require",
]  # fmt: skip


@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=14))
@example(tokens=["h", "?", "user=", "u", "&"])
@example(tokens=["h", "?", "&", "user=", "u"])
@example(tokens=["u", ":", "@", "h"])
@example(tokens=["h", "/", "/", "h"])
@example(tokens=["[", "::1", "]", "h"])
@example(tokens=["?", "="])
@example(tokens=["u", ":", "1", "@", "h", ":", "1", "?", "host=", "&", "port=", "&", "user="])
def test_each_accepted_url_has_the_same_meaning_for_libpq(tokens: list[str]) -> None:
    text = f"postgresql://{''.join(tokens)}"
    assume(not re.search(r"host=[^&]*(:|%3A|\[)", text))  # SQLAlchemy's form, which libpq lacks
    text = text.strip()
    try:
        url = parse_url(text)
    except ValueError:
        return
    assert url == by_libpq(text)


@given(host=HOSTS, port=PORTS)
def test_sqlalchemy_s_form_of_a_list_of_hosts_is_accepted(host: str, port: str) -> None:
    named = f"[{host}]" if ":" in host and host[0] != "/" else host
    own = "" if host[0] == "/" else f":{port}"
    text = f"postgresql+asyncpg:///d?host=h1,{quote(named + own)}&port=9"
    expected = Address(host, int(port) if own else 9)
    assert parse_url(text).addresses == (("h1", 9), expected)
    if host[0] != "/":
        assert parse_hosts("DB_HOST", f"h1, {named}{own}", 9) == (("h1", 9), expected)
    else:
        assert parse_hosts("DB_HOST", host, 9) == (expected,)


@given(address=st.ip_addresses(v=6), zone=ZONES)
def test_an_ipv6_address_needs_brackets_in_a_url_only(address: IPv6Address, zone: str) -> None:
    host = f"{address}{zone}"
    assert parse_hosts("DB_HOST", host, 5433) == ((host, 5433),)
    assert parse_url(f"postgresql:///d?host={quote(host)}").addresses == ((host, 5432),)
    for written in (quote(host, safe=":"), f"u:p@{quote(host, safe=':')}:5432", quote(f"[{host}]")):
        with pytest.raises(ValueError, match="write an IPv6 address in brackets"):
            parse_url(f"postgresql://{written}/d")


@given(host=HOSTS, port=st.integers(1, 65535))
def test_an_address_as_text_names_the_host_and_ends_with_the_port(host: str, port: int) -> None:
    text = str(Address(host, port))
    assert text.endswith(f":{port}")
    if host[0] != "/":
        assert parse_hosts("DB_HOST", text, 1) == ((host, port),)


@pytest.mark.parametrize(
    "host", ["", "/run", "localhost", "LOCALHOST", "127.1.2.3", "::1", "::ffff:127.0.0.1"]
)
def test_a_local_address_is_recognized(host: str) -> None:
    assert Address(host).is_local


@given(host=st.ip_addresses().filter(lambda ip: not ip.is_loopback).map(str) | NAMES)
def test_a_remote_address_is_recognized(host: str) -> None:
    assert Address(host).is_local == (host == "localhost")


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://u:{SECRET}@x@h/d",
        f"postgresql://u:1/{SECRET}@h/d",
        f"postgresql://u:1?{SECRET}=@h/d",
        f"postgresql://h/d?password=x@{SECRET}",
        f"postgresql://u:{SECRET}%4@h/d",
        f"postgresql://u:{SECRET}%ff@h/d",
        f"postgresql://u:{SECRET} @h/d",
        f"postgresql://u:{SECRET}@h/d\nx",
        f"postgresql://u:{SECRET}@[::1/d",
        f"postgresql://u:{SECRET}@[::1]h/d",
        f"postgresql://u:{SECRET}@h/d?user",
        f"postgresql://u:{SECRET}@h/d?user=a=b",
    ],
)
def test_an_ambiguous_list_of_hosts_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"^DATABASE_URL is not a valid URL") as caught:
        parse_url(text)
    assert SECRET not in str(caught.value)


def test_a_parsed_url_shows_no_password() -> None:
    text = f"postgresql://u:{SECRET}@h/d?sslpassword={SECRET}"
    assert SECRET not in f"{parse_url(text)} {parse_url(text)!r}"
