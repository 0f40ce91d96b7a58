"""The dashboard: pages, filters, buttons and refusals, without a browser."""

import base64
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from uuid import uuid4

import httpx
import pytest

from examples.dashboard import charts
from examples.dashboard.app import HEADERS, PAGE_SIZE, app
from examples.dashboard.filters import AccountQuery, EventQuery, KeyQuery, RefreshQuery
from tests.support import factories
from tests.support.dashboard_data import SECRETS, Rows, fill
from tests.support.recording import recorded
from tests.support.refresh_workers import at_once, working
from tiger_db import (
    AccountStatus,
    APIKeyScope,
    AuditAction,
    Database,
    KeyVerifier,
    Settings,
    crud,
    errors,
)
from tiger_db.testing.databases import DatabasePool

URL = "http://127.0.0.1:8000"
LISTS = ("/accounts", "/keys", "/events", "/refreshes", "/routing")
# Statements in the session of each page: the pause, the rows, a count, relationships, and numbers.
MOST_STATEMENTS = {"/accounts": 4, "/keys": 5, "/events": 5, "/refreshes": 5, "/routing": 3}


@dataclass(frozen=True)
class Site:
    database: Database
    rows: Rows

    @asynccontextmanager
    async def visitor(
        self, raw_key: str | None = None, origin: str | None = URL
    ) -> AsyncIterator[httpx.AsyncClient]:
        """A browser with a cookie that contains an API key."""
        app.state.database, app.state.verifier = self.database, KeyVerifier(self.database)
        transport = httpx.ASGITransport(app, client=("192.0.2.1", 50000))
        cookies = {"tiger_db_dashboard": raw_key} if raw_key else {}
        headers = {"Origin": origin} if origin else {}
        async with httpx.AsyncClient(
            transport=transport, base_url=URL, cookies=cookies, headers=headers
        ) as client:
            yield client


@pytest.fixture(scope="module")
async def site(_tiger_pool: DatabasePool) -> AsyncIterator[Site]:
    pooled = _tiger_pool.take(connected=False)
    async with Database(pooled.settings) as database:
        yield Site(database, await fill(database))
    _tiger_pool.give_back(pooled)


