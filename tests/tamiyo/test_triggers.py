"""When: each strategy at epochs where it must speak, and where it must not."""

from __future__ import annotations

from itertools import pairwise

import pytest

from esper.tamiyo.triggers import Gap, Past, Plateau, Schedule, Trigger, look
from tests.tamiyo.states import state

FALLING, FLAT = (1.0, 0.8, 0.6, 0.4), (1.0, 0.6, 0.599, 0.598)


def test_a_schedule_ends_with_its_share_of_the_planned_epochs() -> None:
    schedule, grown, last = Schedule(start=2, every=3, until=0.5), [], None
    for epoch in range(1, 21):
        answer = schedule.look(state(epoch, planned_epochs=20), Past(last))
        if answer.grow:
            grown.append(epoch)
            last = epoch
    assert grown == [2, 5, 8]
    late = schedule.look(state(11, planned_epochs=20), Past(8))
    assert late.hindrance == "schedule: growth ends with epoch 10 of 20"
    assert schedule.look(state(11), Past(8)).grow, "of a run without a plan nothing is the end"


def test_plateau_waits_for_one() -> None:
    plateau = Plateau(patience=2)
    assert not plateau.look(state(4, losses=FALLING), Past()).grow
    assert "plateau: best held-out loss 0.598 after 0.6" in plateau.look(
        state(4, losses=FLAT), Past()).grow
    assert not plateau.look(state(4, losses=FLAT), Past(last=3)).grow, "too soon after the last"
    assert not Plateau(start=5, patience=2).look(state(4, losses=FLAT), Past()).grow


@pytest.mark.parametrize(
    ("train", "holdout", "said"),
    [
        (FLAT, FLAT, "the held-out loss lies 0.0% above it, at most 10.0%"),
        (FLAT, (1.0, 0.7, 0.75, 0.8), "but the held-out loss lies 29.5% above it"),
        (FALLING, FLAT, ""),
        ((), FLAT, ""),  # no training loss is known
        ((0.0, 0.0, 0.0, 0.0), FLAT, "lies inf% above it"),
    ],
)
def test_only_what_underfits_grows(
    train: tuple[float, ...], holdout: tuple[float, ...], said: str
) -> None:
    answer = Gap(patience=2).look(state(4, losses=holdout, train=train), Past())
    assert bool(answer.grow) == ("at most" in said)
    assert said in (answer.grow or answer.hindrance) and bool(said) == bool(
        answer.grow or answer.hindrance)


@pytest.mark.parametrize("trigger", [Schedule(1, 2), Plateau(1, 2), Gap(1, 2)])
def test_load_stretches_every_trigger(trigger: Trigger) -> None:
    flat = (1.0,) * 20
    grown: dict[float, list[int]] = {}
    for capacity in (1.0, 0.3):
        last: int | None = None
        for epoch in range(3, 21):
            now = state(epoch, losses=flat[:epoch])
            answer = look(trigger, now, Past(last), capacity)
            if answer.grow:
                assert ("slowed: capacity 0.3 makes 2 epochs 7" in answer.grow) == (capacity < 1)
                grown.setdefault(capacity, []).append(epoch)
                last = epoch
            elif last is not None and epoch == last + 2:
                assert answer.hindrance.endswith("but capacity 0.3 makes 2 epochs 7")
    gaps = {c: {b - a for a, b in pairwise(g)} for c, g in grown.items()}
    assert gaps == {1.0: {2}, 0.3: {7}}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="every is 0; it must be at least 1"):
        Schedule(every=0)
    with pytest.raises(ValueError, match="max_gap is -1"):
        Gap(max_gap=-1)
