"""The actor: the user or service that audit events are attributed to."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address
from uuid import UUID

from tiger_db.models import AuditLog
from tiger_db.models.audit_logs import sanitize
from tiger_db.public import public

UNATTRIBUTED = "unattributed"
# An audit event gets user_id and user_type from one source: from the caller, or from the actor.
_IDENTITY = {"user_id", "user_type"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The user or service that audit events are attributed to, and the details of its request.

    The fields of an Actor are converted like the fields of an `AuditLog`: long texts are shortened,
    secrets are masked, and an invalid IP address becomes None. `api_key_id` is the API key that the
    user uses. An event about another API key has the id of the other key. If an Actor has no user
    id and no user type, its user type is `unattributed`.
    """

    user_id: str | None = None
    user_type: str | None = None
    ip_address: str | IPv4Address | IPv6Address | None = None
    user_agent: str | None = None
    session_id: str | None = None
    request_id: str | None = None
    request_method: str | None = None
    request_path: str | None = None
    api_key_id: UUID | None = None

    def __post_init__(self) -> None:
        values = sanitize({name: getattr(self, name) for name in ACTOR_FIELDS})
        if not (values["user_id"] or values["user_type"]):
            values["user_type"] = UNATTRIBUTED
        for name in ACTOR_FIELDS:
            object.__setattr__(self, name, values[name])


# The table audit_logs has a column for each field of an Actor, with the same name.
ACTOR_FIELDS = tuple(field.name for field in fields(Actor))
_current: ContextVar[Actor] = ContextVar("tiger_db_actor", default=Actor())  # noqa: B039  # the class Actor is immutable


@public
@contextmanager
def acting_as(actor: Actor) -> Iterator[None]:
    """Attribute the audit events of a `with` block, and of tasks started in the block, to an actor.

    The actor of a session (`Database.session(actor=...)`) takes precedence over `acting_as`.

    Raises:
        InvalidValue: the argument `actor` is not an `Actor`.
    """
    token = _current.set(actor)
    try:
        yield
    finally:
        _current.reset(token)


def actor_in_force(explicit: Actor | None = None) -> Actor:
    """Return the actor `explicit`, or the actor of `acting_as`, or an unattributed actor."""
    return explicit or _current.get()


def attribute(event: AuditLog, explicit: Actor | None = None) -> AuditLog:
    """Fill the empty fields of an audit event from the actor in force, and return the event.

    Call `attribute` once for each audit event, in the task that records the event. If the event
    already has a user id or a user type, `attribute` does not change the user id and user type.
    """
    actor, given = actor_in_force(explicit), vars(event)
    identified = given.get("user_id") or given.get("user_type")
    for name in ACTOR_FIELDS:
        value = getattr(actor, name)
        if value is None or given.get(name) or (identified and name in _IDENTITY):
            continue
        given[name] = value  # only events whose row is not inserted yet get here
    return event
