"""Who may call what on a network: roles, tokens, and the check before every call."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from esper.errors import ConfigError
from esper.rpc.channel import MAX_TOKEN, read_secret

log = logging.getLogger(__name__)
MIN_TOKEN = 32  # characters; token_urlsafe(32) has 43


class Role(StrEnum):
    """READER looks and fetches, TRAINER also says what it wants and how it went, WORKER does
    the slow track's work, ADMIN may do everything."""

    READER = "reader"
    TRAINER = "trainer"
    WORKER = "worker"
    ADMIN = "admin"


_ALL = frozenset(Role)
_TRAIN = frozenset({Role.TRAINER, Role.ADMIN})
_WORK = frozenset({Role.WORKER, Role.ADMIN})
_CURATE = frozenset({Role.ADMIN})
_LIBRARY: Mapping[str, frozenset[Role]] = {
    "RegisterSignature": _TRAIN, "Quarantine": _TRAIN, "AddReport": _TRAIN,
    "Submit": _TRAIN | _WORK,
    "ClaimBlueprint": _WORK, "ClaimRecompilation": _WORK, "CompleteBlueprint": _WORK,
    "RejectBlueprint": _WORK, "ClaimKernel": _WORK, "CompleteKernel": _WORK,
    "Heartbeat": _WORK, "Release": _WORK,
    "ListSignatures": _ALL, "ListBlueprints": _ALL, "ListKernels": _ALL, "GetKernel": _ALL,
    "FetchArtifact": _ALL, "GetDepths": _ALL, "GetCapacity": _ALL, "ListLeases": _ALL,
    "ListChanges": _ALL, "Watch": _ALL, "ListReports": _ALL,
    "Archive": _CURATE, "Retire": _CURATE,
}
ALLOWED: Mapping[str, frozenset[Role]] = {
    **{f"/esper.v1.LibraryService/{name}": roles for name, roles in _LIBRARY.items()},
    "/esper.v1.EventService/Publish": _TRAIN | _WORK,
    "/esper.v1.EventService/Subscribe": _ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ALL,
}
# Whoever watches over servers has no token; the answer is one word.
OPEN = frozenset({"/grpc.health.v1.Health/Check"})


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=80)
    token: str = Field(min_length=MIN_TOKEN, max_length=MAX_TOKEN)
    roles: frozenset[Role] = Field(min_length=1)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class Tokens:
    """The tokens that a server knows; of each it keeps the SHA-256 only."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._known = tuple((_digest(e.token), e.name, e.roles) for e in entries)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read a YAML list of {name, token, roles}; only its owner may be able to read it.

        Raises:
            ConfigError: it cannot be used. No message repeats anything of a token.
        """
        try:
            data = yaml.safe_load(read_secret(path, private=True))
            entries = TypeAdapter(list[_Entry]).validate_python(data)
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ConfigError(f"{path} is not YAML") from None  # the cause would quote the file
        except ValidationError as e:
            faults = "; ".join(
                f"{'.'.join(str(p) for p in f['loc']) or 'the file'}: {f['msg']}"
                for f in e.errors(include_input=False)[:5]
            )
            raise ConfigError(
                f"{path}: {faults}; expected a list of {{name: NAME, token: at least {MIN_TOKEN} "
                f"characters, roles: [{', '.join(Role)}]}}"
            ) from None
        if not entries or len({e.token for e in entries}) < len(entries):
            raise ConfigError(f"{path} must list at least one token, and none of them twice")
        return cls(entries)

    def roles(self, authorization: str) -> tuple[str, frozenset[Role]] | None:
        """Name and roles behind an `authorization` header, None where it is not known.

        Every known token is compared, each in constant time, so that the time taken says
        nothing about which of them came close.
        """
        scheme, _, token = authorization.partition(" ")
        given, found = _digest(token.strip()), None
        for digest, name, roles in self._known:
            if hmac.compare_digest(digest, given):
                found = (name, roles)
        return found if scheme.lower() == "bearer" else None


class Guard(grpc.ServerInterceptor):
    """Refuses a call whose token does not allow its method; a method not listed is refused."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method in OPEN:
            return continuation(handler_call_details)
        headers = [v for k, v in handler_call_details.invocation_metadata if k == "authorization"]
        known = self._tokens.roles(str(headers[0])) if len(headers) == 1 else None
        if known is None:
            return _refusal(grpc.StatusCode.UNAUTHENTICATED, "a known bearer token is needed")
        name, roles = known
        wanted = ALLOWED.get(method, frozenset())
        if not roles & wanted:
            log.warning("%s was refused %s", name, method)
            return _refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                f"{method} is for {', '.join(sorted(wanted)) or 'nobody'}; this token is of "
                f"{', '.join(sorted(roles))}",
            )
        return continuation(handler_call_details)


def _refusal(code: grpc.StatusCode, details: str) -> Any:
    def refuse(requests: Any, context: grpc.ServicerContext) -> Any:
        context.abort(code, details)

    # Of any kind of method: it reads nothing and answers nothing.
    return grpc.stream_stream_rpc_method_handler(refuse)
