"""The actor: the user or service that audit events are attributed to."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address

from sqlalchemy.orm.attributes import set_attribute

from tiger_db.errors import InvalidValue
from tiger_db.models import AuditLog
from tiger_db.models.audit_logs import sanitize

UNATTRIBUTED = "unattributed"
_IDENTITY = {"user_id", "user_type"}  # fields that an event takes from one source only


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The user or service that acts, and the request. Audit events take their fields from it.

    The values are converted as those of an `AuditLog`: a long text is truncated, secrets are
    masked, and an invalid IP address becomes None. Without a user id and a user type, the user type
    is `unattributed`.
    """

    user_id: str | None = None
    user_type: str | None = None
    ip_address: str | IPv4Address | IPv6Address | None = None
    user_agent: str | None = None
    session_id: str | None = None
    request_id: str | None = None

    def __post_init__(self) -> None:
        values = sanitize({name: getattr(self, name) for name in ACTOR_FIELDS})
        if not (values["user_id"] or values["user_type"]):
            values["user_type"] = UNATTRIBUTED
        for name in ACTOR_FIELDS:
            object.__setattr__(self, name, values[name])


ACTOR_FIELDS = tuple(field.name for field in fields(Actor))  # also names of columns of audit_logs
_current: ContextVar[Actor] = ContextVar("tiger_db_actor", default=Actor())  # noqa: B039  # frozen


@contextmanager
def acting_as(actor: Actor) -> Iterator[None]:
    """Attribute the audit events of a code block, and of the tasks that it starts, to an actor.

    The actor of a session (`Database.session(actor=...)`) has precedence.

    Raises:
        InvalidValue: `actor` is not an Actor.
    """
    token = _current.set(require_actor(actor))
    try:
        yield
    finally:
        _current.reset(token)


def require_actor(actor: Actor) -> Actor:
    """Return an actor unchanged. Raise InvalidValue if it is not an Actor."""
    if not isinstance(actor, Actor):
        raise InvalidValue("actor must be an Actor")
    return actor


def actor_in_force(explicit: Actor | None = None) -> Actor:
    """Return the explicit actor, or else that of `acting_as`, or else an unattributed actor."""
    return explicit or _current.get()


def attribute(event: AuditLog, explicit: Actor | None = None) -> AuditLog:
    """Set the empty fields of an audit event from the actor in force, and return the event.

    Call it once for each event, in the task of the caller. If the event has a user id or a user
    type, both fields stay unchanged.
    """
    actor, given = actor_in_force(explicit), vars(event)
    identified = given.get("user_id") or given.get("user_type")
    for name in ACTOR_FIELDS:
        value = getattr(actor, name)
        if value is None or given.get(name) or (identified and name in _IDENTITY):
            continue
        set_attribute(event, name, value)
    return event
