"""Compares events with the seals that cover them, and tells what happened where they differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tiger_db.audit.seal_format import DIGEST, FIRST, Runs, Seal, Statement, digest_of, merkle_root
from tiger_db.audit.storage import event_id
from tiger_db.errors import InvalidValue

_NAMED = 1000  # findings; more are counted
_REMEMBERED = 100_000  # events out of place, to tell what was moved from what was deleted
_SKEW = timedelta(seconds=5)  # by which the clock may go back without a seal that shows it
# Where an event's content has its time, to the second: after {"id":"…","created_at":"
_TIME = slice(59, 78)


class Kind(StrEnum):
    CHANGED = "changed"
    DELETED = "deleted"
    INSERTED = "inserted later"
    MOVED = "moved"
    TRUNCATED = "truncated at the end"
    FORGED = "seal forged"
    CHECKPOINT = "checkpoint mismatch"


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and where: a seal, or an event's place and, if it is there, its id."""

    kind: Kind
    message: str
    seal: int | None = None
    position: int | None = None
    event_id: str | None = None


@dataclass(slots=True)
class Verification:
    """What was checked. `findings` are in the order of the trail, the first 1,000 of `count`."""

    seals: int = 0
    rows: int = 0
    retired: int = 0
    unsealed: int = 0
    count: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return self.count == 0


@dataclass(slots=True)
class _Odd:
    """A place whose event is not the one that was sealed."""

    seal: int
    expected: bytes | None = None
    found: bytes | None = None
    event_id: str | None = None


