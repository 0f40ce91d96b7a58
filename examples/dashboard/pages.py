"""Pages: templates, links, and the error page of each error of tiger_db."""

import json
import logging
from datetime import UTC, datetime
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
from tiger_db.integrations.http import public_error

FOLDER = Path(__file__).parent
_logger = logging.getLogger(__name__)


def page(request: Request, template: str, **values: object) -> HTMLResponse:
    return templates.TemplateResponse(request, template, values)


def error_page(request: Request, error: errors.TigerDBError) -> HTMLResponse:
    """Return the page of an error, or the login page if the request has no valid API key."""
    shown = public_error(error)
    if shown.status == 401:  # the audit event has the reason
        return login_page(request, 401, "Enter a valid API key." if _has_key(request) else "")
    if shown.status >= 500:
        _logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return message_page(request, shown.status, shown.message, shown.headers)


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
