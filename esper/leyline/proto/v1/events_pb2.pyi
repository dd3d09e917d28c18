from esper.leyline.proto.v1 import contracts_pb2 as _contracts_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Decision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_UNSPECIFIED: _ClassVar[Decision]
    DECISION_ACCEPTED: _ClassVar[Decision]
    DECISION_DISPLACED: _ClassVar[Decision]
    DECISION_REFUSED: _ClassVar[Decision]
DECISION_UNSPECIFIED: Decision
DECISION_ACCEPTED: Decision
DECISION_DISPLACED: Decision
DECISION_REFUSED: Decision

class PublishRequest(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: _contracts_pb2.Event
    def __init__(self, event: _Optional[_Union[_contracts_pb2.Event, _Mapping]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("decision", "dropped", "reason")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    dropped: _contracts_pb2.Event
    reason: str
    def __init__(self, decision: _Optional[_Union[Decision, str]] = ..., dropped: _Optional[_Union[_contracts_pb2.Event, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("open", "acknowledge")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    open: Subscription
    acknowledge: str
    def __init__(self, open: _Optional[_Union[Subscription, _Mapping]] = ..., acknowledge: _Optional[str] = ...) -> None: ...

class Subscription(_message.Message):
    __slots__ = ("name", "topics")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOPICS_FIELD_NUMBER: _ClassVar[int]
    name: str
    topics: _containers.RepeatedScalarFieldContainer[_contracts_pb2.Topic]
    def __init__(self, name: _Optional[str] = ..., topics: _Optional[_Iterable[_Union[_contracts_pb2.Topic, str]]] = ...) -> None: ...
