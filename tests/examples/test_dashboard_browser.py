"""The dashboard in headless Chromium, which `apt-get install chromium` installs on Debian.

With TIGER_DB_SCREENSHOTS=1 (`make screenshots`), the test writes the pictures of docs/dashboard.md.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from playwright.async_api import ConsoleMessage, Page, async_playwright, expect

from examples.dashboard.app import app
from tests.docs.pages import PAGES, ROOT
from tests.support.dashboard_data import Rows, fill
from tests.support.refresh_workers import at_once, working
from tests.support.waiting import until
from tiger_db import Database, KeyVerifier, crud

CHROMIUM = Path("/usr/bin/chromium")
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 400, "height": 900}
MAX_BYTES = 150_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM.exists(), reason="Chromium is not installed: apt-get install chromium"
    ),
]


@asynccontextmanager
async def serving(database: Database) -> AsyncIterator[str]:
    """The address of the dashboard, which uses this database."""
    app.state.database, app.state.verifier = database, KeyVerifier(database)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started or task.done())
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await task


class Visitor:
    """A page of the browser, with the problems and the requests that it has seen."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.problems: list[str] = []
        self.requested: set[str] = set()
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("requestfailed", lambda request: self.problems.append(request.url))
        page.on("request", lambda request: self.requested.add(request.url))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.problems.append(message.text)

    async def open(self, path: str) -> None:
        await self.page.goto(self.url + path)

    async def click(self, name: str) -> None:
        await self.page.get_by_role("link", name=name, exact=True).first.click()

    async def press(self, name: str) -> None:
        await self.page.get_by_role("button", name=name).click()

    async def shows(self, text: str) -> None:
        await expect(self.page.locator("body")).to_contain_text(text)

    async def photograph(self, name: str) -> None:
        """Check that the page fits on a telephone, and write a picture if pictures are wanted."""
        await self.page.wait_for_load_state()  # Without its style sheet, a page can be wider.
        await self.page.set_viewport_size(NARROW)  # type: ignore[arg-type]  # a TypedDict
        assert await self.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        await self.page.set_viewport_size(WIDE)  # type: ignore[arg-type]  # a TypedDict
        image = await self.page.screenshot()
        assert len(image) < MAX_BYTES
        file = f"images/dashboard-{name}.png"
        if os.environ.get("TIGER_DB_SCREENSHOTS") and file in PAGES["docs/dashboard.md"]:
            (ROOT / "docs" / file).write_bytes(image)


@asynccontextmanager
async def visiting(url: str) -> AsyncIterator[Visitor]:
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            page = await browser.new_page(viewport=WIDE)  # type: ignore[arg-type]  # a TypedDict
            yield Visitor(page, url)
        finally:
            await browser.close()


async def test_a_person_looks_around_pauses_resumes_and_refreshes(clone: Database) -> None:
    rows = await fill(clone, events=3000)
    async with serving(clone) as url, visiting(url) as visitor:
        await _visit(clone, rows, visitor)
    assert not visitor.problems
    assert {address for address in visitor.requested if not address.startswith("data:")}
    assert all(address.startswith((f"{url}/", "data:")) for address in visitor.requested)


async def _visit(clone: Database, rows: Rows, visitor: Visitor) -> None:
    await visitor.open("/login")
    await visitor.page.get_by_label("API key").fill(rows.writer)
    await visitor.press("Log in")
    await visitor.shows("Total: 27")
    await visitor.photograph("accounts")
    await visitor.click("Next →")
    await visitor.shows("Birch Paper")
    await visitor.click("← Previous")
    await visitor.click("suspended")
    await visitor.shows("Total: 1")
    await visitor.click("Clear all")
    await visitor.page.get_by_label("Search").fill("oak g")
    await visitor.press("Apply")
    await visitor.shows("Total: 1")

    await visitor.click("Keys")
    await visitor.photograph("keys")
    await visitor.open(f"/keys/{rows.key}")
    await visitor.photograph("key")
    await visitor.click("24 hours")
    await visitor.shows("Accepted uses per hour")

    await visitor.click("Events")
    await visitor.photograph("events")
    await visitor.click("error")
    await visitor.page.locator("tbody a").first.click()
    await visitor.shows("The order exceeds the buying power.")

    await visitor.open("/routing?trading=true&permission=US&environment=PROD")
    await visitor.photograph("routing")

    await visitor.page.get_by_label("Reason").fill("Prices of the feed are wrong")
    await visitor.press("Pause trading")
    await visitor.shows("Trading is paused. Prices of the feed are wrong")
    await visitor.shows("trading:pause")
    await visitor.click("Accounts")
    await visitor.photograph("pause")
    await visitor.press("Resume trading")
    await visitor.shows("Trading is enabled.")
    async with clone.session() as session:
        assert not await crud.api_keys.is_paused(session)

    await visitor.open(f"/accounts/{rows.account}")
    await visitor.photograph("account")
    async with working(clone, at_once):
        await visitor.press("Refresh token now")
        await visitor.shows("Token refresh success")
    await visitor.open("/refreshes")
    await visitor.photograph("refreshes")
    await visitor.press("Log out")
    await visitor.shows("The key needs the scope")
