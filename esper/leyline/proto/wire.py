"""Contracts to messages of esper.v1 and back.

A contract and its message have the same name, and so have their fields, but for three cases:
a duration is seconds in a contract and milliseconds on the wire (`compile_seconds` is
`compile_ms`, a report's `seconds` its `duration_ms`), an event's `body` travels as the message
of its topic's payload, or as JSON text where the topic has none, and a manifest's `sha256` is a
list of pairs. From this a plan per class is made once, at
import; a contract's field that its message does not have is an error then.

What comes back is validated by the contract itself, as if a stranger had made it.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from google.protobuf.message import Message
from pydantic import ValidationError

from esper.errors import ContractError
from esper.leyline import (
    artifact,
    blueprint,
    command,
    events,
    library,
    payloads,
    signature,
    verdict,
)
from esper.leyline.base import Contract
from esper.leyline.proto.v1 import contracts_pb2 as pb

E = TypeVar("E", bound=Enum)
T = TypeVar("T", bound=Contract)

CONTRACTS: tuple[type[Contract], ...] = (
    signature.SiteSignature, blueprint.Width, blueprint.Node, blueprint.BlueprintIR,
    artifact.Toolchain, artifact.Runtime, artifact.ParameterSpec, artifact.Manifest,
    verdict.Hardware, verdict.Roofline, verdict.Latency, verdict.Part, verdict.Cost,
    verdict.Measurement, verdict.Drift, verdict.Risk, verdict.ProofCase, verdict.Tag,
    verdict.ValidationReport,
    library.BlueprintRecord, library.KernelRecord, library.BlueprintClaim, library.KernelClaim,
    library.QueueDepths, library.Lease, library.Change, command.SeedHealth, command.SeedContext,
    command.FieldReport, events.Event,
)
# The member of an event's `payload` that stands for its body.
_PAYLOAD_FIELDS: dict[type[Contract], str] = {
    command.SeedHealth: "seed_health", command.FieldReport: "field_report",
    library.BlueprintRecord: "blueprint", library.KernelRecord: "kernel",
}


# Enums, by name: the wire's numbers are its own.


def _prefix(name: str) -> str:
    return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper() + "_"


def enum_names(kind: type[Enum]) -> dict[Enum, str]:
    """What the members of a contract's enum are called in the `.proto`."""
    return {member: _prefix(kind.__name__) + member.name for member in kind}


class _Numbers:
    """The numbers of one enum, both ways."""

    def __init__(self, kind: type[Enum], numbers: Any) -> None:
        self.kind = kind
        self.number = {m: int(numbers.Value(n)) for m, n in enum_names(kind).items()}
        self.member = {number: member for member, number in self.number.items()}

    def to_contract(self, number: int) -> Any:
        if number not in self.member:
            raise ContractError(
                f"{number} is not a {self.kind.__name__} known here; expected one of "
                f"{sorted(self.member)}; a newer peer may know more: bring both to one version"
            )
        return self.member[number]


_ENUMS: dict[type[Enum], _Numbers] = {
    kind: _Numbers(kind, getattr(pb, kind.__name__))
    for kind in (signature.SiteKind, signature.DType, blueprint.Op, blueprint.Init,
                 artifact.Pipeline, verdict.SpeedVerdict, events.Priority, events.Topic,
                 library.BlueprintStatus, library.KernelStatus, command.SeedState)
}


def enum_to_wire(member: Enum) -> Any:
    return _ENUMS[type(member)].number[member]


def enum_to_contract(kind: type[E], number: int) -> E:
    """The member with that number on the wire.

    Raises:
        ContractError: a number that this version does not know, or none was given.
    """
    member: E = _ENUMS[kind].to_contract(number)
    return member


# One field


@dataclass(frozen=True)
class _Field:
    """`put` writes a value that is not None into a message, `get` makes it from what the
    message holds. `presence`: the message can tell absent from zero; `nullable`: absent is
    None, not the contract's default."""

    name: str
    wire: str
    put: Callable[[Message, Any], None]
    get: Callable[[Any], Any]
    presence: bool
    nullable: bool = False


def wire_name(name: str) -> str:
    """What a contract's field is called in its message."""
    if name == "seconds":
        return "duration_ms"
    if name.endswith("_seconds"):
        return name.removesuffix("seconds") + "ms"
    return {"body": "body_json"}.get(name, name)


def _as_is(value: Any) -> Any:
    return value


def _to_ms(seconds: float) -> float:
    return seconds * 1e3


