"""The routes of the dashboard. Each route asks tiger_db with public functions only."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from fastapi import FastAPI, Form, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from starlette.exceptions import HTTPException

from examples.dashboard import charts
from examples.dashboard.access import (
    COOKIE,
    Changing,
    Reading,
    authorize,
    check_origin,
    database_of,
)
from examples.dashboard.filters import (
    AccountQuery,
    EventQuery,
    KeyQuery,
    RefreshQuery,
    RoutingQuery,
)
from examples.dashboard.pages import FOLDER, error_page, login_page, message_page, page
from tiger_db import (
    APIKeyScope,
    AuditAction,
    AuditResult,
    crud,
    errors,
    wait_for_refresh,
)
from tiger_db.integrations.fastapi import install, lifespan

PAGE_SIZE = 20
TOP = 5
RECENT = 8  # rows of each list on the page of one account
REFRESH_TIMEOUT = timedelta(seconds=10)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src data:; form-action 'self';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


app = FastAPI(lifespan=lifespan, openapi_url=None)
install(app)


@app.middleware("http")
async def add_headers(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    response = await call_next(request)
    response.headers.update(HEADERS)
    return response


@app.exception_handler(errors.TigerDBError)
async def on_tiger_db_error(request: Request, error: errors.TigerDBError) -> HTMLResponse:
    return error_page(request, error)


@app.exception_handler(RequestValidationError)
async def on_invalid_request(request: Request, error: RequestValidationError) -> HTMLResponse:
    problems = (f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
    return message_page(request, 422, "; ".join(problems))


@app.exception_handler(HTTPException)
async def on_http_error(request: Request, error: HTTPException) -> HTMLResponse:
    return message_page(request, error.status_code, error.detail)


def redirect(path: str) -> RedirectResponse:
    """Redirect after a form, so that a reload of the page does not submit the form again."""
    return RedirectResponse(path, 303)


@app.get("/style.css")
async def style() -> FileResponse:
    return FileResponse(FOLDER / "style.css")


@app.get("/login")
async def show_login(request: Request) -> HTMLResponse:
    return login_page(request)


@app.post("/login")
async def log_in(request: Request, raw_key: Annotated[str, Form()]) -> RedirectResponse:
    check_origin(request)
    await authorize(request, raw_key.strip(), APIKeyScope.DASHBOARD_READ)
    async with database_of(request).session(actor=request.state.actor) as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DASHBOARD_LOGIN)
    response = redirect("/accounts")
    secure = request.url.scheme == "https"
    response.set_cookie(COOKIE, raw_key.strip(), httponly=True, samesite="strict", secure=secure)
    return response


@app.post("/logout")
async def log_out(request: Request) -> RedirectResponse:
    check_origin(request)
    response = redirect("/login")
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


@app.get("/")
async def start() -> RedirectResponse:
    return redirect("/accounts")


@app.get("/accounts")
async def accounts(
    request: Request, session: Reading, query: Annotated[AccountQuery, Query()]
) -> HTMLResponse:
    return page(
        request,
        "accounts.html",
        accounts=await crud.accounts.list_accounts(
            session, limit=PAGE_SIZE, count=True, **query.model_dump()
        ),
        counts=await crud.accounts.counts(session, within=charts.DAY),
    )


@app.get("/accounts/{account_id}")
async def account(request: Request, session: Reading, account_id: UUID) -> HTMLResponse:
    found = await crud.accounts.get(session, account_id)
    if found is None:
        raise errors.NotFound
    return page(
        request,
        "account.html",
        account=found,
        keys=await crud.api_keys.get_keys_for_account(session, account_id, limit=RECENT),
        refreshes=await crud.token_status.history(session, account_id=account_id, limit=RECENT),
        events=await crud.audit_logs.search(session, account_id=account_id, limit=RECENT),
    )


@app.post("/accounts/{account_id}/refresh")
async def refresh_now(request: Request, session: Changing, account_id: UUID) -> RedirectResponse:
    refresh = await crud.token_status.refresh_now(session, account_id)
    await session.commit()  # the workers find the refresh after the commit
    with suppress(errors.WaitTimeout):  # then the page of the refresh shows that it is open
        await wait_for_refresh(database_of(request), refresh.id, timeout=REFRESH_TIMEOUT)
    return redirect(f"/refreshes/{refresh.id}")


@app.get("/keys")
async def keys(
    request: Request, session: Reading, query: Annotated[KeyQuery, Query()]
) -> HTMLResponse:
    since = datetime.now(UTC) - timedelta(days=7)
    top = await crud.api_keys.usage(session, by="api_key_id", since=since, limit=TOP)
    return page(
        request,
        "keys.html",
        keys=await crud.api_keys.list_api_keys(
            session, limit=PAGE_SIZE, count=True, load=["tiger_account"], **query.model_dump()
        ),
        top=charts.ranking((count.api_key_name or "", count.count) for count in top),
    )


@app.get("/keys/{key_id}")
async def key(
    request: Request, session: Reading, key_id: UUID, by: Literal["hour", "day"] = "day"
) -> HTMLResponse:
    found = await crud.api_keys.get(session, key_id)
    if found is None:
        raise errors.NotFound
    step, since = (charts.DAY, timedelta(days=29)) if by == "day" else (charts.HOUR, charts.DAY)
    times = charts.starts(datetime.now(UTC) - since, step)
    usage = await crud.api_keys.usage(session, key_id, by=by, since=times[0])
    return page(
        request,
        "key.html",
        shown=found,
        limits=await crud.api_keys.limits(session, key_id),
        usage=charts.over_time(times, {"uses": {c.start: c.count for c in usage if c.start}}),
        by=by,
    )


@app.get("/events")
async def events(
    request: Request, session: Reading, query: Annotated[EventQuery, Query()]
) -> HTMLResponse:
    times = charts.starts(datetime.now(UTC) - timedelta(days=13), charts.DAY)
    counts = await crud.audit_logs.statistics(
        session,
        by=("day", "result"),
        since=times[0],
        **query.model_dump(exclude={"after", "before", "since", "until"}),
    )
    series = {
        result.value: {c.start: c.count for c in counts if c.start and c.result == result}
        for result in AuditResult
    }
    return page(
        request,
        "events.html",
        events=await crud.audit_logs.search(
            session, limit=PAGE_SIZE, load=["tiger_account", "api_key"], **query.model_dump()
        ),
        per_day=charts.over_time(times, {name: part for name, part in series.items() if part}),
    )


@app.get("/events/{event_id}")
async def event(request: Request, session: Reading, event_id: UUID) -> HTMLResponse:
    found = await crud.audit_logs.get(session, event_id)
    if found is None:
        raise errors.NotFound
    return page(request, "event.html", event=found)


@app.get("/refreshes")
async def refreshes(
    request: Request, session: Reading, query: Annotated[RefreshQuery, Query()]
) -> HTMLResponse:
    since = datetime.now(UTC) - timedelta(days=7)
    return page(
        request,
        "refreshes.html",
        refreshes=await crud.token_status.history(
            session, limit=PAGE_SIZE, count=True, load=["tiger_account"], **query.model_dump()
        ),
        statistics=await crud.token_status.statistics(session, since=since),
    )


@app.get("/refreshes/{refresh_id}")
async def refresh(request: Request, session: Reading, refresh_id: UUID) -> HTMLResponse:
    found = await crud.token_status.get(session, refresh_id)
    if found is None:
        raise errors.NotFound
    account = await crud.accounts.get(session, found.tiger_account_id)
    return page(request, "refresh.html", refresh=found, account=account)


@app.get("/routing")
async def routing(
    request: Request, session: Reading, query: Annotated[RoutingQuery, Query()]
) -> HTMLResponse:
    reasons = await crud.accounts.explain_for_operation(session, **query.model_dump())
    accounts = await crud.accounts.list_accounts(session, limit=1000)
    return page(
        request,
        "routing.html",
        reasons=sorted(reasons.items(), key=lambda item: bool(item[1])),  # eligible accounts first
        accounts={account.id: account for account in accounts},
    )


@app.post("/pause")
async def pause(session: Changing, reason: Annotated[str, Form()] = "") -> RedirectResponse:
    await crud.api_keys.pause(session, reason=reason)
    return redirect("/events?action=trading")


@app.post("/resume")
async def resume(session: Changing, reason: Annotated[str, Form()] = "") -> RedirectResponse:
    await crud.api_keys.resume(session, reason=reason or None)
    return redirect("/events?action=trading")
