"""Circuit breakers: stop asking a service that keeps failing, and try it again carefully.

CLOSED lets every call through and remembers the failures of a rolling window. Enough of them
open it. OPEN lets nothing through until the recovery time is over. Then it is HALF_OPEN: one
caller, and only one, gets a probe. Its success closes the breaker, its failure opens it again;
a probe that has not answered in time counts as failed, so a service that hangs cannot keep
the breaker half open for ever.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType, TracebackType
from typing import Self

from esper.errors import ContractError


class BreakerState(StrEnum):
    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """`failures` within `window` seconds open the breaker for `recovery` seconds.

    The design names failures and recovery only. A window of five minutes lets slow work count
    too: five compilations that fail after 25 s each must be able to open a breaker.
    `probe` is how long a half-open probe may take; it covers one compilation or examination
    with the start of its process.
    """

    failures: int
    recovery: float
    window: float = 300.0
    probe: float = 240.0

    def __post_init__(self) -> None:
        if self.failures < 1 or min(self.recovery, self.window, self.probe) <= 0:
            raise ContractError(
                f"a breaker needs at least 1 failure and positive times, given {self}"
            )


POLICIES: Mapping[str, BreakerPolicy] = MappingProxyType(
    {
        "tezzeret_compilation": BreakerPolicy(failures=5, recovery=60.0),
        "urabrask_validation": BreakerPolicy(failures=3, recovery=30.0),
        "urza_storage": BreakerPolicy(failures=10, recovery=120.0, probe=30.0),
    }
)


class Permit:
    """Leave to make one call. Report how it went once; used in `with`, it reports itself.

    A report that comes after the breaker has moved on (a late probe, a call from before it
    opened) changes nothing.
    """

    def __init__(self, breaker: CircuitBreaker, epoch: int) -> None:
        self._breaker = breaker
        self._epoch = epoch
        self._open = True

    def success(self) -> None:
        self._report(failed=False)

    def failure(self) -> None:
        self._report(failed=True)

    def _report(self, failed: bool) -> None:
        if self._open:
            self._open = False
            self._breaker._settle(self._epoch, failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._report(failed=kind is not None)


class CircuitBreaker:
    """One breaker. Thread-safe; nothing happens but by calls, so it needs no thread.

    `_epoch` counts state changes. A permit carries the epoch it was given in, which is how
    late reports are told from current ones.
    """

    def __init__(
        self,
        name: str,
        policy: BreakerPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if policy is None and name not in POLICIES:
            raise ContractError(
                f"no policy is known for breaker {name!r}; name one of {sorted(POLICIES)} or "
                "give a BreakerPolicy"
            )
        self.name = name
        self.policy = policy or POLICIES[name]
        self._clock = clock
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._epoch = 0
        self._failures: deque[float] = deque(maxlen=self.policy.failures)
        self._until = 0.0  # OPEN: when a probe is allowed; HALF_OPEN: when the probe is overdue

    @property
    def state(self) -> BreakerState:
        """The state now. OPEN past its recovery time is OPEN until somebody asks to probe."""
        with self._lock:
            self._overdue(self._clock())
            return self._state

    def acquire(self) -> Permit | None:
        """Leave to call the service, or None where the call must not be made now."""
        with self._lock:
            now = self._clock()
            self._overdue(now)
            if self._state is BreakerState.OPEN and now >= self._until:
                self._enter(BreakerState.HALF_OPEN, now + self.policy.probe)
            elif self._state is not BreakerState.CLOSED:
                return None
            return Permit(self, self._epoch)

    def retry_after(self) -> float:
        """Seconds until `acquire` may succeed; 0 where it may now."""
        with self._lock:
            now = self._clock()
            self._overdue(now)
            closed = self._state is BreakerState.CLOSED
            return 0.0 if closed else max(0.0, self._until - now)

    def _settle(self, epoch: int, failed: bool) -> None:
        with self._lock:
            now = self._clock()
            self._overdue(now)
            if epoch != self._epoch:
                return
            if self._state is BreakerState.HALF_OPEN:
                if failed:
                    self._enter(BreakerState.OPEN, now + self.policy.recovery)
                else:
                    self._failures.clear()
                    self._enter(BreakerState.CLOSED, 0.0)
            elif failed:
                # The deque keeps the newest `failures` times: full and all recent means open.
                self._failures.append(now)
                full = len(self._failures) == self.policy.failures
                if full and now - self._failures[0] < self.policy.window:
                    self._enter(BreakerState.OPEN, now + self.policy.recovery)

    def _overdue(self, now: float) -> None:
        if self._state is BreakerState.HALF_OPEN and now >= self._until:
            self._enter(BreakerState.OPEN, self._until + self.policy.recovery)

    def _enter(self, state: BreakerState, until: float) -> None:
        self._state, self._until = state, until
        self._epoch += 1
