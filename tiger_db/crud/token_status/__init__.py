"""Token refreshes: scheduling them, claiming them, and what became of them.

A claim is a `TokenStatus` as `claim_due` returned it. It is good until its lease expires and
someone else claims the refresh: the fencing token then no longer matches, and nothing can be done
with it any more. All times are the database's.
"""

from tiger_db.crud.token_status.claims import (
    claim,
    claim_due,
    give_back,
    heartbeat,
)
from tiger_db.crud.token_status.outcomes import (
    complete,
    fail,
    fail_expired_leases,
    fail_unknown,
    token_hash,
)
from tiger_db.crud.token_status.queries import (
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
    retry,
    schedule_due,
)

__all__ = [
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
    "retry",
    "schedule_due",
    "statistics",
    "token_hash",
]
