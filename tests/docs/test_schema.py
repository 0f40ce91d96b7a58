"""docs/schema.md is what `make schema` writes."""

import re

from tests.docs.schema import PAGE, page
from tiger_db import Settings
from tiger_db.connections import connect


async def test_the_page_is_up_to_date(settings: Settings) -> None:
    connection = await connect(settings)
    try:
        wanted = await page(connection)
    finally:
        await connection.close()
    assert PAGE.read_text(encoding="utf-8") == wanted, "out of date: run `make migrate schema`"


def test_the_diagram_keeps_to_what_mermaid_can_read() -> None:
    (diagram,) = re.findall(r"```mermaid\nerDiagram\n(.*?)```", PAGE.read_text(), re.DOTALL)
    name = r"[a-z][a-z0-9_]*"
    relation = rf'    {name} (\|\||\|o)--(o\||o\{{) {name} : "[^"\n]+"\n'
    table = rf"    {name} \{{\n(        {name}(\[\])? {name} (PK|FK|UK)(, (PK|FK|UK))*\n)+    \}}\n"
    assert re.fullmatch(f"({relation})+({table})+", diagram)
