"""CRUD functions that record, search and count audit events. Recorded events never change."""

from tiger_db.crud.audit_logs.queries import (
    AddressOrNetwork,
    EventCount,
    EventDimension,
    EventFieldFilters,
    EventFilters,
    get,
    get_recent_events,
    get_security_events,
    search,
    statistics,
)
from tiger_db.crud.audit_logs.recording import (
    EventFields,
    IntentFields,
    SessionSource,
    log_event,
    log_events,
    record_event,
    recorded,
)

__all__ = [
    "AddressOrNetwork",
    "EventCount",
    "EventDimension",
    "EventFieldFilters",
    "EventFields",
    "EventFilters",
    "IntentFields",
    "SessionSource",
    "get",
    "get_recent_events",
    "get_security_events",
    "log_event",
    "log_events",
    "record_event",
    "recorded",
    "search",
    "statistics",
]
