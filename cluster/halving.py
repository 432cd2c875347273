"""Work on many items of which one may kill or hang its worker: that item is found by halves and left out.

    whole, max_attempts times --spent--> halves, and halves of those that fail; a single item twice
        --> whole again, without what was found --> done

The items alone decide what is found, so it is the same on any worker. The results of halves are thrown away and only
the whole counts, so where nothing is found nothing changes. Left out: items that kill together and not alone. When
nothing more is found, the whole is tried once more, and then the run stops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.faults import Fault, RunError
from cluster.pool import Pool
from cluster.work import Work

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

# workers over one piece of work; to find one item of 64 takes about eight, with those that were lost over the whole
MOST_LOST = 40
_ALONE = 2  # times a single item must fail: once may be a coincidence
_WHY = {Fault.WORKER_LOST: "killed its worker", Fault.EXPIRED: "hung its worker"}


class Halving:
    """The search alone, without the work.

    `tries()` yields one set of items after another and is sent "" if that set was done, or the reason why it failed.
    found: item -> reason, in the order of the items.
    """

    def __init__(self, group_of: Callable[[int], int]) -> None:
        """group_of: item -> its group. Once an item is found, the others of its group are not tried."""
        self.found: dict[int, str] = {}
        self._group_of = group_of

    def tries(self, items: Sequence[int]) -> Generator[tuple[int, ...], str, None]:
        """Search among items that have failed together."""
        yield from self._among(tuple(items))

    def _among(self, items: tuple[int, ...]) -> Generator[tuple[int, ...], str, bool]:
        """Search items that failed together, without trying all of them again; returns whether any was found."""
        before = len(self.found)
        if len(items) == 1:
            whys: list[str] = []
            while len(whys) < _ALONE and (why := (yield items)):
                whys.append(why)
            if len(whys) == _ALONE:
                self.found[items[0]] = whys[-1]
        elif items:
            middle = len(items) // 2
            failed = yield from self._try(items[:middle])
            rest = self._of_use(items[middle:])
            yield from self._try(rest) if failed else self._among(rest)  # one of the two must have failed
        return len(self.found) > before

    def _try(self, items: tuple[int, ...]) -> Generator[tuple[int, ...], str, bool]:
        if len(items) > 1 and not (yield items):
            return False
        return (yield from self._among(items))

    def _of_use(self, items: tuple[int, ...]) -> tuple[int, ...]:
        groups = {self._group_of(item) for item in self.found}
        return tuple(item for item in items if self._group_of(item) not in groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class DivisibleWork:
    """Like `Work`, on many items.

    send(handle, attempt, without) does the work without those items. on_done(report, data, found) also receives the
    items that were found, item -> reason; the result lacks them and the rest of their groups. on_found is called for
    each item that is found, on_search when the search begins.
    """

    phase: str
    items: Sequence[int]
    group_of: Callable[[int], int]
    send: Callable[[Any, int, frozenset[int]], tuple[ObjectRef[Any], ...]]
    on_done: Callable[[Any, tuple[ObjectRef[Any], ...], Mapping[int, str]], None]
    on_input_lost: Callable[[], None] | None = None
    on_retry: Callable[[], None] | None = None
    on_search: Callable[[], None] = lambda: None
    on_found: Callable[[int, str], None] = lambda item, why: None
    timeout_s: float | None = None


def submit_divisible(pool: Pool, work: DivisibleWork, known: Mapping[int, str] | None = None) -> None:
    """Submit work, without items that are `known` to kill, item -> reason. Raises what `Pool.submit` raises."""
    _Search(pool, work, dict(known or {})).whole(first=False)


@dataclass(slots=True)
class _Search:
    """One piece of divisible work. All that it submits has one cause, so that its losses are one incident."""

    pool: Pool
    work: DivisibleWork
    found: dict[int, str]
    cause: object = field(default_factory=object)
    attempts: int = 0  # so far, of the whole and of halves
    lost: int = 0
    is_over: bool = False  # it can find no more

    @property
    def without(self) -> frozenset[int]:
        groups = {self.work.group_of(item) for item in self.found}
        return frozenset(item for item in self.work.items if self.work.group_of(item) in groups)

    def whole(self, *, first: bool) -> None:
        """Submit all items except those found and their groups."""
        self._submit(
            self.work.phase,
            self.without,
            on_done=lambda report, data: self.work.on_done(report, data, self.found),
            on_spent=self._spent,
            first=first,
        )

    def _spent(self, fault: Fault) -> bool:
        if self.is_over:
            return False
        log.warning(
            "'%s' killed or hung every worker that it was given to; looking for the sample that is to blame",
            self.work.phase,
        )
        self.work.on_search()
        halving = Halving(self.work.group_of)
        left = [item for item in self.work.items if item not in self.without]
        self._next(halving, halving.tries(left), None)
        return True

    def _next(self, halving: Halving, tries: Generator[tuple[int, ...], str, None], why: str | None) -> None:
        """Go on with the search. why: reason why the last try failed; "" if it was done, None before the first."""
        known = len(halving.found)
        try:
            items = next(tries) if why is None else tries.send(why)
        except StopIteration:
            items = ()
        if len(halving.found) > known:
            item, reason = list(halving.found.items())[-1]
            log.warning("'%s': sample %d %s", self.work.phase, item, reason)
            self.found[item] = reason
            self.pool.forgive(self.cause)
            self.work.on_found(item, reason)
        if not items:
            self.is_over = not halving.found
            if self.work.on_retry is not None:
                self.work.on_retry()
            self.whole(first=True)
            return
        without = frozenset(self.work.items) - frozenset(items)
        phase = f"{self.work.phase}, {len(items)} of its {len(self.work.items)} samples"

        def failed(fault: Fault) -> bool:
            self._stop_if_it_does_not_end(fault)
            self._next(halving, tries, _WHY[fault])
            return True

        self._submit(
            phase,
            without,
            on_done=lambda report, data: self._next(halving, tries, ""),
            on_spent=failed,
            first=True,
            attempts=1,
        )

    def _submit(
        self,
        phase: str,
        without: frozenset[int],
        *,
        on_done: Callable[[Any, tuple[ObjectRef[Any], ...]], None],
        on_spent: Callable[[Fault], bool],
        first: bool,
        attempts: int | None = None,
    ) -> None:
        before = self.attempts

        def send(worker: Any, attempt: int) -> tuple[ObjectRef[Any], ...]:
            self.attempts = before + attempt
            return self.work.send(worker, self.attempts, without)

        self.pool.submit(
            Work(
                phase=phase,
                send=send,
                on_done=lambda report, data, attempt: on_done(report, data),
                on_input_lost=self.work.on_input_lost,
                on_retry=self.work.on_retry if attempts is None else None,
                on_spent=on_spent,
                timeout_s=self.work.timeout_s,
                attempts=attempts,
                cause=self.cause,
            ),
            first=first,
        )

    def _stop_if_it_does_not_end(self, fault: Fault) -> None:
        self.lost += 1
        if self.lost >= MOST_LOST:
            found = f"{len(self.found)} of its {len(self.work.items)} samples were found to be to blame"
            cause = (
                f"it killed or hung {self.lost} workers while the samples to blame were looked for, and {found} so far"
            )
            raise RunError(
                self.pool.role,
                self.work.phase,
                cause,
                "Look at what the workers' logs end with; this is not a matter of single samples.",
                fault,
            )
