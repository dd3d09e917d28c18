"""The audit trail: one JSON line per architectural event, in the order they happened.

Each line is `{"kind": ..., "time": ..., "payload": ...}` and goes to the kernel in a single
append, so a killed process loses nothing that was recorded and tears at most its last line.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from esper.errors import ContractError
from esper.leyline.base import Contract
from esper.leyline.command import Command, FieldReport, Transition
from esper.leyline.events import Event

log = logging.getLogger(__name__)

AuditPayload = Transition | Command | FieldReport | Event

KINDS: Mapping[str, type[AuditPayload]] = {
    "transition": Transition,
    "command": Command,
    "field_report": FieldReport,
    "event": Event,
}
_KIND_OF = {contract: kind for kind, contract in KINDS.items()}


class AuditRecord(Contract):
    """One line of the trail. `time` is when it was written, in UTC seconds."""

    kind: str
    time: float
    payload: AuditPayload


class AuditLog:
    """Appends to one file; safe from several threads, for every record is one write.

    A record that cannot be written (a full disk) does not stop the training it describes: it
    is logged and counted in `lost`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lost = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd: int | None = os.open(
            self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        size = os.fstat(self._fd).st_size
        # A predecessor that died in mid-line left no newline; ours must not be glued to it.
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def record(self, kind: str, payload: Contract) -> None:
        """Append one record.

        Raises:
            ContractError: an unknown kind, a payload of another type, or a closed log.
        """
        expected = KINDS.get(kind)
        if expected is None:
            raise ContractError(f"audit kind {kind!r} is unknown; one of {', '.join(KINDS)}")
        if not isinstance(payload, expected):
            raise ContractError(
                f"an audit record of kind {kind!r} holds a {expected.__name__}, "
                f"not a {type(payload).__name__}"
            )
        if self._fd is None:
            raise ContractError(f"the audit log {self.path} is closed; open a new AuditLog")
        line = (
            f'{{"kind":"{kind}","time":{time.time()!r},"payload":{payload.model_dump_json()}}}\n'
        ).encode()
        if self._torn:
            line = b"\n" + line
        try:
            written = os.write(self._fd, line)
        except OSError as e:
            self._lose(str(e))
            return
        self._torn = written < len(line)
        if self._torn:
            self._lose(f"{written} of {len(line)} bytes were written")

    def observe(self, payload: Contract) -> None:
        """Record `payload` under the kind of its type: an observer for a `Session`."""
        kind = _KIND_OF.get(type(payload))  # type: ignore[arg-type]
        if kind is None:
            raise ContractError(
                f"a {type(payload).__name__} is no audit record; expected one of "
                + ", ".join(c.__name__ for c in KINDS.values())
            )
        self.record(kind, payload)

    def _lose(self, why: str) -> None:
        if self.lost == 0:
            log.error("audit records are being lost, %s: %s; free some space", self.path, why)
        self.lost += 1

    def close(self) -> None:
        """Bring everything to the disk. Closing twice does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _warn(message: str) -> None:
    log.warning("%s", message)


def read_audit(
    path: str | Path, on_torn: Callable[[str], None] = _warn
) -> Iterator[AuditRecord]:
    """The records of a trail, oldest first. A torn line is skipped and told to `on_torn`.

    Raises:
        ContractError: a whole line is not an audit record; names the line.
    """
    path = Path(path)
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                data = json.loads(raw)
            except ValueError:
                on_torn(
                    f"{path}: line {number} is torn ({len(raw)} bytes, not JSON) and was left "
                    "out; the process that wrote it was killed or the disk was full"
                )
                continue
            try:
                yield AuditRecord(
                    kind=data["kind"],
                    time=data["time"],
                    payload=KINDS[data["kind"]].model_validate_json(json.dumps(data["payload"])),
                )
            except (KeyError, TypeError, ValidationError) as e:
                raise ContractError(
                    f"{path}: line {number} is not an audit record ({type(e).__name__}: {e}); "
                    "it was written by another version of esper or by something else"
                ) from e