def _from_ms(ms: float) -> float:
    return ms / 1e3


def _scalar(kind: Any, wire: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """How one value of `kind` is written and read; messages are not values."""
    if wire.endswith("_ms"):
        return _to_ms, _from_ms
    if wire == "body_json":
        return json.dumps, lambda text: json.loads(text or "{}")
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _ENUMS[kind].number.__getitem__, _ENUMS[kind].to_contract
    return _as_is, _as_is


def _is_contract(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Contract)


def _put_digests(message: Message, value: dict[str, str]) -> None:
    for member in sorted(value):
        message.sha256.add(member=member, sha256=value[member])  # type: ignore[attr-defined]


def _field(name: str, annotation: Any, descriptor: Any) -> _Field:
    wire = wire_name(name)
    presence = descriptor.has_presence
    parts = [a for a in typing.get_args(annotation) if a is not type(None)]
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kind = parts[0] if union else annotation
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if _is_contract(inner):
            def put_all(message: Message, values: Any) -> None:
                repeated = getattr(message, wire)
                for value in values:
                    _fill(repeated.add(), value)

            return _Field(name, wire, put_all,
                          lambda r: tuple(_read(inner, m) for m in r), presence)
        to, back = _scalar(inner, wire)
        if to is _as_is:
            return _Field(name, wire, lambda m, v: getattr(m, wire).extend(v), tuple, presence)
        return _Field(name, wire, lambda m, v: getattr(m, wire).extend(map(to, v)),
                      lambda r: tuple(map(back, r)), presence)
    if name == "sha256":
        return _Field(name, wire, _put_digests,
                      lambda r: {d.member: d.sha256 for d in r}, presence)
    if _is_contract(kind):
        return _Field(name, wire, lambda m, v: _fill(getattr(m, wire), v),
                      lambda m: _read(kind, m), presence)
    to, back = _scalar(kind, wire)
    return _Field(name, wire, lambda m, v: setattr(m, wire, to(v)), back, presence)


# One contract


@dataclass(frozen=True)
class _Plan:
    message: type[Message]
    fields: tuple[_Field, ...]


def _plan(contract: type[Contract]) -> _Plan:
    message = getattr(pb, contract.__name__)
    known = message.DESCRIPTOR.fields_by_name
    return _Plan(message, tuple(
        replace(
            _field(name, info.annotation, known[wire_name(name)]),
            nullable=type(None) in typing.get_args(info.annotation),
        )
        for name, info in contract.model_fields.items()
    ))


_PLANS = {contract: _plan(contract) for contract in CONTRACTS}


def _fill(message: Message, value: Contract) -> None:
    message.SetInParent()  # an empty message is not an absent one
    said = None
    if isinstance(value, events.Event) and value.topic in payloads.PAYLOADS:
        said = payloads.payload_of(value)
        _fill(getattr(message, _PAYLOAD_FIELDS[type(said)]), said)
    for field in _PLANS[type(value)].fields:
        if said is not None and field.name == "body":
            continue
        given = getattr(value, field.name)
        if given is not None:
            field.put(message, given)


def _read(contract: type[T], message: Message) -> T:
    values: dict[str, Any] = {}
    for field in _PLANS[contract].fields:
        if not field.presence or message.HasField(field.wire):
            values[field.name] = field.get(getattr(message, field.wire))
        elif field.nullable:
            values[field.name] = None
    if contract is events.Event and (part := message.WhichOneof("payload")) is not None:
        values["body"] = _said(values["topic"], part, message).model_dump(mode="json")
    return contract.model_validate(values)


def _said(topic: events.Topic, part: str, event: Message) -> Contract:
    contract = payloads.PAYLOADS.get(topic)
    if contract is None or _PAYLOAD_FIELDS[contract] != part:
        raise ContractError(f"an event of {topic} on the wire says {part!r}, which is not its own")
    return _read(contract, getattr(event, part))


def to_wire(value: Contract) -> Any:
    """The message of a contract."""
    message = _PLANS[type(value)].message()
    _fill(message, value)
    return message


def to_contract(contract: type[T], message: Any) -> T:
    """The contract that a message stands for.

    Raises:
        ContractError: what it holds breaks the contract.
    """
    try:
        return _read(contract, message)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "its top"
        raise ContractError(
            f"a {contract.__name__} on the wire is not one: {first['msg']} (at {where}); bring "
            "both peers to one version of esper"
        ) from e
    except json.JSONDecodeError as e:
        raise ContractError(f"the body of an event is not JSON: {e}") from e
