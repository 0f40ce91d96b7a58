"""Tiger's SDK, set up from what is stored. It is an extra, and imported only when it is used."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from tiger_db.errors import ConfigurationError, InvalidState, InvalidValue
from tiger_db.models import TigerAccount, TigerEnvironment, TigerLicense
from tiger_db.tiger.private_keys import parse_private_key
from tiger_db.tiger.properties import option, plain

if TYPE_CHECKING:
    from tigeropen.tiger_open_config import TigerOpenClientConfig

_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def client_config(account: TigerAccount) -> "TigerOpenClientConfig":
    """Set up Tiger's SDK for one account, from what is stored alone. Make one for each account.

    It reads no properties file and no `TIGEROPEN_*` variable, and sends nothing; the SDK looks up
    the machine's MAC address, which its requests bear. It never refreshes the token, whatever
    `token_refresh_duration` an imported file had: a second refresh would end the first one's token.

    `retry_max_tries` is 0, because the SDK would repeat requests that change something: transfers,
    option exercises, token refreshes. Raise it where you only read.

    Raises:
        ConfigurationError: the SDK is not installed.
        InvalidState: the account is closed.
        InvalidValue: its private key is not an RSA key, or one of its `client_options` is refused.
        EncryptionError: its secrets cannot be decrypted.
    """
    if account.private_key is None:
        raise InvalidState(f"{account.label()} is closed")
    sdk, config_class = load_sdk()
    config = config_class(enable_dynamic_domain=False)  # else it would ask for the servers' names
    config.props_path = None
    config.tiger_id, config.account = plain(account.tiger_id), account.account_number
    config.private_key, _ = parse_private_key(plain(account.private_key))
    config.license = account.license.value if account.license else ""  # for None, a client asks
    config.token, config.secret_key = plain(account.access_token), plain(account.secret_key)
    config.token_refresh_duration = config.retry_max_tries = 0
    url = sdk.SERVER_URL
    if account.environment == TigerEnvironment.SANDBOX:
        # Not by the constructor's argument: for its warning, it would set up the root logger.
        config._sandbox_debug = True  # noqa: SLF001  # the reason above
        config.tiger_public_key = sdk.SANDBOX_TIGER_PUBLIC_KEY
        url, config.socket_host_port = sdk.SANDBOX_SERVER_URL, sdk.SANDBOX_SOCKET_HOST_PORT
    elif account.license == TigerLicense.TBUS:
        url, config.socket_host_port = sdk.US_SERVER_URL, sdk.US_SOCKET_HOST_PORT
    config.server_url = config.quote_server_url = account.server_url or url
    readers: dict[str, Callable[[str], object]] = {
        "timeout": lambda text: _natural(text) or sdk.TIMEOUT,  # 0 is the default, as in the SDK
        "socket_host_port": _socket,
        "timezone": str,
        "language": sdk.Language,
        "use_full_tick": lambda text: _FLAGS[text.lower()],
    }
    for name, read in readers.items():
        if text := option(account, name):
            try:
                setattr(config, name, read(text))
            except (ValueError, LookupError):
                raise InvalidValue(f"client_options: {name} has a bad value") from None
    return config


@cache
def load_sdk() -> tuple[Any, Any]:
    """The SDK's module of configurations, and a configuration that knows only what it is told."""
    try:
        from tigeropen import tiger_open_config as sdk  # noqa: PLC0415  # slow, and an extra
    except ImportError as error:
        raise ConfigurationError(
            "Tiger's SDK is not installed: install tiger-db with its extra, tiger-db[tiger]"
        ) from error

    class Told(sdk.TigerOpenClientConfig):  # type: ignore[misc]  # the SDK has no types
        def _load_env_vars(self) -> None: ...

        def _load_props(self) -> None: ...

        def load_token(self) -> object:
            return self.token

        def store_token(self, token: str) -> None:
            self.token = token

    return sdk, Told


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _socket(text: str) -> tuple[str, str, int]:
    protocol, host, port = (part.strip() for part in text.split(","))
    return protocol, host, int(port)
