"""Refresh of access tokens with Tiger's SDK."""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import Any

from tiger_db.errors import AnswerLost, CredentialsRefused, RefreshFailed, RefreshLimited
from tiger_db.models import TigerAccount
from tiger_db.models.secrets import readable_secrets
from tiger_db.models.token_status import NewToken
from tiger_db.public import public
from tiger_db.redaction import redact_aggressively
from tiger_db.tiger.sdk import client_config

# Tiger's error codes: https://quant.itigerup.com/openapi/en/python/appendix2/overview.html
_OK, _SERVER_ERROR, _TIMEOUT, _FORBIDDEN, _LIMIT = 0, 1, 2, 4, 5
# Tiger's error codes for a wrong parameter or signature, and for a denied permission.
_REFUSED = {1000, 4000}
_HTTP_LIMIT, _HTTP_UNAUTHORIZED, _HTTP_SERVER_ERROR = 429, {401, 403}, 500
_RATE_LIMIT_WINDOW = timedelta(seconds=60)  # period in which Tiger's rate limit counts requests
# Tiger's SDK would log access tokens to this logger. A logger of `logging.getLogger` would not stay
# disabled: a configuration of logging, such as that of uvicorn, enables all existing loggers.
_disabled_logger = logging.Logger("tiger_db.tiger.sdk")  # noqa: LOG001  # the reason is above
_disabled_logger.disabled = True


@public
async def refresh_token(account: TigerAccount) -> NewToken:
    """Send Tiger one request for a new access token. Tiger then invalidates the current token.

    The request runs in a thread, because Tiger's SDK is not asynchronous. Call `refresh_token`
    outside of database transactions. Error messages contain Tiger's error code and error text, with
    masked secrets.

    Raises:
        RefreshLimited: the rate limit of Tiger for requests is reached.
        CredentialsRefused: the private key, the signature or the access token is refused by Tiger.
        AnswerLost: Tiger's answer is missing or malformed, so Tiger has possibly issued a token.
        RefreshFailed: the refresh failed for a reason that is possibly temporary.
        ConfigurationError: the SDK of Tiger is not installed.
    """
    config = client_config(account)
    try:
        answer = await asyncio.get_running_loop().run_in_executor(_threads(), _ask, config)
        return _new_token(answer)
    except RefreshFailed as error:
        error.args = (redact_aggressively(str(error), *readable_secrets(account)),)
        raise error from None


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="tiger")


def _ask(config: Any) -> Any:  # noqa: ANN401  # the SDK has no types
    from tigeropen.common.consts.service_types import USER_TOKEN_REFRESH  # noqa: PLC0415  # slow
    from tigeropen.common.exceptions import RequestException, ResponseException  # noqa: PLC0415
    from tigeropen.common.request import OpenApiRequest  # noqa: PLC0415
    from tigeropen.tiger_open_client import TigerOpenClient  # noqa: PLC0415
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError  # noqa: PLC0415

    try:
        client = TigerOpenClient(config, logger=_disabled_logger)
        return client.execute(OpenApiRequest(method=USER_TOKEN_REFRESH))
    except ResponseException as error:
        raise _http_error(error.status, str(error)) from None
    except RequestException as error:
        cause = error.__context__
        reason = getattr(cause, "reason", cause)  # a MaxRetryError contains the original error
        if isinstance(reason, NewConnectionError | ConnectTimeoutError):
            raise RefreshFailed(f"Tiger cannot be reached: {type(reason).__name__}") from None
        raise AnswerLost(f"Tiger's answer was lost: {type(reason).__name__}") from None
    except ValueError:
        raise AnswerLost("Tiger's answer is not JSON") from None


def _http_error(status: int | None, text: str) -> RefreshFailed:
    if status == _HTTP_LIMIT:
        return RefreshLimited(
            "Tiger's rate limit is reached (HTTP 429)",
            broker_code=_LIMIT,
            retry_after=_RATE_LIMIT_WINDOW,
        )
    if status in _HTTP_UNAUTHORIZED:
        return CredentialsRefused(f"Tiger refuses the credentials (HTTP {status})")
    if status is not None and status < _HTTP_SERVER_ERROR:
        return RefreshFailed(f"Tiger refuses the request (HTTP {status})")
    # Tiger has possibly issued a token before the error, so the refresh has an unknown result.
    return AnswerLost(f"Tiger had a server error (HTTP {status})" if status is not None else text)


def _new_token(answer: Any) -> NewToken:  # noqa: ANN401  # the answer is any JSON value
    """Return the token in Tiger's answer. If the answer has no token, raise a RefreshFailed."""
    if not isinstance(answer, dict):
        raise AnswerLost("Tiger's answer is not a JSON object")
    code, text = answer.get("code"), str(answer.get("message") or answer.get("msg") or "")
    message = f"code={code} msg={text}"
    if code == _OK:
        data = answer.get("data")
        if isinstance(data, str):  # Tiger can encode the data of an answer as a JSON string
            try:
                data = json.loads(data)
            except ValueError:
                data = None
        token = data.get("token") if isinstance(data, dict) else None
        if not isinstance(token, str) or not token:
            raise AnswerLost("Tiger's answer contains no token", broker_code=code)
        return NewToken(token, code=code)
    if not isinstance(code, int):
        raise AnswerLost("Tiger's answer contains no error code")
    if code == _LIMIT or (code == _FORBIDDEN and "rate limit" in text):
        raise RefreshLimited(message, broker_code=code, retry_after=_RATE_LIMIT_WINDOW)
    if code in _REFUSED or code == _FORBIDDEN:
        raise CredentialsRefused(message, broker_code=code)
    if code in {_SERVER_ERROR, _TIMEOUT}:
        raise AnswerLost(message, broker_code=code)
    raise RefreshFailed(message, broker_code=code)
