"""Parameters of a DATABASE_URL, as providers and other libraries write them."""

import re
from pathlib import Path

import pytest
from psycopg import pq

from tests.support.refused_settings import SECRET, refused
from tiger_db.settings import Settings
from tiger_db.url_parameters import PARAMETERS

PAGE = Path(__file__).parents[1] / "docs/settings.md"
# The parameters that SQLAlchemy and asyncpg accept in a URL besides those of libpq.
OTHERS = {"prepared_statement_cache_size", "statement_cache_size", "ssl", "timeout"}
ROWS = {name: row for row in PARAMETERS for name in row.names}


def url(**parameters: str) -> str:
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    return f"postgresql://u:{SECRET}@db.example/d?{query}"


def test_the_page_lists_the_parameters() -> None:
    listed = re.findall(
        r"^\| (`.+?) \| (honoured|ignored|refused) \| (.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    expected = [
        (
            ", ".join(f"`{name}`" for name in row.names),
            row.use,
            row.note + (f" ({', '.join(row.values)})" if row.values else ""),
        )
        for row in PARAMETERS
    ]
    assert listed == expected


def test_each_parameter_is_listed_once_and_all_of_libpq_are() -> None:
    assert len(ROWS) == sum(len(row.names) for row in PARAMETERS)
    of_libpq = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    assert of_libpq | OTHERS <= ROWS.keys() | {"authtype", "tty"}


@pytest.mark.parametrize("name", ROWS)
def test_a_parameter_is_accepted_or_refused_in_one_line(name: str) -> None:
    row = ROWS[name]
    if row.use == "refused":
        message = refused(database_url=url(**{name: SECRET}))
        assert message == f"DATABASE_URL: {name} is not supported: {row.note.replace('`', '')}"
        return
    tls = {"sslmode": "verify-full", "sslrootcert": "system"}
    samples = {"port": "1", "connect_timeout": "3"}
    for value in row.values or (samples.get(name, "1"),):
        if name in {"ssl", "sslmode"}:
            assert Settings(database_url=url(**{name: value})).tls["sslmode"] == (
                "require" if value == "true" else value
            )
            continue
        chosen = Settings(database_url=url(**{**tls, name: value}))
        assert chosen.connect_args()["host"]
    if row.values:
        message = refused(database_url=url(**{name: SECRET}))
        assert message.startswith(f"DATABASE_URL: {name} must be ")
        assert SECRET not in message
        assert all(value in message for value in row.values)


@pytest.mark.parametrize(
    ("text", "tls", "pooler"),
    [
        # As the providers print them, with a password in place of theirs.
        (
            (
                "postgresql://u:p@ep-a-b-1-pooler.eu-central-1.aws.neon.tech/neondb?sslmode=verify-full&sslrootcert=system&channel_binding=require"
            ),
            {"sslmode": "verify-full", "sslrootcert": "system"},
            False,
        ),
        ("postgresql://u:p@ep-a.neon.tech/d?sslmode=require", {"sslmode": "require"}, False),
        (
            (
                "postgresql://postgres.ref:p@aws-0-eu-central-1.pooler.supabase.com:6543/postgres?pgbouncer=true"
            ),
            {},
            True,
        ),
        (
            (
                "postgres://postgres.ref:p@aws-0-eu.pooler.supabase.com:6543/postgres?sslmode=require&supa=base-pooler.x"
            ),
            {"sslmode": "require"},
            False,
        ),
        ("postgres://u:p@ec2-1-2-3-4.compute-1.amazonaws.com:5432/d", {}, False),
        (
            "postgresql://u:p@x.rds.amazonaws.com:5432/d?sslmode=verify-full&sslrootcert=/b.pem",
            {"sslmode": "verify-full", "sslrootcert": "/b.pem"},
            False,
        ),
        ("postgresql://u:p@/d?host=/cloudsql/a:b:c", {}, False),
        ("postgresql+asyncpg://u:p@h/d?ssl=verify-full", {"sslmode": "verify-full"}, False),
        ("postgresql://u:p@h/d?ssl=true", {"sslmode": "require"}, False),
        (
            (
                "postgresql://u:p@h/d?sslmode=require&ssl=true&uselibpqcompat=true&gssencmode=disable&keepalives=1&keepalives_idle=30&client_encoding=utf8"
            ),
            {"sslmode": "require"},
            False,
        ),
        ("postgresql://u:p@h/d?sslmode=verify-full&ssl=true", {"sslmode": "verify-full"}, False),
        ("postgresql://u:p@h/d?sslrootcert=system", {"sslmode": "verify-full"}, False),
    ],
)
@pytest.mark.parametrize("around", ["{}", " {}\n", '"{}"', "'{}'", " '{}' "])
def test_a_pasted_url_is_accepted(
    text: str, tls: dict[str, str], around: str, *, pooler: bool
) -> None:
    chosen = Settings(database_url=around.format(text))
    assert chosen.location == Settings(database_url=text).location
    assert tls.items() <= chosen.tls.items()
    assert chosen.uses_pooler == pooler
    arguments = chosen.connect_args()
    assert (arguments["password"](), arguments["target_session_attrs"]) == ("p", "read-write")


