"""Configuration of Tiger's real SDK."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tigeropen import tiger_open_config as sdk
from tigeropen.common.consts.service_types import (
    ACCOUNTS,
    TRANSFER_SEGMENT_FUND,
    USER_TOKEN_REFRESH,
)
from tigeropen.common.exceptions import ResponseException
from tigeropen.common.request import OpenApiRequest
from tigeropen.common.util.web_utils import http_pool
from tigeropen.tiger_open_client import TigerOpenClient

from tests.support.factories import account as stored_account
from tests.support.factories import new_account
from tests.support.private_keys import pem
from tests.support.sdk_gateway import Gateway, loaded
from tests.support.tiger_files import EVERYTHING, NEW, OLD, OTHER, PK1, PK8, config
from tiger_db import PrivateKeyFormat, TigerAccount
from tiger_db.database import AsyncSession
from tiger_db.errors import ConfigurationError, InvalidState, InvalidValue
from tiger_db.tiger import CONFIG_FILE, TOKEN_FILE, client_config
from tiger_db.tiger.sdk import load_sdk

HOSTILE = {
    "TIGER_ID": "666",
    "ACCOUNT": "66666666666666666",
    "SECRET_KEY": "evil",
    "PRIVATE_KEY": OTHER,
    "LICENSE": "TBUS",
    "TOKEN": OLD,
    "SERVER_URL": "https://evil.example.com",
    "TIMEOUT": "1",
    "TOKEN_REFRESH_DURATION": "30",
    "SOCKET_HOST_PORT": "tcp,evil.example.com,1",
    "USE_FULL_TICK": "true",
    "TIMEZONE": "Asia/Pyongyang",
    "LANGUAGE": "zh_TW",
}
# Prints which files are opened and which connections made for a configuration, ours or the SDK's.
WATCHED = """
import sys
from tests.support.factories import new_account
from tests.support.tiger_files import PK8
from tiger_db.tiger import client_config
def look(event, arguments):
    if event in ("open", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        print(event, arguments[0])
sys.addaudithook(look)
if sys.argv[1] == "ours":
    options = {"timezone": "Asia/Tokyo"}
    config = client_config(new_account(private_key=PK8, client_options=options))
else:
    from tigeropen.tiger_open_config import TigerOpenClientConfig
    config = TigerOpenClientConfig(enable_dynamic_domain=False)
print("told", config.tiger_id, config.timezone)
"""
# Imports everything there is and lists what has come along.
EVERYWHERE = """
import sys, pkgutil, tiger_db
for module in pkgutil.walk_packages(tiger_db.__path__, "tiger_db."):
    if module.name != "tiger_db.__main__":
        __import__(module.name)
for name in (*tiger_db.__all__, *dir(tiger_db)):
    getattr(tiger_db, name)
print("tiger_db.tiger.sdk" in sys.modules, "tigeropen" in sys.modules)
"""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        http_pool.clear()
        server.shutdown()
        thread.join()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set variables and files with other values, where the SDK reads them."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    lines = {name.lower(): value for name, value in HOSTILE.items()}
    config(folder, {**lines, "private_key_pk8": OTHER, "env": "PROD"})
    config(folder, {"token": OLD}, TOKEN_FILE)
    for name, value in HOSTILE.items():
        monkeypatch.setenv(f"TIGEROPEN_{name}", value)
    monkeypatch.setenv("TIGEROPEN_PROPS_PATH", str(folder))
    monkeypatch.chdir(folder)
    return folder


async def test_a_configuration_has_what_is_stored(session: AsyncSession) -> None:
    account = await stored_account(
        session, account_number="U12300123", private_key=PK1, secret_key="s3cret",
        license="TBHK", access_token=NEW,
    )  # fmt: skip
    config = client_config(account)
    assert isinstance(config, sdk.TigerOpenClientConfig)
    assert (config.tiger_id, config.account, config.is_paper) == ("20150001", "U12300123", False)
    assert (config.private_key, config.secret_key) == (PK1, "s3cret")
    assert (config.license, type(config.license), config.token) == ("TBHK", str, NEW)
    assert config.server_url == config.quote_server_url == sdk.SERVER_URL
    assert config.socket_host_port == sdk.SOCKET_HOST_PORT
    assert config.tiger_public_key == sdk.TIGER_PUBLIC_KEY
    assert (config.timeout, config.language, config.timezone) == (15, sdk.Language.en_US, None)
    assert (config.use_full_tick, config.enable_dynamic_domain) == (False, False)
    assert (config.retry_max_tries, config.token_refresh_duration) == (0, 0)
    assert not config.should_token_refresh()
    assert config.get_token_path() is None


def test_what_is_not_stored_is_empty_and_the_key_in_tigers_form() -> None:
    config = client_config(new_account(private_key=pem(PrivateKeyFormat.PK8)))
    assert (config.license, config.token, config.secret_key) == ("", "", "")
    assert config.private_key == PK8


def test_each_account_has_its_own() -> None:
    paper = client_config(new_account(account_number="2" * 17, private_key=PK8))
    real = client_config(new_account(private_key=PK8))
    assert (paper.is_paper, real.is_paper) == (True, False)


@pytest.mark.parametrize(
    ("fields", "url", "socket", "key"),
    [
        ({"license": "TBUS"}, sdk.US_SERVER_URL, sdk.US_SOCKET_HOST_PORT, sdk.TIGER_PUBLIC_KEY),
        (
            {"license": "TBUS", "server_url": "https://a"},
            "https://a", sdk.US_SOCKET_HOST_PORT, sdk.TIGER_PUBLIC_KEY,
        ),
        ({"server_url": "https://a"}, "https://a", sdk.SOCKET_HOST_PORT, sdk.TIGER_PUBLIC_KEY),
        (
            {"environment": "SANDBOX"},
            sdk.SANDBOX_SERVER_URL, sdk.SANDBOX_SOCKET_HOST_PORT, sdk.SANDBOX_TIGER_PUBLIC_KEY,
        ),
        (
            {"environment": "SANDBOX", "server_url": "https://a"},
            "https://a", sdk.SANDBOX_SOCKET_HOST_PORT, sdk.SANDBOX_TIGER_PUBLIC_KEY,
        ),
        (
            {"client_options": {"socket_host_port": " tcp, b ,1 "}, "license": "TBUS"},
            sdk.US_SERVER_URL, ("tcp", "b", 1), sdk.TIGER_PUBLIC_KEY,
        ),
    ],
)  # fmt: skip
def test_servers(fields: dict[str, Any], url: str, socket: Any, key: str) -> None:
    config = client_config(new_account(private_key=PK8, **fields))
    TigerOpenClient(config, logger=logging.getLogger("tiger"))  # which may set them anew
    assert config.server_url == config.quote_server_url == url
    assert config.socket_host_port == socket
    assert config.tiger_public_key == key
    assert config._sandbox_debug in (None, fields.get("environment") == "SANDBOX")


def test_the_sandbox_does_not_set_up_the_root_logger(caplog: pytest.LogCaptureFixture) -> None:
    handlers = [*logging.getLogger().handlers]
    client_config(new_account(private_key=PK8, environment="SANDBOX"))
    assert logging.getLogger().handlers == handlers
    assert caplog.records == []


def test_options() -> None:
    options = {name: EVERYTHING[name] for name in EVERYTHING if name not in ("env", "license")}
    config = client_config(new_account(private_key=PK8, client_options=options | {"other": "x"}))
    assert config.timeout == 20
    assert config.socket_host_port == ("ssl", "openapi.example.com", 9883)
    assert str(config.timezone) == "Asia/Hong_Kong"
    assert config.language == sdk.Language.zh_CN
    assert config.use_full_tick is True
    assert config.token_refresh_duration == 0  # tiger_db schedules them


@pytest.mark.parametrize(
    ("options", "name", "wanted"),
    [
        ({"timeout": 30}, "timeout", 30),
        ({"timeout": "0"}, "timeout", 15),
        ({"timeout": ""}, "timeout", 15),
        ({"timeout": None}, "timeout", 15),
        ({"use_full_tick": "No"}, "use_full_tick", False),
        ({"use_full_tick": True}, "use_full_tick", True),
    ],
)
def test_options_that_were_not_imported(options: Any, name: str, wanted: object) -> None:
    config = client_config(new_account(private_key=PK8, client_options=options))
    assert getattr(config, name) == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", "soon"),
        ("timeout", "-1"),
        ("timeout", "1.5"),
        ("socket_host_port", "ssl,host"),
        ("socket_host_port", "ssl,host,port"),
        ("socket_host_port", "ssl,host,1,2"),
        ("timezone", "Atlantis/Capital"),
        ("timezone", "../../etc/passwd"),
        ("language", "de_DE"),
        ("use_full_tick", "perhaps"),
    ],
)
def test_a_bad_option_is_named(name: str, value: str) -> None:
    account = new_account(private_key=PK8, client_options={name: value})
    with pytest.raises(InvalidValue, match=f"{name} in client_options has an invalid value"):
        client_config(account)


def test_accounts_that_cannot_have_one() -> None:
    with pytest.raises(InvalidValue, match="not an RSA key"):
        client_config(new_account())
    closed = new_account(account_number="51230321", status="closed", private_key=None)
    with pytest.raises(InvalidState, match=r"account \*\*\*\*0321 is closed"):
        client_config(closed)


@pytest.mark.parametrize("fields", [{}, {"access_token": NEW, "license": "TBHK"}])
async def test_no_variable_and_no_file_says_anything(
    session: AsyncSession, request: pytest.FixtureRequest, fields: dict[str, Any]
) -> None:
    account = await stored_account(session, private_key=PK8, **fields)
    before = vars(client_config(account))
    folder = request.getfixturevalue("hostile")
    # They are such as the SDK listens to.
    assert (loaded(folder).tiger_id, loaded(folder).token) == ("666", OLD)
    config = client_config(account)
    assert vars(config) == before
    assert config.load_token() == fields.get("access_token", "")
    config.store_token("new")
    assert config.token == "new"
    assert (folder / TOKEN_FILE).read_text() == f"token={OLD}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whose", "opened", "told"),
    [
        ("ours", [], "told 20150001 Asia/Tokyo"),
        ("the SDK's", [CONFIG_FILE], "told 666 Asia/Pyongyang"),
    ],
)
def test_no_file_is_opened_and_nothing_is_sent(
    hostile: Path, whose: str, opened: list[str], told: str
) -> None:
    command = [sys.executable, "-W", "error", "-c", WATCHED, whose]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    *events, last = done.stdout.splitlines()
    assert (last, done.stderr) == (told, "")
    assert [event.rpartition("/")[2] for event in events if ".properties" in event] == opened
    assert [event for event in events if str(hostile) in event] == [
        f"open {hostile / name}" for name in opened
    ]
    assert not [event for event in events if event.startswith("socket")]


@pytest.mark.slow
def test_importing_tiger_db_never_imports_the_sdk() -> None:
    command = [sys.executable, "-W", "error", "-c", EVERYWHERE]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert done.stdout == "True False\n"


def test_without_the_sdk_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_sdk.cache_clear()
    monkeypatch.setitem(sys.modules, "tigeropen", None)
    with pytest.raises(ConfigurationError, match=r"the extra `tiger`"):
        client_config(new_account(private_key=PK8))


# A client


def client(account: TigerAccount) -> Any:
    return TigerOpenClient(client_config(account), logger=logging.getLogger("tiger"))


async def test_a_client_signs_what_it_sends(session: AsyncSession, gateway: Gateway) -> None:
    account = await stored_account(
        session, private_key=PK1, access_token=NEW, license="TBHK", server_url=gateway.url
    )
    answer = client(account).execute(OpenApiRequest(method=USER_TOKEN_REFRESH))
    assert answer == {"code": 0}
    assert gateway.asked[0]["tiger_id"] == "20150001"
    assert gateway.asked[0]["method"] == "user_token_refresh"
    assert gateway.headers == [NEW]


def test_the_gateway_notices_another_key(gateway: Gateway) -> None:
    account = new_account(private_key=OTHER, server_url=gateway.url)
    answer = client(account).execute(OpenApiRequest(method=ACCOUNTS))
    assert answer == {"code": 1000}
    assert gateway.headers == [None]


@pytest.mark.parametrize("method", [TRANSFER_SEGMENT_FUND, USER_TOKEN_REFRESH])
def test_a_client_repeats_nothing(gateway: Gateway, method: str) -> None:
    gateway.status = 500
    account = new_account(private_key=PK8, server_url=gateway.url)
    with pytest.raises(ResponseException):
        client(account).execute(OpenApiRequest(method=method))
    assert len(gateway.asked) == 1