class Links(HTMLParser):
    """The addresses in a page, by attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            (name, value or "") for name, value in attrs if name in {"href", "src", "action"}
        ]

    def followed(self) -> set[str]:
        """Return the links of filters and pages, and one link to each kind of row."""
        links = {link for name, link in self.found if name == "href" and link.startswith("/")}
        rows = {re.sub(r"/[0-9a-f-]{36}", "/ID", link): link for link in sorted(links)}
        return set(rows.values())


def body(text: str) -> str:
    """Return the rows of a list."""
    return text.partition("<tbody>")[2].partition("</tbody>")[0]


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.slow
async def test_every_link_of_a_list_leads_to_a_page_on_this_host_without_secrets(
    site: Site, path: str
) -> None:
    async with site.visitor(site.rows.writer) as visitor:
        first = await visitor.get(path)
        links = Links(first.text).followed()
        assert len(links) > 12
        for link in sorted(links):
            page = await visitor.get(link)
            assert page.status_code == 200, link
            assert page.headers.items() >= {k.lower(): v for k, v in HEADERS.items()}.items()
            for name, address in Links(page.text).found:
                assert re.match("/(?!/)|data:|[?]", address), (name, address)
            for secret in (*SECRETS, site.rows.writer, "argon2", "pepper"):
                assert secret not in page.text


@pytest.mark.parametrize("path", LISTS)
async def test_a_page_asks_the_database_a_few_times(site: Site, path: str) -> None:
    async with site.visitor(site.rows.reader) as visitor:
        with recorded(site.database) as sent:
            assert (await visitor.get(path)).status_code == 200
    assert len(sent) == MOST_STATEMENTS[path]


@pytest.mark.parametrize(
    ("kind", "most"), [("accounts", 5), ("keys", 4), ("refreshes", 3), ("events", 2)]
)
async def test_the_page_of_one_row_asks_the_database_a_few_times(
    site: Site, kind: str, most: int
) -> None:
    async with site.visitor(site.rows.reader) as visitor:
        (link, *_) = re.findall(f'"(/{kind}/[0-9a-f-]+)"', (await visitor.get(f"/{kind}")).text)
        with recorded(site.database) as sent:
            assert (await visitor.get(link)).status_code == 200
    assert len(sent) == most


@pytest.mark.parametrize(
    ("query", "filters", "left_out"),
    [
        (AccountQuery, crud.accounts.AccountFilters, set()),
        (KeyQuery, crud.api_keys.APIKeyFilters, set()),
        (EventQuery, crud.audit_logs.EventFilters, {"details"}),
        (RefreshQuery, crud.token_status.RefreshFilters, set()),
    ],
)
def test_a_list_takes_the_filters_of_its_function(
    query: type[AccountQuery], filters: type, left_out: set[str]
) -> None:
    paging = {"after", "before", "order_by"}
    assert query.model_fields.keys() - paging == _keys(filters) - left_out


def _keys(typed_dict: type) -> set[str]:
    return set().union(*(vars(base).get("__annotations__", {}) for base in [typed_dict]))


async def test_a_filter_selects_rows(site: Site) -> None:
    async with site.visitor(site.rows.reader) as visitor:
        suspended = await visitor.get("/accounts?status=suspended&status=closed")
        assert set(re.findall('class="badge (\\w+)"', body(suspended.text))) == {
            "suspended",
            "closed",
        }
        found = await visitor.get("/accounts?search=alder+g&order_by=name")
        assert re.findall("<a href=.*?>(.*?)</a>", body(found.text)) == ["Alder Growth"]
        assert "Total: 1<" in found.text
        none = await visitor.get("/keys?search=nothing&unused_since=2020-01-01")
        assert "No API key matches the filters." in none.text
        since = f"{datetime.now(UTC) - timedelta(days=30):%Y-%m-%d}"
        failed = await visitor.get(f"/refreshes?status=failed&order_by=schedule&since={since}")
        assert set(re.findall('class="badge (\\w+)"', body(failed.text))) == {"failed"}
        errors_only = await visitor.get("/events?result=error&ip_address=192.0.2.0/28&tags=desk")
        assert set(re.findall('class="badge (\\w+)"', body(errors_only.text))) == {"error", "high"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/accounts?order_by=name", "/keys", "/refreshes", "/events"])
async def test_the_pages_of_a_list_lead_forth_and_back(site: Site, path: str) -> None:
    async with site.visitor(site.rows.reader) as visitor:

        async def walk(link: str, direction: str) -> tuple[list[list[str]], str]:
            """Return the rows of up to three pages, and the link to the last of them."""
            pages: list[list[str]] = []
            while True:
                text = (await visitor.get(link)).text
                pages.append(re.findall('<tr>.*?href="(.*?)"', body(text), re.DOTALL))
                found = re.search(f'rel="{direction}" href="(.*?)"', text)
                if found is None or len(pages) == 3:
                    return pages, link
                link = found[1].replace("&amp;", "&")

        forth, last = await walk(path, "next")
        assert len(forth) >= 2
        assert len(forth[0]) == PAGE_SIZE
        rows = [row for page in forth for row in page]
        assert len(set(rows)) == len(rows)
        back, _ = await walk(last, "prev")
        assert back == forth[::-1]


def test_charts_load_nothing_and_escape_names() -> None:
    days = charts.starts(datetime.now(UTC) - timedelta(days=3), charts.DAY)
    for chart in (
        charts.over_time(days, {"success": {days[0]: 3}, "error": {}}),
        charts.over_time(days, {}),
        charts.ranking([("<b>", 5), ("b", 1)]),
        charts.ranking([]),
    ):
        kind, _, content = chart.partition("base64,")
        assert kind.startswith("data:image/svg+xml")
        svg = base64.b64decode(content).decode()
        assert "<b>" not in svg
        assert not re.findall(r'(?:href|src)="|url\(|@import', svg)


async def test_texts_of_the_database_are_escaped(site: Site) -> None:
    async with site.database.session() as session:
        evil = await factories.account(session, account_name="<script>alert(1)</script>")
        (event, *_) = await crud.audit_logs.search(session, action=AuditAction.DATA_QUERY)
    async with site.visitor(site.rows.reader) as visitor:
        for path in ("/accounts", f"/accounts/{evil.id}", "/accounts?search=<script>alert(1)"):
            page = await visitor.get(path)
            assert "<script" not in page.text
            assert "&lt;script&gt;alert(1)" in page.text
        page = await visitor.get(f"/events/{event.id}")
        assert "&lt;b&gt;AAPL&lt;/b&gt;" in page.text


async def test_a_login_stores_the_key_in_a_cookie_that_no_script_and_no_other_site_gets(
    site: Site,
) -> None:
    async with site.visitor() as visitor:
        answer = await visitor.post("/login", data={"raw_key": f" {site.rows.reader} "})
        assert (answer.status_code, answer.headers["location"]) == (303, "/accounts")
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith(f"tiger_db_dashboard={site.rows.reader};")
        assert {"httponly", "samesite=strict"} <= set(cookie.lower().split("; "))
        assert (await visitor.get("/accounts")).status_code == 200
        assert (await visitor.get("/")).headers["location"] == "/accounts"
        assert (await visitor.post("/logout")).headers["location"] == "/login"
        assert (await visitor.get("/accounts")).status_code == 401
    async with site.database.session() as session:
        (event,) = await crud.audit_logs.search(session, action=AuditAction.DASHBOARD_LOGIN)
    assert event.user_id == site.rows.reader[: len(event.user_id or "")]
    assert str(event.ip_address) == "192.0.2.1"


async def test_an_encrypted_connection_makes_the_cookie_secure(site: Site) -> None:
    secure = "https://127.0.0.1:8000"
    async with site.visitor(origin=secure) as visitor:
        form = {"raw_key": site.rows.reader}
        answer = await visitor.post(f"{secure}/login", data=form)
    assert "; secure" in answer.headers["set-cookie"].lower()


async def test_a_key_that_the_dashboard_does_not_accept_is_refused(site: Site) -> None:
    rows = site.rows
    for raw_key, status, text in (
        (None, 401, "Log in"),
        ("nonsense", 401, "Enter a valid API key."),
        (rows.reader[:-1] + "_", 401, "Enter a valid API key."),
        (rows.other, 403, "dashboard:read"),
        (rows.bound, 403, "bound to an account"),
    ):
        async with site.visitor(raw_key) as visitor:
            for path in (*LISTS, f"/accounts/{rows.account}"):
                page = await visitor.get(path)
                assert page.status_code == status
                assert text in page.text
                assert "Growth" not in page.text
            form = await visitor.post("/login", data={"raw_key": raw_key or "x"})
            assert form.status_code == status
            assert "set-cookie" not in form.headers


async def test_a_key_at_its_limit_is_told_when_to_come_back(site: Site) -> None:
    async with site.visitor(site.rows.limited) as visitor:
        assert (await visitor.get("/accounts")).status_code == 200
        page = await visitor.get("/accounts")
    assert page.status_code == 429
    assert 0 < int(page.headers["retry-after"]) <= 3600


async def test_a_form_needs_the_scope_for_writing_and_comes_from_the_dashboard(site: Site) -> None:
    forms = ("/pause", "/resume", f"/accounts/{site.rows.account}/refresh")
    data = {"reason": "x"}
    async with site.visitor(site.rows.reader) as visitor:
        for form in forms:
            page = await visitor.post(form, data=data)
            assert page.status_code == 403
            assert "dashboard:write" in page.text
    foreign = (
        None,
        "null",
        "http://evil.example",
        "http://127.0.0.1:8001",
        "https://127.0.0.1:8000",
    )
    for origin in foreign:
        async with site.visitor(site.rows.writer, origin) as visitor:
            for form in (*forms, "/login", "/logout"):
                page = await visitor.post(form, data={**data, "raw_key": site.rows.writer})
                assert page.status_code == 403
                assert "submitted by another site" in page.text
                assert "set-cookie" not in page.headers
    async with site.database.session() as session:
        assert not await crud.api_keys.is_paused(session)


async def test_requests_that_name_nothing_or_nonsense_get_a_clear_page(site: Site) -> None:
    async with site.visitor(site.rows.writer) as visitor:
        cursor = re.findall(r'after=([\w-]+)"', (await visitor.get("/keys")).text)[0]
        for path, status in {
            "/nowhere": 404,
            **{f"/{kind}/{uuid4()}": 404 for kind in ("accounts", "keys", "events", "refreshes")},
            "/accounts/7": 422,
            "/accounts?status=asleep": 422,
            "/accounts?colour=red": 422,
            "/accounts?after=nonsense": 422,
            f"/keys?after={cursor}&status=active": 422,
            f"/accounts?after={cursor}": 422,
            "/events?action=NO": 422,
            "/events?ip_address=x": 422,
            "/pause": 405,
        }.items():
            page = await visitor.get(path)
            assert page.status_code == status, path
            assert f"<h1>{status}</h1>" in page.text
        assert (await visitor.post("/pause", data={"reason": " "})).status_code == 422
        assert (await visitor.post(f"/accounts/{uuid4()}/refresh")).status_code == 404
        async with site.database.session() as session:
            (closed, *_) = await crud.accounts.list_accounts(session, status=AccountStatus.CLOSED)
        page = await visitor.post(f"/accounts/{closed.id}/refresh")
        assert page.status_code == 409
        assert "the account is closed" in page.text


async def test_without_the_database_a_page_says_so(site: Site) -> None:
    settings = Settings(database_url="postgresql://user:hidden@127.0.0.1:1/none")
    async with Database(settings) as unreachable, site.visitor(site.rows.reader) as visitor:
        app.state.database, app.state.verifier = unreachable, KeyVerifier(unreachable)
        page = await visitor.get("/accounts")
    assert page.status_code == 503
    assert str(errors.DatabaseUnavailable()) in page.text.replace("&#39;", "'")
    assert "hidden" not in page.text


@pytest.mark.slow
async def test_the_pause_is_shown_on_every_page_and_attributed(site: Site) -> None:
    async with site.visitor(site.rows.writer) as visitor:
        answer = await visitor.post("/pause", data={"reason": "<b>flash</b> crash"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/events?action=trading")
        try:
            one = f"/accounts/{site.rows.account}"
            for path in (*LISTS, one, f"/keys/{site.rows.key}", f"/keys/{uuid4()}"):
                page = await visitor.get(path)
                assert "Trading is paused." in page.text
                assert "&lt;b&gt;flash&lt;/b&gt; crash" in page.text
        finally:
            await visitor.post("/resume", data={"reason": "calm again"})
        assert "Trading is enabled." in (await visitor.get("/accounts")).text
    async with site.database.session() as session:
        events = await crud.audit_logs.search(session, action="trading")
    assert [event.action for event in events] == ["trading:resume", "trading:pause"]
    for event in events:
        assert event.user_type == "api_key"
        assert event.user_id is not None
        assert site.rows.writer.startswith(event.user_id)
        assert str(event.ip_address) == "192.0.2.1"


@pytest.mark.slow
async def test_refresh_now_waits_for_the_worker(site: Site) -> None:
    async with site.database.session() as session:
        account = await factories.account_with_token(session)
        await factories.refresh(
            session, account, scheduled_at=datetime.now(UTC) + timedelta(days=1)
        )
    async with (
        working(site.database, at_once),
        site.visitor(site.rows.writer) as visitor,
    ):
        answer = await visitor.post(f"/accounts/{account.id}/refresh")
        assert answer.status_code == 303
        page = await visitor.get(answer.headers["location"])
    assert 'class="badge success"' in page.text


async def test_refresh_now_without_a_worker_shows_that_the_refresh_is_open(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.dashboard.app.REFRESH_TIMEOUT", timedelta(0))
    async with site.visitor(site.rows.writer) as visitor:
        answer = await visitor.post(f"/accounts/{site.rows.account}/refresh")
        page = await visitor.get(answer.headers["location"])
    assert 'class="badge pending"' in page.text
    assert "The refresh is open." in page.text


async def test_a_revoked_key_ends_its_login(site: Site) -> None:
    async with site.database.session() as session:
        key, raw_key = await factories.api_key(session, scopes=[APIKeyScope.DASHBOARD_READ])
    async with site.visitor(raw_key) as visitor:
        assert (await visitor.get("/keys")).status_code == 200
        async with site.database.session() as session:
            await crud.api_keys.revoke(session, key.id)
        assert (await visitor.get("/keys")).status_code == 401
