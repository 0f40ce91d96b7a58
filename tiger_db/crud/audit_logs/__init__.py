"""The audit trail: events go in and are read; nothing here changes one."""

from tiger_db.crud.audit_logs.reading import (
    Criteria,
    Statistics,
    get_recent_events,
    get_security_events,
    search,
    statistics,
)
from tiger_db.crud.audit_logs.writing import EventFields, log_event, log_events, record_event

__all__ = [
    "Criteria",
    "EventFields",
    "Statistics",
    "get_recent_events",
    "get_security_events",
    "log_event",
    "log_events",
    "record_event",
    "search",
    "statistics",
]
