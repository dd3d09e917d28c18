"""A load replayed under simulated time, against the policy itself.

Nothing of the policy is written again here: the queues are `BoundedQueue`s, what comes back
is decided by `may_return` and `rank`, the breakers are `CircuitBreaker`s with the named
policies, capacity is `capacity`, all on one simulated clock. Simulated is what surrounds them:
when blueprints arrive and how long the services take. The services' own rules are followed:
a worker whose kernel finds no room keeps it and tries again (as `retry` has it), an open
compile breaker is probed with a control, a failure that is not the item's puts it back at the
age it has. The workers of a stage share its breaker.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from esper.leyline.events import Priority
from esper.leyline.library import QueueDepths
from esper.oona.breaker import BreakerState, CircuitBreaker, Permit
from esper.oona.capacity import capacity
from esper.oona.load import Arrivals, Load
from esper.oona.queue import (
    KARN_TO_TEZZERET,
    LIMITS,
    TEZZERET_TO_URABRASK,
    URABRASK_VALIDATION,
    URZA_STORAGE,
    BoundedQueue,
    Item,
    lifted,
    may_return,
    rank,
)
from esper.oona.retry import FIRST_PAUSE, JITTER, LONGEST_PAUSE, PATIENCE_SECONDS

SAMPLES = 480  # moments at which depths are noted, over the time of arrivals
DRAIN_SECONDS = 24 * 3600.0  # what is not done by then is left over


@dataclass
class Tally:
    """What became of the arrivals of one priority. `waits` holds, for each that was examined,
    the seconds it waited in both queues; `dropped_kernels` come back when it is calm."""

    arrived: int = 0
    held_back: int = 0
    refused: int = 0
    dropped: int = 0
    dropped_kernels: int = 0
    invalid: int = 0
    validated: int = 0
    left_over: int = 0
    waits: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """The state at one moment, `time` in seconds from the start."""

    time: float
    depths: QueueDepths
    capacity: float
    open_breakers: tuple[str, ...]


@dataclass
class Replay:
    """What happened. `goodput` is validated kernels an hour, while blueprints arrived;
    `longest_wait` is, by priority, of all that was waiting or served, kernels put aside too;
    `wasted_compiles` were given up at a full queue; `faults` were failures of a stage."""

    factor: float
    goodput: float = 0.0
    tallies: dict[Priority, Tally] = field(default_factory=lambda: {p: Tally() for p in Priority})
    longest_wait: dict[Priority, float] = field(default_factory=lambda: dict.fromkeys(Priority, 0.))
    samples: list[Sample] = field(default_factory=list)
    wasted_compiles: int = 0
    faults: int = 0


@dataclass(eq=False)
class _Work:
    priority: Priority
    interest: float
    since: float  # when it arrived
    ready: float = 0.0  # when its kernel was
    waited: float = 0.0

    def item(self) -> Item[_Work]:
        return Item(self, self.priority, self.since, self.interest)


def replay(load: Load, factor: float = 1.0) -> Replay:
    """Replay `load` with every rate of arrival times `factor`; the same seed, the same result."""
    return _Pipeline(load, factor).run()


class _Pipeline:
    """The four queues and what works on them. Time passes from event to event."""

    def __init__(self, load: Load, factor: float) -> None:
        self.load, self.factor = load, factor
        self.result = Replay(factor)
        self.now = 0.0
        self._end = load.hours * 3600
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = count()
        self._random = random.Random(load.seed)
        self._blueprints: BoundedQueue[_Work] = self._queue(KARN_TO_TEZZERET)
        self._kernels: BoundedQueue[_Work] = self._queue(TEZZERET_TO_URABRASK)
        self._shed: list[_Work] = []
        self._proving = self._writing = 0
        self._idle = {"compile": load.compile.workers, "prove": load.prove.workers}
        self._breakers = {
            stage: CircuitBreaker(name, clock=lambda: self.now)
            for stage, name in (("compile", "tezzeret_compilation"),
                                ("prove", URABRASK_VALIDATION), ("store", URZA_STORAGE))
        }
        self._wakes: dict[str, float] = {}
        self._in_work: set[_Work] = set()

    def _queue(self, name: str) -> BoundedQueue[_Work]:
        return BoundedQueue(LIMITS[name], lambda: self.now)

    def run(self) -> Replay:
        for index, stream in enumerate(self.load.arrivals):
            # A generator each, so that one stream's arrivals do not hang on the others.
            self._next_arrival(stream, random.Random(f"{self.load.seed}/{index}"), 0.0)
        while self._events and self._events[0][0] <= self._end + DRAIN_SECONDS:
            time, _, act, given = heapq.heappop(self._events)
            self._sample_until(time)
            self.now = time
            act(*given)
        self._sample_until(self._end)
        self._count_what_is_left()
        return self.result

    def _at(self, delay: float, act: Callable[..., None], *given: Any) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._serial), act, given))

    def _depths(self) -> QueueDepths:
        return QueueDepths(
            karn_to_tezzeret=len(self._blueprints), tezzeret_to_urabrask=len(self._kernels),
            urabrask_validation=self._proving, urza_storage=self._writing,
        )

    def _sample_until(self, time: float) -> None:
        """Between two events nothing changes, so it is enough to look before each."""
        samples = self.result.samples
        while (due := len(samples) * self._end / SAMPLES) <= min(time, self._end):
            samples.append(self._sample(due))

    def _sample(self, time: float) -> Sample:
        depths = self._depths()
        broken = tuple(
            n for n, b in self._breakers.items() if b.state is not BreakerState.CLOSED
        )
        return Sample(time, depths, capacity(depths).factor, broken)

    # Arrivals

    def _next_arrival(self, stream: Arrivals, draw: random.Random, after: float) -> None:
        peak = stream.peak * self.factor
        time = after
        while peak and (time := time + draw.expovariate(peak)) < self._end:
            if draw.random() * peak < stream.rate(time) * self.factor:  # thinning (Lewis, Shedler)
                interest = draw.uniform(*stream.interest)
                self._at(time - self.now, self._arrive, stream, draw, interest)
                return

    def _arrive(self, stream: Arrivals, draw: random.Random, interest: float) -> None:
        work = _Work(lifted(stream.level, interest), interest, self.now)
        tally = self.result.tallies[work.priority]
        tally.arrived += 1
        if stream.heeds_capacity and draw.random() >= capacity(self._depths()).factor:
            tally.held_back += 1
        else:
            admission = self._blueprints.offer(work, work.priority, interest)
            tally.refused += not admission.accepted
            if admission.dropped is not None:
                self.result.tallies[admission.dropped.priority].dropped += 1
            self._compile_more()
        self._next_arrival(stream, draw, self.now)

    # Work

    def _seconds(self, stage: str) -> float:
        given = self.load.stage(stage)
        if not given.spread:
            return given.seconds
        shape = given.spread**-2
        return self._random.gammavariate(shape, given.seconds / shape)

    def _start(self, stage: str, act: Callable[..., None], *given: Any) -> None:
        """Let `stage` work, and `act` be told at the end whether it failed."""
        seconds = self._seconds(stage)
        for outage in self.load.outages:
            start, end = outage.at_minute * 60, (outage.at_minute + outage.minutes) * 60
            if outage.stage == stage and start <= self.now + seconds and self.now < end:
                if outage.hangs:
                    seconds = max(seconds, end - self.now)
                if self.now + seconds <= end:
                    self._at(seconds, act, True, *given)
                    return
        self._at(seconds, act, False, *given)

    def _wake(self, stage: str, act: Callable[[], None]) -> None:
        """Look again when the stage's breaker may let somebody through."""
        time = self.now + max(0.001, self._breakers[stage].retry_after())  # for rounding
        if self._wakes.get(stage, 0.0) <= self.now:
            self._wakes[stage] = time
            self._at(time - self.now, act)

    def _compile_more(self) -> None:
        breaker = self._breakers["compile"]
        while self._idle["compile"]:
            if breaker.state is not BreakerState.CLOSED:
                probe = breaker.acquire()
                if probe is None:
                    self._wake("compile", self._compile_more)
                else:
                    self._idle["compile"] -= 1
                    self._start("compile", self._probed, probe)
                return
            work, permit = self._blueprints.pop(), breaker.acquire()
            if work is None or permit is None:
                return
            self._idle["compile"] -= 1
            self._in_work.add(work)
            work.waited = self.now - work.since
            self._start("compile", self._compiled, work, permit)

    def _probed(self, failed: bool, probe: Permit) -> None:
        (probe.failure if failed else probe.success)()
        self.result.faults += failed
        self._compiler_is_free()

    def _compiler_is_free(self) -> None:
        self._idle["compile"] += 1
        self._compile_more()

    def _put_back(self, queue: BoundedQueue[_Work], work: _Work) -> None:
        self._in_work.discard(work)
        queue.put_back(work.item())

    def _compiled(self, failed: bool, work: _Work, permit: Permit) -> None:
        if failed:
            permit.failure()
            self.result.faults += 1
            self._put_back(self._blueprints, work)
            self._compiler_is_free()
        elif self._random.random() < self.load.compile.invalid:
            self._at(self._seconds("compile"), self._judged_by_the_control, work, permit)
        else:
            permit.success()
            self._write(work, self.now, FIRST_PAUSE)

    def _judged_by_the_control(self, work: _Work, permit: Permit) -> None:
        permit.success()
        self._finish(work, valid=False)
        self._compiler_is_free()

    def _write(self, work: _Work, began: float, pause: float) -> None:
        full = self._writing >= LIMITS[URZA_STORAGE] and work.priority is not Priority.EMERGENCY
        permit = None if full else self._breakers["store"].acquire()
        if permit is None:
            self._later(self._write, work, began, pause)
            return
        self._writing += 1
        self._start("store", self._written, work, permit, began, pause)

    def _written(
        self, failed: bool, work: _Work, permit: Permit, began: float, pause: float
    ) -> None:
        self._writing -= 1
        if failed:
            permit.failure()
            self.result.faults += 1
            self._later(self._write, work, began, pause)
        else:
            permit.success()
            self._hand_over(work, began, pause)

    def _hand_over(self, work: _Work, began: float, pause: float) -> None:
        admission = self._kernels.offer(work, work.priority, work.interest, work.since)
        if not admission.accepted:
            self._later(self._hand_over, work, began, pause)
            return
        self._in_work.discard(work)
        work.ready = self.now
        if (dropped := admission.dropped) is not None:
            self.result.tallies[dropped.priority].dropped_kernels += 1
            self._shed.append(dropped)
        self._compiler_is_free()
        self._prove_more()

    def _later(
        self, act: Callable[[_Work, float, float], None], work: _Work, began: float, pause: float
    ) -> None:
        if self.now - began >= PATIENCE_SECONDS:
            self.result.wasted_compiles += 1
            self._put_back(self._blueprints, work)
            self._compiler_is_free()
            return
        jitter = self._random.uniform(0, JITTER)
        self._at(pause + jitter, act, work, began, min(2 * pause, LONGEST_PAUSE))

    def _prove_more(self) -> None:
        breaker = self._breakers["prove"]
        while self._idle["prove"]:
            if breaker.retry_after():
                if len(self._kernels):
                    self._wake("prove", self._prove_more)
                return
            self._bring_back()
            work = self._kernels.pop()
            if work is None:
                return
            full = self._proving >= LIMITS[URABRASK_VALIDATION]
            if full and work.priority is not Priority.EMERGENCY:
                self._kernels.put_back(work.item())
                return
            permit = breaker.acquire()
            assert permit is not None
            self._bring_back()  # before an arrival takes the place
            self._idle["prove"] -= 1
            self._proving += 1
            self._in_work.add(work)
            self._start("prove", self._proved, work, permit, self.now - work.ready)

    def _bring_back(self) -> None:
        if not self._shed:
            return
        best = min(self._shed, key=lambda w: rank(w.item(), self.now))
        if may_return(best.item(), len(self._kernels), self._kernels.limit, self.now):
            self._shed.remove(best)
            self._kernels.put_back(best.item())

    def _proved(self, failed: bool, work: _Work, permit: Permit, waited: float) -> None:
        self._proving -= 1
        self._idle["prove"] += 1
        if failed:
            permit.failure()
            self.result.faults += 1
            self._put_back(self._kernels, work)
        else:
            permit.success()
            work.waited += waited
            self._finish(work, valid=self._random.random() >= self.load.prove.invalid)
        self._prove_more()

    # Accounts

    def _finish(self, work: _Work, *, valid: bool) -> None:
        self._in_work.discard(work)
        tally = self.result.tallies[work.priority]
        tally.validated += valid
        tally.invalid += not valid
        tally.waits.append(work.waited)
        if valid and self.now <= self._end:
            self.result.goodput += 1 / self.load.hours
        self._note_wait(work, work.waited)

    def _note_wait(self, work: _Work, waited: float) -> None:
        longest = self.result.longest_wait
        longest[work.priority] = max(longest[work.priority], waited)

    def _count_what_is_left(self) -> None:
        left = [*self._in_work, *self._shed]
        for queue in (self._blueprints, self._kernels):
            while (work := queue.pop()) is not None:
                left.append(work)
        for work in left:
            self._note_wait(work, self.now - work.since)
            self.result.tallies[work.priority].left_over += 1
