"""The content of events as PostgreSQL rendered it for the seals of earlier releases."""

from tiger_db.audit.event_content import CONTENT_COLUMNS

_ENUMS = ("result", "severity")


def _member(name: str) -> str:
    value = f"pg_catalog.to_json({name})::text"
    if name == "created_at":
        utc = f"pg_catalog.to_json({name} AT TIME ZONE 'UTC')"
        value = f"""'"' || ({utc} #>> '{{}}'::text[]) || 'Z"'"""
    elif name in _ENUMS:
        value = f"pg_catalog.to_json(pg_catalog.concat({name}))::text"
    return f"""'{"{" if name == "id" else ","}"{name}":' || {value}"""


CONTENT = f"pg_catalog.concat({', '.join(map(_member, CONTENT_COLUMNS))}, '}}')"
