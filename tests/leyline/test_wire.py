"""The wire format: every contract crosses it whole, what was written once is read for ever, and
the generated code is that of the `.proto` files."""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor

from esper.errors import ContractError
from esper.leyline.base import Contract
from esper.leyline.events import Event, Topic
from esper.leyline.proto import wire
from esper.leyline.proto.v1 import contracts_pb2, events_pb2, library_pb2
from esper.leyline.signature import SiteSignature
from tests.leyline import wire_samples

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
FILES = (contracts_pb2, library_pb2, events_pb2)
MESSAGES = {
    name: message_factory.GetMessageClass(d)
    for file in FILES for name, d in file.DESCRIPTOR.message_types_by_name.items()
}


def fields_of(message: Any) -> dict[str, dict[str, str]]:
    """By number: what the number means. That can never change."""
    kinds = FieldDescriptor
    names = {getattr(kinds, k): k[5:].lower() for k in vars(kinds) if k.startswith("TYPE_")}

    def kind(f: Any) -> str:
        named = f.message_type or f.enum_type
        return ("repeated " if f.is_repeated else "") + (named.name if named else names[f.type])

    return {str(f.number): {"name": f.name, "type": kind(f)}
            for f in message.DESCRIPTOR.fields}


def numbers_of(enum: Any) -> dict[str, dict[str, str]]:
    return {str(v.number): {"name": v.name, "type": "enum value"} for v in enum.values}


def ledger() -> dict[str, dict[str, dict[str, str]]]:
    """Every number in use now, of fields and of enums."""
    enums = {name: e for file in FILES for name, e in file.DESCRIPTOR.enum_types_by_name.items()}
    return {**{name: fields_of(m) for name, m in MESSAGES.items()},
            **{name: numbers_of(e) for name, e in enums.items()}}


@pytest.mark.parametrize("value", wire_samples.CONTRACTS, ids=lambda v: type(v).__name__)
def test_a_contract_crosses_whole(value: Contract) -> None:
    data = wire.to_wire(value).SerializeToString()
    message = MESSAGES[type(value).__name__].FromString(data)
    assert wire.to_contract(type(value), message) == value


def test_every_contract_has_a_full_and_a_bare_sample() -> None:
    """So that the test above sees every field set, and every one that may be absent absent."""
    for contract in wire.CONTRACTS:
        samples = [v for v in wire_samples.CONTRACTS if type(v) is contract]
        for name, info in contract.model_fields.items():
            given = [getattr(v, name) for v in samples]
            assert any(g not in (None, (), "", {}) for g in given), f"{contract.__name__}.{name}"
            if type(None) in typing.get_args(info.annotation):
                assert None in given, f"{contract.__name__}.{name}"


def test_every_member_of_every_enum_has_a_number() -> None:
    for kind, numbers in wire._ENUMS.items():
        assert {m: numbers.to_contract(n) for m, n in numbers.number.items()} == {
            m: m for m in kind}
        in_proto = set(getattr(contracts_pb2, kind.__name__).keys())
        assert in_proto - set(wire.enum_names(kind).values()) == {
            f"{wire._prefix(kind.__name__)}UNSPECIFIED"}


def test_what_is_absent_stays_absent_and_what_is_unknown_is_refused() -> None:
    signature = wire.to_wire(SiteSignature(kind="features", channels=8))
    signature.kind = 99
    with pytest.raises(ContractError, match="99 is not a SiteKind"):
        wire.to_contract(SiteSignature, signature)
    with pytest.raises(ContractError, match="channels"):
        wire.to_contract(SiteSignature, contracts_pb2.SiteSignature(kind=1, dtype=1, device="cpu"))
    event = wire.to_wire(Event(topic=Topic.EPOCH, sender="t", body={"loss": math.nan}))
    assert math.isnan(wire.to_contract(Event, event).body["loss"])
    event.body_json = "{"
    with pytest.raises(ContractError, match="JSON"):
        wire.to_contract(Event, event)


