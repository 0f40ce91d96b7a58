"""Traces of OpenTelemetry's instrumentation of SQLAlchemy."""

import pytest
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support import factories
from tiger_db import Database, crud

SECRET = "hunter2-never-shown"


async def test_a_trace_shows_statements_and_nothing_secret(clone: Database) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    instrumentor = SQLAlchemyInstrumentor()
    instrumentor.instrument(
        engine=clone.engine.sync_engine, tracer_provider=provider, skip_dep_check=True
    )
    try:
        async with clone.session() as session:
            account = await factories.account(session, private_key=SECRET, tiger_id="20159876")
            key, raw_key = await factories.api_key(session)
            await crud.accounts.get(session, account.id)
            # The one is refused by asyncpg, the other by the server; both quote the value.
            for wrong in ("CAST(:secret AS int)", "CAST(CAST(:secret AS text) AS int)"):
                with pytest.raises(DBAPIError, match=key.key_prefix):
                    await session.execute(text(f"SELECT {wrong}"), {"secret": raw_key})
                await session.rollback()
    finally:
        instrumentor.uninstrument()
        provider.shutdown()
    finished = spans.get_finished_spans()
    shown = "\n".join(span.to_json() for span in finished)
    assert "INSERT INTO tiger_accounts" in shown
    assert any("FROM tiger_accounts" in span.to_json() for span in finished)
    for secret in (SECRET, "20159876", raw_key, raw_key.rpartition("_")[2], str(account.id)):
        assert secret not in shown
    assert account.account_number not in shown
    assert key.key_prefix not in shown
    assert "22P02" in shown, "what kind of error it was"
