"""Reading of retired events from the archive, as part of the audit trail."""

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from itertools import islice

from tiger_db.audit import storage
from tiger_db.audit.archive_files import Archive, is_of_seals, read_events
from tiger_db.audit.event_content import Event
from tiger_db.audit.months import fetch_retirements
from tiger_db.audit.seal_format import Seal, SealPayload
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState

_BATCH_EVENTS = 1000


async def read_archived_events(
    connection: Connection, archive: Archive
) -> AsyncGenerator[list[Event], None]:
    """Yield the events in files that retirements have signed, in batches in order of position.

    Raises:
        FileError: A file is missing or cannot be read.
        InvalidState: A file differs from the file that the retirement signed, or a seal cannot be
            read.
    """
    payloads = [seal.payload() for seal in await fetch_retirements(connection)]
    events = _merge(archive, payloads)
    while batch := await asyncio.to_thread(lambda: [*islice(events, _BATCH_EVENTS)]):
        yield batch


def _merge(archive: Archive, payloads: Iterable[SealPayload]) -> Iterator[Event]:
    """Yield the events of all months in order of position. Few files are open at a time."""
    waiting = sorted(
        (payload.positions[0][0], payload.number, payload)
        for payload in payloads
        if payload.archive
    )
    waiting.reverse()
    # The next event of each open month, with the number of the retirement as a second key.
    heads: list[tuple[int, int, str, Iterator[Event]]] = []
    while waiting or heads:
        while waiting and (not heads or waiting[-1][0] <= heads[0][0]):
            _, number, payload = waiting.pop()
            events = _read_month(archive, payload)
            for position, content in islice(events, 1):
                heapq.heappush(heads, (position, number, content, events))
        if not heads:
            continue
        position, number, content, events = heads[0]
        yield position, content
        following = next(events, None)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, (following[0], number, following[1], events))


def _read_month(archive: Archive, payload: SealPayload) -> Iterator[Event]:
    for name, _, digest in payload.archive or ():
        if is_of_seals(name):
            continue
        with archive.read(name) as (copy, found):
            if found != digest:
                raise InvalidState(
                    f"the archive: {name} differs from the file that seal {payload.number} signed:"
                    " run `tiger-db verify-audit --archive`"
                )
            yield from read_events(copy)


async def merge_archived_events(
    trail: AsyncIterator[Seal | Event], batches: AsyncIterator[list[Event]]
) -> AsyncGenerator[Seal | Event, None]:
    """Insert the archived events into the trail, each after the seal that covers it."""
    archived = (event async for batch in batches for event in batch)
    following = await anext(archived, None)
    covered = 0
    async for item in trail:
        last = covered if isinstance(item, Seal) else item[0] - 1
        while following is not None and following[0] <= last:
            yield following
            following = await anext(archived, None)
        if isinstance(item, Seal):
            covered = max(covered, storage.extent_of(item)[0])
        yield item
    while following is not None:
        yield following
        following = await anext(archived, None)
