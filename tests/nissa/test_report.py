"""The report says what the run folder says, in one file, whichever way it came out."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from esper.errors import ContractError
from esper.leyline.library import QueueDepths
from esper.nissa.charts import Series, duration, line_chart, log_ticks, nice_ticks, short_number
from esper.nissa.findings import figures
from esper.nissa.metrics import (
    Arm,
    BudgetRow,
    EpochRow,
    RunInfo,
    RunLog,
    RunSummary,
    fresh_folder,
    read_run,
)
from esper.nissa.report import headline, write_report
from tests.nissa.runs import write_run

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Text, tags and attributes; notices elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "digits")


def test_it_holds_what_the_folder_holds(finished: Path) -> None:
    text = report(finished).text
    for part in (
        "Growth raised accuracy from 90.8 % to 95.8 %", "4 seeds were tried, 2 kept",
        "One seed on one data set", "1.29 times", "1,946", "1,354 alone",
        "wide inverted bottleneck", "validated", "1.62", "1.56–1.68",
        "rejected", "41 times eager's own error", "invalid blueprint", "not measured",
        "relu <3x3> & more", "kept at blocks.1 , gain +0.061".replace(" ,", ","),
        "no signal in 5 epochs", "loss nan at step 1445", "rolled back",
        "training → grafting", "embargo is over", "2.13.0", "A Processor 9000",
        "46 of them lie beside a transition",
    ):
        assert part in text, part


def test_it_needs_nothing_from_outside(finished: Path) -> None:
    page = report(finished)
    html = (finished / "report.html").read_text(encoding="utf-8")
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [n for n, _ in page.attributes if n in ("src", "href", "xlink:href")]
    assert "http" not in html and "url(" not in html and "@import" not in html
    assert page.tags.count("svg") > 10


def test_every_chart_is_there_for_desk_and_phone_and_is_drawn(finished: Path) -> None:
    page = report(finished)
    labels = [v for n, v in page.attributes if n == "aria-label"]
    for label in ("accuracy by epoch", "loss by epoch", "state of every site over steps",
                  "parameters by epoch", "FLOPs per sample by epoch",
                  "distribution of step times"):
        assert labels.count(label) == 2
    paths = [v for n, v in page.attributes if n == "d"]
    assert not any("nan" in p or "inf" in p for p in paths)
    # accuracy, loss, parameters and FLOPs, each drawn twice
    assert (finished / "report.html").read_text().count('class="line control"') == 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gain": False}, "made no difference that 450 evaluation samples can show"),
        ({"control": False}, "is not known, for nothing was trained beside it (compare: false)"),
    ],
)
def test_it_does_not_claim_what_is_not_there(
    tmp_path: Path, options: dict[str, bool], expected: str
) -> None:
    assert expected in report(write_run(tmp_path / "r", **options)).text


def _rows(losses: list[float]) -> tuple[EpochRow, ...]:
    return tuple(EpochRow(epoch=i + 1, step=10 * (i + 1), eval_loss=v, parameters=5, seconds=i)
                 for i, v in enumerate(losses))


@pytest.mark.parametrize(
    ("grown", "alone", "expected"),
    [
        ([2.0, 1.5], [2.0, 1.0], "Nothing grew: no seed was tried"),
        ([2.0, float("nan")], [2.0, 1.0], "Nothing grew"),
    ],
)
def test_bare_runs_are_reported_as_bare(
    tmp_path: Path, grown: list[float], alone: list[float], expected: str
) -> None:
    with RunLog(tmp_path) as log:
        log.begin(RunInfo(name="bare", seed=3))
        log.finish(RunSummary(grown=Arm(label="a", epochs=_rows(grown)),
                              control=Arm(label="b", epochs=_rows(alone)), seconds=1))
    text = report(tmp_path).text
    assert expected in text
    assert "epochs.jsonl is missing" in text and "steps.npy is missing" in text
    for absent in ("Accuracy", "Step times", "Kernels considered", "FLOPs", "Audit trail"):
        assert absent not in text


def test_growth_that_did_not_pay_is_called_so(finished: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "worse")
    summary = read_run(folder).summary
    assert summary is not None and summary.control is not None
    swapped = summary.model_copy(update={"grown": summary.control, "control": summary.grown})
    (folder / "summary.json").write_text(swapped.model_dump_json())
    expected = "Growth did not pay: accuracy fell from 95.8 % to 90.8 %"
    assert expected in report(folder).text and expected in headline(folder)


def test_a_run_that_was_killed_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    (folder / "summary.json").unlink()
    (folder / "steps.npy").unlink()
    epochs = (folder / "epochs.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "epochs.jsonl").write_bytes(b"".join(epochs[:50]) + epochs[50][:30])
    text = report(folder).text
    assert "has not reached its end" in text and "after epoch 50" in text
    assert "last line of epochs.jsonl is torn" in text
    assert "summary.json is missing" in text


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    depths = QueueDepths(karn_to_tezzeret=1, tezzeret_to_urabrask=2, urabrask_validation=0,
                         urza_storage=0)
    row = EpochRow(epoch=1, step=9, eval_loss=float("inf"), parameters=3, seconds=1.5,
                   active_sites=("a",), depths=depths, capacity=0.7,
                   budgets=(BudgetRow(name="latency", unit="ms", spent=1.25, limit=3.0),
                            BudgetRow(name="FLOPs", spent=12300, limit=40000),
                            BudgetRow(name="memory", unit="MB", limit=6)))
    with RunLog(tmp_path) as log:
        log.begin(RunInfo(name="r", seed=1, sites=("a",)))
        log.epoch(row)
        log.steps([0.1, 0.2, 0.3], [2, 1, 2])
    run = read_run(tmp_path)
    assert run.epochs == (row,) and run.summary is None and run.book is None
    assert run.growth_steps is not None and run.growth_steps.tolist() == [1, 2]
    assert "steps.npy" not in " ".join(run.notes)
    budgets = {f.name: f.value for f in figures(run) if "budget" in f.name}
    assert budgets == {"latency budget": "1.25 of 3 ms", "FLOPs budget": "12,300 of 40,000",
                       "memory budget": "not known of 6 MB"}


def test_a_folder_is_one_run(tmp_path: Path) -> None:
    with RunLog(fresh_folder(tmp_path / "r")) as log:
        log.begin(RunInfo(name="r", seed=1))
    with pytest.raises(ContractError, match="holds a run already"):
        RunLog(tmp_path / "r")
    assert fresh_folder(tmp_path / "r") == tmp_path / "r-2"
    with pytest.raises(ContractError, match="not a run folder"):
        write_report(tmp_path)
    (tmp_path / "r" / "summary.json").write_text("{}")
    with pytest.raises(ContractError, match=r"summary\.json is not a RunSummary"):
        write_report(tmp_path / "r")


def test_a_sum_of_flops_is_never_short_of_an_epoch() -> None:
    rows = _rows([1.0, 0.5])
    assert Arm(label="a", epochs=rows).training_flops(10) is None
    counted = tuple(r.model_copy(update={"flops_per_sample": 7}) for r in rows)
    assert Arm(label="a", epochs=counted).training_flops(10) == 3 * 10 * 14
    assert Arm(label="a", epochs=(counted[0], rows[1])).training_flops(10) is None


def test_axes_are_round() -> None:
    assert nice_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(3, 3) == [3]
    assert log_ticks(0.9, 60) == pytest.approx([1, 2, 5, 10, 20, 50])
    assert [duration(v) for v in (2.0, 0.0123, 4e-6, 5e-9)] == ["2 s", "12.3 ms", "4 us", "5 ns"]
    assert short_number(1_234_567) == "1.23 M"
    nothing = Series("grown", [1, 2], [None, float("nan")])
    assert line_chart("x", [nothing], width=300) == ""
    gap = Series("grown", [1, 2, 3, 4], [1.0, 2.0, None, 3.0])
    assert line_chart("x", [gap], width=300).count("M") >= 3
