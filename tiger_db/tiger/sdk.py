"""Configuration of Tiger's SDK for a stored account. Tiger's SDK is an optional dependency."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from tiger_db.errors import ConfigurationError, InvalidState, InvalidValue
from tiger_db.models import TigerAccount, TigerEnvironment, TigerLicense
from tiger_db.models.private_keys import parse_private_key
from tiger_db.public import public
from tiger_db.tiger.properties import client_option, plaintext

if TYPE_CHECKING:
    from tigeropen.tiger_open_config import TigerOpenClientConfig

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@public
def client_config(account: TigerAccount) -> "TigerOpenClientConfig":
    """Return a configuration of Tiger's SDK that has only the stored values of an account.

    `client_config` reads no properties file and no `TIGEROPEN_*` variable, and sends no request.
    The SDK adds the machine's MAC address to each request. A `token_refresh_duration` in
    `client_options` has no effect, because a refresh by the SDK would invalidate the stored token.

    `retry_max_tries` is 0, because the SDK would also repeat requests that are not idempotent, such
    as transfers. A program that only reads data can set `retry_max_tries` to a higher number.

    Raises:
        ConfigurationError: the SDK of Tiger is not installed.
        InvalidState: the account is closed.
        InvalidValue: the private key is not an RSA key, or a value in `client_options` is invalid.
        EncryptionError: the account's secrets cannot be decrypted.
    """
    if account.private_key is None:
        raise InvalidState(f"{account.label()} is closed")
    sdk, config_class = load_sdk()
    # If enable_dynamic_domain were True, the SDK would send a request.
    config = config_class(enable_dynamic_domain=False)
    config.props_path = None
    config.tiger_id, config.account = plaintext(account.tiger_id), account.account_number
    config.private_key, _ = parse_private_key(plaintext(account.private_key))
    # If the license in the SDK's configuration were None, the SDK would ask Tiger for the license.
    config.license = str(account.license or "")
    config.token = plaintext(account.access_token)
    config.secret_key = plaintext(account.secret_key)
    config.token_refresh_duration = config.retry_max_tries = 0
    url = sdk.SERVER_URL
    if account.environment == TigerEnvironment.SANDBOX:
        # The constructor's argument `sandbox_debug` is not used, because the argument makes the SDK
        # log a warning, which configures the root logger.
        config._sandbox_debug = True  # noqa: SLF001
        config.tiger_public_key = sdk.SANDBOX_TIGER_PUBLIC_KEY
        url, config.socket_host_port = sdk.SANDBOX_SERVER_URL, sdk.SANDBOX_SOCKET_HOST_PORT
    elif account.license == TigerLicense.TBUS:
        url, config.socket_host_port = sdk.US_SERVER_URL, sdk.US_SOCKET_HOST_PORT
    config.server_url = config.quote_server_url = account.server_url or url
    parsers: dict[str, Callable[[str], object]] = {
        "timeout": lambda text: _natural(text) or sdk.TIMEOUT,  # 0 means the SDK's default timeout
        "socket_host_port": _socket,
        "timezone": str,
        "language": sdk.Language,
        "use_full_tick": lambda text: _BOOLEANS[text.lower()],
    }
    for name, parse in parsers.items():
        if text := client_option(account, name):
            try:
                setattr(config, name, parse(text))
            except (ValueError, LookupError):
                raise InvalidValue(f"{name} in client_options has an invalid value") from None
    return config


@cache
def load_sdk() -> tuple[Any, Any]:
    """Import Tiger's SDK.

    Return the SDK's configuration module, and a configuration class without I/O.

    Raises:
        ConfigurationError: the SDK of Tiger is not installed.
    """
    try:
        from tigeropen import tiger_open_config as sdk  # noqa: PLC0415  # the SDK is slow to import, and optional
    except ImportError as error:
        raise ConfigurationError(
            "Tiger's SDK is not installed: install tiger_db with the extra `tiger`"
        ) from error

    class ExplicitConfig(sdk.TigerOpenClientConfig):  # type: ignore[misc]  # the SDK has no types
        def _load_env_vars(self) -> None: ...

        def _load_props(self) -> None: ...

        def load_token(self) -> object:
            return self.token

        def store_token(self, token: str) -> None:
            self.token = token

    return sdk, ExplicitConfig


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _socket(text: str) -> tuple[str, str, int]:
    protocol, host, port = (part.strip() for part in text.split(","))
    return protocol, host, int(port)