# For ever


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_old_bytes_are_read_and_written_as_ever(name: str) -> None:
    """A new message gets its golden file from `python -m tests.leyline.wire_samples`, which
    never touches one that is there."""
    data = (GOLDEN / f"{name}.bin").read_bytes()
    message = MESSAGES[name].FromString(data)
    meanings = json.loads((GOLDEN / "meanings.json").read_text())
    assert meanings[name] == json_format.MessageToDict(
        message, preserving_proto_field_name=True), "the same bytes mean something else by now"
    assert message.SerializeToString(deterministic=True) == data
    contracts = {c.__name__: c for c in wire.CONTRACTS}
    if name in contracts:
        value = wire.to_contract(contracts[name], message)
        assert wire.to_contract(contracts[name], wire.to_wire(value)) == value


def test_no_golden_file_is_gone() -> None:
    kept = {p.stem for p in GOLDEN.glob("*.bin")}
    assert kept == set(MESSAGES), "a message that goes keeps its definition and its file"


def test_no_number_is_ever_used_again() -> None:
    known = json.loads((GOLDEN / "numbers.json").read_text())
    now = ledger()
    for name, numbers in known.items():
        reserved = {n for start, end in _reserved(name) for n in range(start, end)}
        for number, meaning in numbers.items():
            if number not in now.get(name, {}):
                assert int(number) in reserved, (
                    f"{name}: {number} ({meaning['name']}) is gone and not reserved")
            else:
                assert now[name][number] == meaning, f"{name}: {number} means something else"
    for name, numbers in now.items():
        assert set(numbers) <= set(known.get(name, {})), (
            f"{name} has new numbers; enter them: python -m tests.leyline.wire_samples")


def _reserved(name: str) -> list[tuple[int, int]]:
    for file in FILES:
        proto = descriptor_pb2.FileDescriptorProto.FromString(file.DESCRIPTOR.serialized_pb)
        for m in proto.message_type:
            if m.name == name:
                return [(r.start, r.end) for r in m.reserved_range]
        for e in proto.enum_type:
            if e.name == name:
                return [(r.start, r.end + 1) for r in e.reserved_range]
    return []


# The rules of the package


def test_the_generated_code_is_that_of_the_proto_files(tmp_path: Path) -> None:
    from grpc_tools import protoc  # type: ignore[import-untyped]

    out = tmp_path / "all.binpb"
    sources = [file.DESCRIPTOR.name for file in FILES]
    assert protoc.main(["protoc", f"-I{ROOT}", f"--descriptor_set_out={out}",
                        *(str(ROOT / s) for s in sources)]) == 0
    made = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    ours = {file.DESCRIPTOR.name: file.DESCRIPTOR.serialized_pb for file in FILES}
    assert {f.name for f in made.file} == set(ours)
    for fresh in made.file:
        kept = descriptor_pb2.FileDescriptorProto.FromString(ours[fresh.name])
        for proto in (kept, fresh):
            for message in proto.message_type:
                for field in message.field:
                    field.ClearField("json_name")  # written by some versions of the compiler
        assert kept == fresh, f"{fresh.name} has changed: make proto"


def test_the_stubs_have_every_method() -> None:
    import grpc

    from esper.leyline.proto.v1 import events_pb2_grpc, library_pb2_grpc

    with grpc.insecure_channel("unix:/nowhere") as channel:
        for file, code in ((library_pb2, library_pb2_grpc), (events_pb2, events_pb2_grpc)):
            for service in file.DESCRIPTOR.services_by_name.values():
                stub = getattr(code, f"{service.name}Stub")(channel)
                for method in service.methods:
                    assert hasattr(stub, method.name), f"{method.full_name}: make proto"


def test_there_are_no_maps_and_enums_begin_unspecified() -> None:
    for message in MESSAGES.values():
        assert not any(n.GetOptions().map_entry for n in message.DESCRIPTOR.nested_types)
    for file in FILES:
        for enum in file.DESCRIPTOR.enum_types_by_name.values():
            assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")


