"""Errors of esper across the wire: a status code for anyone, and the class itself for us."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from esper import errors
from esper.errors import EsperError
from esper.leyline.proto.v1.contracts_pb2 import Failure

TRAILER = "esper-failure-bin"
# Bytes. Headers are capped at 8 KiB by default; `details` may triple there, a trailer grows by
# a third.
_MAX_DETAILS, _MAX_MESSAGE = 600, 3600

_CLASSES: dict[str, type[EsperError]] = {
    name: kind for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, EsperError)
}
_CODES: tuple[tuple[type[EsperError], grpc.StatusCode], ...] = (
    (errors.NotInLibrary, grpc.StatusCode.NOT_FOUND),
    (errors.StaleClaim, grpc.StatusCode.ABORTED),
    (errors.QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.IllegalTransition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ArtifactMismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ArtifactCorrupt, grpc.StatusCode.DATA_LOSS),
    (errors.ContractError, grpc.StatusCode.INVALID_ARGUMENT),
)
_UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
)
_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def abort(context: grpc.ServicerContext, error: EsperError) -> NoReturn:
    """End a call on the server with `error`."""
    code = next((c for kind, c in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    message = str(error)
    failure = Failure(
        error=type(error).__name__, message=_clipped(message, _MAX_MESSAGE),
        node=getattr(error, "node", None),
    )
    context.set_trailing_metadata(((TRAILER, failure.SerializeToString()),))
    context.abort(code, _clipped(message, _MAX_DETAILS))


def _clipped(text: str, size: int) -> str:
    return text.encode(errors="replace")[:size].decode(errors="ignore")


def error_of(call: Any, server: object) -> EsperError:
    """What a failed call means on the client: `call` is the `grpc.RpcError` that it raised,
    which is the call itself; `server` names the other side in messages."""
    trailers = dict(call.trailing_metadata() or ())
    if TRAILER in trailers:
        return _rebuilt(trailers[TRAILER])
    code, details = call.code(), call.details()
    if code in _UNANSWERED:
        return errors.Unreachable(
            f"the library at {server} did not answer ({code.name}: {details}); is `esper serve` "
            "running there? What was asked may have been done, or not"
        )
    if code in _DENIED:
        return errors.AccessDenied(f"the library at {server} refuses: {details}")
    return errors.LibraryError(f"the library at {server} failed ({code.name}: {details})")


def _rebuilt(trailer: str | bytes) -> EsperError:
    try:
        failure = Failure.FromString(trailer if isinstance(trailer, bytes) else b"?")
    except DecodeError:
        return errors.LibraryError("the server failed, and what it says of it cannot be read")
    error = _CLASSES.get(failure.error, errors.LibraryError)(failure.message)
    if isinstance(error, errors.BlueprintError) and failure.HasField("node"):
        error.node = failure.node  # its message names the node already
    return error