@pytest.mark.parametrize(
    ("parameters", "advice"),
    [
        ({"channel_binding": "require"}, "write sslmode=verify-full&sslrootcert=system"),
        (
            {"sslmode": "require", "channel_binding": "require"},
            "write sslmode=verify-full&sslrootcert=system",
        ),
        ({"gssencmode": "require"}, "must be one of disable, prefer, because asyncpg has no"),
        ({"sslsni": "0"}, "must be 1, because the server's name is always sent"),
        ({"prepared_statement_cache_size": "0"}, "set DB_POOLER=pgbouncer"),
        ({"statement_cache_size": "0"}, "set DB_POOLER=pgbouncer"),
        ({"sslmode": "require", "sslrootcert": "system"}, "must be verify-full"),
        ({"sslmode": "prefer", "sslnegotiation": "direct"}, "needs sslmode=verify-full or require"),
        ({"pgbouncer": "true", "options": "-cgeqo%3Doff"}, "use ALTER ROLE"),
        ({"sslrequire": "1"}, "unknown parameter: sslrequire"),
    ],
)
def test_a_refused_parameter_says_what_to_write_instead(
    parameters: dict[str, str], advice: str
) -> None:
    message = refused(database_url=url(**parameters))
    assert advice in message
    assert SECRET not in message


def test_channel_binding_is_safe_to_ignore_if_the_server_is_verified() -> None:
    text = url(channel_binding="require")
    chosen = Settings(database_url=text, db_ssl_mode="verify-full", db_ssl_ca="/ca.pem")
    assert chosen.tls["sslmode"] == "verify-full"
    weak = Settings(database_url=url(channel_binding="prefer"))
    assert weak.tls == {}


def test_a_cache_of_no_statements_is_ignored_behind_a_pooler() -> None:
    for name in ("prepared_statement_cache_size", "statement_cache_size"):
        text = url(**{name: "0"})
        assert Settings(database_url=text, db_pooler="pgbouncer").uses_pooler
        assert Settings(database_url=url(**{name: "100"})).connect_args()


def test_the_url_of_a_pooler_is_left_for_direct_connections() -> None:
    chosen = Settings(
        database_url=url(pgbouncer="true", application_name="mine"), db_direct_host="direct"
    )
    arguments = chosen.connect_args()
    assert arguments["statement_cache_size"] == 0
    assert "statement_timeout" not in arguments["server_settings"]
    direct = chosen.without_pooler()
    assert not direct.uses_pooler
    arguments = direct.connect_args()
    assert (arguments["host"], arguments["password"]()) == ("direct", SECRET)
    assert arguments["server_settings"]["application_name"] == "mine"
    assert "statement_timeout" in arguments["server_settings"]
