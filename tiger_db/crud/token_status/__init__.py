"""CRUD functions that schedule and claim token refreshes, and store the outcomes.

A claim is a `TokenStatus` that `claim_due` or `claim` has returned. A claim with an expired lease
stays valid until another worker claims the refresh. Each new claim of a refresh has a higher
fencing token. CRUD functions raise `LeaseLost` for a claim with an older fencing token. All times
are times of the database's clock.
"""

from tiger_db.crud.token_status.claims import claim, claim_due, give_back, heartbeat
from tiger_db.crud.token_status.outcomes import (
    complete,
    fail,
    fail_expired_leases,
    fail_unknown,
    token_hash,
)
from tiger_db.crud.token_status.queries import (
    RefreshFilters,
    RefreshQuery,
    RefreshStatistics,
    get,
    get_failed_refreshes,
    get_latest_status,
    get_pending_refreshes,
    history,
    overview,
    statistics,
)
from tiger_db.crud.token_status.scheduling import (
    cancel,
    create_refresh_operation,
    next_due,
    prune,
    refresh_now,
    retry,
    schedule_due,
)

__all__ = [
    "RefreshFilters",
    "RefreshQuery",
    "RefreshStatistics",
    "cancel",
    "claim",
    "claim_due",
    "complete",
    "create_refresh_operation",
    "fail",
    "fail_expired_leases",
    "fail_unknown",
    "get",
    "get_failed_refreshes",
    "get_latest_status",
    "get_pending_refreshes",
    "give_back",
    "heartbeat",
    "history",
    "next_due",
    "overview",
    "prune",
    "refresh_now",
    "retry",
    "schedule_due",
    "statistics",
    "token_hash",
]
