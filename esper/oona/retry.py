"""Patience with what fails for a while: a full queue, a library that does not answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)
from tenacity.nap import sleep_using_event

from esper.errors import LibraryError, NotInLibrary, QueueFull, StaleClaim

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE, JITTER = 0.5, 10.0, 0.5  # seconds; each pause is twice the last
# How long finished work waits for room in the next queue before it is given up.
PATIENCE_SECONDS = 300.0


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed later: the queue was full, or the library failed
    (not: answered that the claim is over, or that there is no such thing)."""
    return isinstance(error, QueueFull | LibraryError) and not isinstance(
        error, StaleClaim | NotInLibrary
    )


def patiently(call: Callable[[], T], stop: threading.Event, seconds: float) -> T:
    """The result of `call`, tried again while it fails transiently and `seconds` are not over.

    With 0 seconds it is tried once. Setting `stop` ends a pause.

    Raises:
        Whatever `call` raised last.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE) + wait_random(0, JITTER),
        stop=stop_after_delay(seconds) | stop_when_event_set(stop),
        sleep=sleep_using_event(stop),
        before_sleep=before_sleep_log(log, logging.INFO),
        reraise=True,
    )
    return retrying(call)
