"""The audit trail survives what happens to processes and disks."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from esper.errors import ContractError
from esper.leyline.command import Action, Command, FieldReport, Transition
from esper.leyline.events import Event, Topic
from esper.leyline.lifecycle import SeedState
from esper.nissa.audit import AuditLog, read_audit


def _transition(step: int = 7) -> Transition:
    return Transition(trace_id="tr-1", site="a", kernel_id="k-1", before=SeedState.DORMANT,
                      after=SeedState.GERMINATED, trigger="schedule", step=step, epoch=1)


def test_records_come_back_as_they_went_in(tmp_path: Path) -> None:
    given = [
        Command(action=Action.GERMINATE, site="a", kernel_id="k-1", reason="plateau: 0.2 %"),
        _transition(),
        FieldReport(run_id="r", trace_id="tr-1", site="a", kernel_id="k-1", blueprint_id="b-1",
                    outcome=SeedState.CULLED, reason="no gain", epochs=2),
        Event(topic=Topic.EPOCH, sender="tolaria", body={"loss": float("nan"), "n": 3}),
    ]
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        for record in given:
            audit.observe(record)
    read = list(read_audit(tmp_path / "audit.jsonl"))
    assert [r.kind for r in read] == ["command", "transition", "field_report", "event"]
    assert [r.payload for r in read[:3]] == given[:3]
    assert isinstance(read[3].payload, Event)
    assert read[3].payload.body["loss"] != read[3].payload.body["loss"]  # NaN stays NaN


def test_a_record_is_with_the_kernel_at_once(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.record("transition", _transition())
    assert len(list(read_audit(tmp_path / "audit.jsonl"))) == 1
    audit.close()


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        audit.record("transition", _transition(1))
        audit.record("transition", _transition(2))
    path.write_bytes(path.read_bytes()[:-40])
    said: list[str] = []
    assert len(list(read_audit(path, said.append))) == 1
    assert len(said) == 1 and "line 2 is torn" in said[0]
    with AuditLog(path) as audit:  # a later process goes on behind it, on a line of its own
        audit.record("transition", _transition(3))
    steps = [r.payload.step for r in read_audit(path, said.append)]  # type: ignore[union-attr]
    assert steps == [1, 3]


def test_a_whole_line_that_is_no_record_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"kind":"gossip","time":1,"payload":{}}\n')
    with pytest.raises(ContractError, match="line 1"):
        list(read_audit(path))


def test_wrong_kinds_and_closed_logs_are_refused(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(ContractError, match="unknown"):
        audit.record("gossip", _transition())
    with pytest.raises(ContractError, match="holds a Command"):
        audit.record("command", _transition())
    audit.close()
    audit.close()
    with pytest.raises(ContractError, match="closed"):
        audit.record("transition", _transition())


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    def write() -> None:
        for step in range(200):
            audit.record("transition", _transition(step))

    with AuditLog(path) as audit:
        threads = [threading.Thread(target=write) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(list(read_audit(path))) == 800


def test_a_full_disk_is_counted_and_does_not_stop_the_run() -> None:
    audit = AuditLog("/dev/full")
    audit.record("transition", _transition())
    audit.record("transition", _transition())
    assert audit.lost == 2
    audit._fd = None  # /dev/full has nothing to be synced
