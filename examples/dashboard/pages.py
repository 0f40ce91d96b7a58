"""Pages: templates, links, and the error page of each error of tiger_db."""

import json
import logging
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import tiger_db
from examples.dashboard.access import COOKIE
from tiger_db import errors

FOLDER = Path(__file__).parent
_logger = logging.getLogger(__name__)
# The first class that matches an error decides the status of the response.
STATUSES: dict[type[errors.TigerDBError], int] = {
    errors.RateLimited: 429,
    errors.ScopeMissing: 403,
    errors.AccountNotAllowed: 403,
    errors.AccessDenied: 401,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.MissingReference: 409,
    errors.InvalidState: 409,
    errors.Conflict: 409,
    errors.InvalidValue: 422,
    errors.DatabaseUnavailable: 503,
    errors.QueryTimeout: 503,
}


def page(request: Request, template: str, **values: object) -> HTMLResponse:
    return templates.TemplateResponse(request, template, values)


def error_page(request: Request, error: errors.TigerDBError) -> HTMLResponse:
    """Return the page of an error, or the login page if the request has no valid API key."""
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)
    headers = {}
    if isinstance(error, errors.RateLimited):
        headers["Retry-After"] = str(ceil(error.retry_after.total_seconds()))
    if status == 401:  # the audit event has the reason
        return login_page(request, status, "Enter a valid API key." if _has_key(request) else "")
    message = str(error)
    if status >= 500:
        _logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        message = type(error).__doc__ or ""
    return message_page(request, status, message, headers)


def login_page(request: Request, status: int = 200, message: str = "") -> HTMLResponse:
    return templates.TemplateResponse(request, "login.html", {"message": message}, status)


def message_page(
    request: Request, status: int, message: str, headers: dict[str, str] | None = None
) -> HTMLResponse:
    values = {"status": status, "message": message}
    return templates.TemplateResponse(request, "error.html", values, status, headers)


def _has_key(request: Request) -> bool:
    return request.method == "POST" or COOKIE in request.cookies


def _of_request(request: Request) -> dict[str, Any]:
    """Return the values that the frame of each page shows."""
    state = request.state
    return {"key": getattr(state, "key", None), "pause": getattr(state, "pause", None)}


def link(request: Request, **changes: str | None) -> str:
    """Return a link to the same list with other parameters, at the first page of the list.

    A change with the value None removes a parameter.
    """
    names = {"after", "before", *changes}
    pairs = [(k, v) for k, v in request.query_params.multi_items() if v and k not in names]
    pairs += [(name, value) for name, value in changes.items() if value is not None]
    return f"{request.url.path}?{urlencode(pairs)}"


def toggle(request: Request, name: str, value: str) -> str:
    """Return a link to the same list, with one value of a filter added or removed."""
    pair = (name, value)
    pairs = [
        (k, v)
        for k, v in request.query_params.multi_items()
        if v and k not in {"after", "before"} and (k, v) != pair
    ]
    if value not in request.query_params.getlist(name):
        pairs.append(pair)
    return f"{request.url.path}?{urlencode(pairs)}"


def _time(value: datetime | None) -> str:
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if value else "—"


def _words(value: object) -> str:
    return str(value).replace("_", " ")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


environment = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.globals.update(db=tiger_db, link=link, toggle=toggle)
environment.filters.update(time=_time, words=_words, json=_json)
templates = Jinja2Templates(env=environment, context_processors=[_of_request])