class Check:
    """Is given each seal, in order, and after it the events in its places, in order."""

    def __init__(self, keys: Sequence[Ed25519PublicKey], checkpoint: Seal | None = None) -> None:
        self.upto = 0  # the last place that the seals until now cover
        self._keys = keys
        self._checkpoint = checkpoint
        self._report = Verification()
        self._found: list[tuple[int, Finding]] = []
        self._retired: Runs = ()
        self._number = 0
        self._previous = FIRST
        self._unknown = -(2**63) - 1  # up to this place, the seals are missing
        self._lost_track = False
        self._expected: dict[int, bytes] = {}
        self._last = 0  # the last place in which a sealed event was
        self._now = "9"
        self._next_floor = ""
        self._floor = ""  # no event that comes now was written before this time
        self._backdated: list[tuple[int, _Odd]] = []
        self._odd: dict[int, _Odd] = {}
        self._extra: list[tuple[int, _Odd]] = []
        self._known_checkpoint = checkpoint is None
        if checkpoint is not None and not checkpoint.signed_by(keys):
            self._find(0, Kind.CHECKPOINT, "the checkpoint is not signed by a given key")
            self._known_checkpoint = True

    def retired(self, seals: Iterable[Seal]) -> None:
        """Is told beforehand which events have left, by seals that are signed."""
        runs = [
            run
            for seal in seals
            if seal.signed_by(self._keys) and (said := seal.statement()).retired is not None
            for run in said.positions
        ]
        self._retired = tuple(sorted(runs))

    def seal(self, seal: Seal) -> None:
        self._close()
        self._floor = self._next_floor
        self._report.seals += 1
        try:
            statement = seal.statement()
        except InvalidValue as error:
            self._number += 1
            self._forged(str(error))
            self._lost_track = True
            return
        self._follow(statement)
        self._number, self._previous = statement.number, seal.digest
        expected = seal.expected(statement)
        if not seal.signed_by(self._keys):
            self._forged("it is not signed by a given key")
        elif statement.retired is None and (
            len(seal.digests) != statement.rows * DIGEST
            or merkle_root(expected).hex() != statement.root
        ):
            self._forged("its digests do not make its root")
        if self._checkpoint is not None and not self._known_checkpoint:
            self._compare_checkpoint(seal, statement, self._checkpoint.statement())
        if statement.retired is None:
            # A forged one may cover again what others covered.
            self._expected = {at: digest for at, digest in expected if at > self.upto}
            self._leave_out_retired(statement)
        self.upto = max(self.upto, statement.upto)
        if statement.sealed_at[:19] < self._floor:
            self._floor = ""  # the clock went back
        self._next_floor = _second(statement.closed_at) or self._floor

    def now(self, time: str) -> None:
        """Is told the database's time: if that went back, no event can be told by its own."""
        self._now = time[:19]

    def _follow(self, statement: Statement) -> None:
        """Whether it is the one that comes next."""
        if statement.number != self._number + 1 or self._lost_track:
            if not self._lost_track:
                first, last = self._number + 1, statement.number - 1
                self._find(
                    self.upto,
                    Kind.FORGED,
                    f"the seals from {first} to {last} are missing"
                    if first <= last
                    else f"where seal {first} should be is seal {statement.number}",
                    seal=first,
                )
            self._lost_track = False
            self._unknown = statement.after
        elif statement.previous != self._previous:
            self._number = statement.number
            self._forged("the seal before it is not the one that it was made after")
        elif statement.after != self.upto and statement.retired is None:
            self._number = statement.number
            self._forged("it does not start where the one before it ends")

    def _compare_checkpoint(self, seal: Seal, statement: Statement, head: Statement) -> None:
        if statement.number == head.number:
            self._known_checkpoint = True
            if self._checkpoint is not None and seal.text != self._checkpoint.text:
                self._find(
                    self.upto,
                    Kind.CHECKPOINT,
                    f"seal {head.number} is not the one in the checkpoint",
                    seal=head.number,
                )

    def _leave_out_retired(self, statement: Statement) -> None:
        for first, last in self._retired:
            if first <= statement.upto and last > statement.after:
                for place in range(max(first, statement.after + 1), min(last, statement.upto) + 1):
                    if self._expected.pop(place, None) is not None:
                        self._report.retired += 1

    def event(self, place: int, content: str) -> None:
        digest = digest_of(content)
        if place > self.upto:
            self._unsealed(place, content, digest)
            return
        if content[_TIME] < self._floor:
            self._backdated.append((place, _Odd(self._number, event_id=event_id(content))))
        expected = self._expected.pop(place, None)
        if expected == digest:
            self._report.rows += 1
            self._last = max(self._last, place)
        elif expected is not None:
            self._last = max(self._last, place)
            self._odd[place] = _Odd(self._number, expected, digest, event_id(content))
        elif (odd := self._odd.get(place)) is not None and odd.expected == digest:
            # The event that belongs here came second.
            self._report.rows += 1
            del self._odd[place]
            self._remember(place, _Odd(self._number, found=odd.found, event_id=odd.event_id))
        elif place > self._unknown:
            self._remember(place, _Odd(self._number, found=digest, event_id=event_id(content)))

    def _unsealed(self, place: int, content: str, digest: bytes) -> None:
        self._report.unsealed += 1
        if self._odd or self._expected:  # one of them may be here
            self._remember(place, _Odd(0, found=digest, event_id=event_id(content)))
        if content[_TIME] < self._next_floor <= self._now:
            self._backdated.append((place, _Odd(self._number + 1, event_id=event_id(content))))

    def _remember(self, place: int, odd: _Odd) -> None:
        if len(self._extra) < _REMEMBERED:
            self._extra.append((place, odd))
        elif odd.seal:
            self._report.count += 1

    def _close(self) -> None:
        """What is expected still, is not there."""
        for place, digest in self._expected.items():
            if len(self._odd) < _REMEMBERED:
                self._odd[place] = _Odd(self._number, digest)
            else:
                self._report.count += 1
        self._expected = {}

    def finish(self) -> Verification:
        """The report, when everything was given."""
        self._close()
        self._name_what_is_odd()
        if self._checkpoint is not None and not self._known_checkpoint:
            self._miss_checkpoint(self._checkpoint.statement())
        self._found.sort(key=lambda found: found[0])
        self._report.findings = [finding for _, finding in self._found[:_NAMED]]
        return self._report

    def _miss_checkpoint(self, head: Statement) -> None:
        first = self._number + 1
        if first == head.number and self._previous != head.previous:
            kind, text = (
                Kind.CHECKPOINT,
                f"seal {self._number} is not the one before the checkpoint",
            )
        else:
            kind = Kind.TRUNCATED
            text = f"the seals from {first} to {head.number}, of the checkpoint, are missing"
        self._find(self.upto + 1, kind, text, seal=first)

    def _name_what_is_odd(self) -> None:
        elsewhere = {odd.found: (place, odd.event_id) for place, odd in self._extra}
        elsewhere |= {o.found: (at, o.event_id) for at, o in self._odd.items() if o.found}
        wanted = {odd.expected: place for place, odd in self._odd.items()}
        for place, odd in self._odd.items():
            now = elsewhere.get(odd.expected)
            if now is not None:
                odd.event_id = now[1]
                text = f"the event of place {place} is in place {now[0]}"
                self._event(Kind.MOVED, text, place, odd)
            elif odd.found is not None:
                came_from = wanted.get(odd.found)
                if came_from is None:
                    self._event(Kind.CHANGED, f"the event in place {place} was changed", place, odd)
                else:
                    text = f"in place {place} is the event of place {came_from}"
                    self._event(Kind.MOVED, text, place, odd)
            elif place > self._last:
                text = f"the event in place {place} is missing, and all after it"
                self._event(Kind.TRUNCATED, text, place, odd)
            else:
                text = f"the event in place {place} is missing"
                self._event(Kind.DELETED, text, place, odd)
        for place, odd in self._backdated:
            text = f"the event in place {place} is dated before seal {odd.seal - 1}, made before it"
            self._event(Kind.INSERTED, text, place, odd)
        for place, odd in self._extra:
            if odd.found not in wanted and odd.seal:
                text = f"the event in place {place} came after seal {odd.seal} was made"
                self._event(Kind.INSERTED, text, place, odd)

    def _event(self, kind: Kind, message: str, place: int, odd: _Odd) -> None:
        self._find(place, kind, message, seal=odd.seal, position=place, event_id=odd.event_id)

    def _forged(self, why: str) -> None:
        self._find(self.upto, Kind.FORGED, f"seal {self._number}: {why}", seal=self._number)

    def _find(
        self,
        order: int,
        kind: Kind,
        message: str,
        *,
        seal: int | None = None,
        position: int | None = None,
        event_id: str | None = None,
    ) -> None:
        self._report.count += 1
        self._found.append((order, Finding(kind, message, seal, position, event_id)))


def _second(time: str | None) -> str:
    """A statement's time, less what a clock may differ, to the second; empty: there is none."""
    try:
        return (datetime.fromisoformat(time or "") - _SKEW).isoformat()[:19]
    except (ValueError, OverflowError):
        return ""
