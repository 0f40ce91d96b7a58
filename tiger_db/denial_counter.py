"""A counter that combines the audit events of many denied API keys into a few events."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from uuid_utils.compat import uuid7

from tiger_db.errors import AccessDenied, TigerDBError
from tiger_db.models import AuditLog
from tiger_db.models.audit_logs import insert_events

if TYPE_CHECKING:
    import asyncpg

GroupKind: TypeAlias = Literal["address", "api_key"]
WRITE_INTERVAL_SECONDS = 60.0
# Number of denials in an interval from which there is a flood.
FLOOD_DENIALS = 100
# Number of API keys, accepted by earlier calls, that do not wait in a flood.
_REMEMBERED_KEYS = 10_000
# Maximum number of denials in an interval that have an event of their own.
_MAX_SINGLE_EVENTS = 300
_OTHERS = "others"  # the group of all denials for which there is no room in groups of their own
# These fields are empty in the event of the group `_OTHERS`.
_FIELDS_OF_ONE_DENIAL = (
    "resource_id", "api_key_id", "tiger_account_id", "ip_address", "user_agent", "request_id",
    "session_id", "user_id", "user_type",
)  # fmt: skip
_logger = logging.getLogger("tiger_db")


class _Limits(NamedTuple):
    """The number of single events of a group, and the number of groups, in an interval."""

    single_events: int
    groups: int


_LIMITS: dict[GroupKind, _Limits] = {"address": _Limits(1, 20), "api_key": _Limits(60, 100)}


@dataclass(slots=True)
class _Group:
    """The denials from one address, or of one API key for one reason.

    `single_events` is the number of denials that may still have an event of their own. `count` is
    the number of denials that have no event yet. `event` is the event of the first of them.
    """

    single_events: int
    count: int = 0
    event: AuditLog | None = None
    since: datetime | None = None


class DenialCounter:
    """A counter of denials, which writes one event per group and minute.

    A DenialCounter belongs to one event loop. A killed process loses the counts of the last minute.
    """

    def __init__(
        self,
        connection: Callable[[], AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]],
    ) -> None:
        self._connection = connection
        self._groups: dict[GroupKind, dict[str, _Group]] = {kind: {} for kind in _LIMITS}
        self._single_events = _MAX_SINGLE_EVENTS
        self._denials, self._earlier_denials = 0, 0  # in this interval, in the interval before
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        # Keyed digests of the API keys that were accepted, the least recently accepted key first.
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        self._digest_key = secrets.token_bytes(32)
        self._turn = asyncio.Semaphore(1)

    def digest(self, raw_key: str) -> bytes:
        """Return a keyed digest of an API key for `admit`, whose frame must not hold the key."""
        return hashlib.blake2b(raw_key.encode(), digest_size=16, key=self._digest_key).digest()

    @asynccontextmanager
    async def admit(self, digest: bytes, *, wait: bool) -> AsyncIterator[bool]:
        """Run a code block that authorizes an API key with this digest.

        The value is whether the call had to wait.

        If `wait` is true, the calls with keys that no earlier call has accepted run one after
        another in a flood of denials. Therefore, they do not slow down the other calls. There is a
        flood if at least `FLOOD_DENIALS` denials occurred in this interval or in the last one.
        """
        is_flood = max(self._denials, self._earlier_denials) >= FLOOD_DENIALS
        must_wait = wait and is_flood and digest not in self._accepted
        async with self._turn if must_wait else nullcontext():
            started = time.monotonic()
            try:
                yield must_wait
            except AccessDenied:
                self._accepted.pop(digest, None)
                if must_wait:
                    # The other calls have the processor for as long as this call has taken.
                    await asyncio.sleep(time.monotonic() - started)
                raise
        self._accepted[digest] = None
        self._accepted.move_to_end(digest)
        if len(self._accepted) > _REMEMBERED_KEYS:
            self._accepted.popitem(last=False)

    def count(self, kind: GroupKind, name: str, build: Callable[[], AuditLog]) -> bool:
        """Count a denial in a group. Return False if the denial must have an event of its own.

        `build` returns the event of the denial.
        """
        groups, limits = self._groups[kind], _LIMITS[kind]
        if name not in groups and len(groups) >= limits.groups:
            name = _OTHERS
        group = groups.setdefault(name, _Group(limits.single_events))
        self._denials += 1
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        if group.single_events and self._single_events:
            group.single_events -= 1
            self._single_events -= 1
            return False
        if group.event is None:
            group.event, group.since = build(), datetime.now(UTC)
        group.count += 1
        return True

    async def close(self) -> None:
        """Write all counts. If the write fails, log the number of lost denials as a warning."""
        self._closing.set()
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            await self._write()
        except TigerDBError as error:
            lost = sum(group.count for groups in self._groups.values() for group in groups.values())
            _logger.warning("%d denials of API keys are not on record: %s", lost, error)
        for groups in self._groups.values():
            groups.clear()
        self._single_events = _MAX_SINGLE_EVENTS
        self._denials = self._earlier_denials = 0
        # After the end of an event loop, the Database can be used in another one.
        self._closing, self._turn = asyncio.Event(), asyncio.Semaphore(1)

    async def _run(self) -> None:
        while any(self._groups.values()):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), WRITE_INTERVAL_SECONDS)
                return
            # After an error of the database, the counts are written in the next interval.
            with suppress(TigerDBError):
                await self._write()

    async def _write(self) -> None:
        """Write the counts, and begin a new interval.

        A group whose denials all had events of their own is forgotten. The other groups have no
        further single events until they are forgotten.
        """
        self._single_events = _MAX_SINGLE_EVENTS
        self._earlier_denials, self._denials = self._denials, 0
        batch: list[tuple[_Group, _Group, AuditLog]] = []
        for groups in self._groups.values():
            for name, group in [*groups.items()]:
                if group.event is None:
                    del groups[name]
                    continue
                counted = groups[name] = _Group(0)
                batch.append((counted, group, _combined(name, group)))
        if not batch:
            return
        try:
            async with self._connection() as connection:
                await insert_events(connection, [event for _, _, event in batch])
        except BaseException:
            for counted, group, _ in batch:
                counted.count += group.count
                counted.event, counted.since = group.event, group.since
            raise


def _combined(name: str, group: _Group) -> AuditLog:
    """Return the event of the counted denials of a group."""
    assert group.event is not None
    assert group.since is not None
    details: dict[str, Any] = {**(group.event.details or {}), "count": group.count}
    details["since"] = group.since.isoformat()
    if "/" in name:
        details["network"] = name
    changes: dict[str, Any] = {"id": uuid7(), "details": details}
    if name == _OTHERS:
        changes |= dict.fromkeys(_FIELDS_OF_ONE_DENIAL)
        details |= {"others": True}
        details.pop("key_prefix", None)
    return group.event.model_copy(update=changes)
