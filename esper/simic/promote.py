"""From reports to a version: train, judge, keep, and promote only what has won."""

from __future__ import annotations

from dataclasses import dataclass

from esper.simic.experience import Experience
from esper.simic.judge import compare
from esper.simic.train import fit
from esper.simic.versions import Version, Versions
from esper.tamiyo.features import PLAIN

# Fewer than these are not worth a verdict: a bootstrap over a handful of runs is too sure.
MIN_TRAINING_REPORTS, MIN_TRAINING_RUNS, MIN_HELD_OUT_RUNS = 60, 12, 8
HEURISTIC = "what the heuristic goes by"


@dataclass(frozen=True)
class Outcome:
    """What came of a training: a version, or none; `said` is for people."""

    version: Version | None
    said: str


def too_few(train: Experience, held: Experience) -> str:
    """What is missing for a training, "" where nothing is."""
    missing = [
        f"{have} of {wanted} {what}" for have, wanted, what in (
            (len(train), MIN_TRAINING_REPORTS, "reports to train on"),
            (train.run_count, MIN_TRAINING_RUNS, "runs to train on"),
            (held.of_several().run_count, MIN_HELD_OUT_RUNS, "runs of two seeds to judge by"))
        if have < wanted]
    return f"too few reports: {', '.join(missing)}" if missing else ""


def judge(number: int, train: Experience, held: Experience, old: Version | None) -> Version:
    """The version of that number: trained on `train`, and promoted or not by `held`.

    The rival is `old`, or, where there is none, the same kind of model with nothing to go by but
    how the blueprint fared before and the moment: what the heuristic knows, as well weighed as
    that can be.
    """
    model = fit(train)
    rival = old.model if old is not None else fit(train, PLAIN)
    verdict = compare(model, rival, held, old.name if old is not None else HEURISTIC)
    against = (f"{verdict.better:+.1%} of the squared error of {verdict.rival} on "
               f"{verdict.reports} reports of {verdict.runs} held-out runs, {verdict.low:+.1%} to "
               f"{verdict.high:+.1%}")
    if verdict.wins:
        reason = f"promoted: saves {against}"
    elif verdict.low > 0:
        reason = f"not promoted: it orders seeds no better, though it saves {against}"
    else:
        reason = f"not promoted: not outside the noise, it saves {against}"
    return Version(number=number, reports=len(train), runs=train.run_count, verdict=verdict,
                   promoted=verdict.wins, reason=reason, model=model)


def train(experience: Experience, versions: Versions) -> Outcome:
    """Train on what there is, judge, keep the version, and promote it if it has won.

    Nothing is trained where there is too little, or where nothing has come since the last time: a
    verdict that is drawn again and again until it pleases is none.

    Raises:
        LibraryError: versions cannot be read or written.
    """
    learning, held = experience.part(held=False), experience.part(held=True)
    if lacking := too_few(learning, held):
        return Outcome(None, f"{lacking}; nothing was trained, nothing promoted")
    known = versions.all()
    if known and known[-1].reports + known[-1].verdict.reports >= len(experience):
        return Outcome(None, f"no report has come since {known[-1].name} was trained; it stands")
    old = next((v for v in reversed(known) if v.promoted), None)
    version = judge(known[-1].number + 1 if known else 1, learning, held, old)
    versions.add(version)
    return Outcome(version, f"{version.name}: {version.reason}")
