"""What all servicers share: errors that cross the wire, and streams that end with the server."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from esper.errors import EsperError, LibraryError, QueueFull
from esper.rpc.failures import abort

log = logging.getLogger(__name__)
MAX_STREAMS = 64  # each holds a thread of the server

F = TypeVar("F", bound=Callable[..., Any])


def answers(method: F) -> F:
    """Turn what a method raises into a refusal of the call. What was not foreseen goes into
    the log with its traceback, and to the caller as no more than that."""

    @contextmanager
    def refusing(context: grpc.ServicerContext) -> Iterator[None]:
        try:
            yield
        except EsperError as e:
            abort(context, e)
        except grpc.RpcError:
            raise  # from reading what the caller sends: he went away, and gRPC knows
        except Exception:
            log.exception("unforeseen in %s", method.__name__)
            abort(context, LibraryError(f"{method.__name__} failed; the server's log says why"))

    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def streaming(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with refusing(context):
                yield from method(self, request, context)

        return streaming  # type: ignore[return-value]

    @functools.wraps(method)
    def unary(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        with refusing(context):
            return method(self, request, context)

    return unary  # type: ignore[return-value]


class Streams:
    """Counts the streams that stay open, and ends them all when the server stops."""

    def __init__(self) -> None:
        self._room = threading.BoundedSemaphore(MAX_STREAMS)
        self.stopping = threading.Event()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Be one of them.

        Raises:
            QueueFull: there are as many as there may be.
        """
        if not self._room.acquire(blocking=False):
            raise QueueFull(f"{MAX_STREAMS} streams are open, the most there may be; try again")
        try:
            yield
        finally:
            self._room.release()
