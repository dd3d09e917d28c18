"""Builds the policy that a configuration describes."""

from __future__ import annotations

from typing import Any

from esper.cli.config import PolicyConfig, RunConfig
from esper.errors import ConfigError, ContractError
from esper.tamiyo.budgets import Budget
from esper.tamiyo.care import Care, Clockwork
from esper.tamiyo.choice import Chooser
from esper.tamiyo.heuristic import HeuristicPolicy
from esper.tamiyo.ranking import FieldRanking
from esper.tamiyo.triggers import Gap, Plateau, Schedule, Trigger
from esper.tamiyo.twins import FixedSchedule, RandomTwin


def _trigger(config: PolicyConfig) -> Trigger:
    match config.trigger:
        case "schedule":
            return _schedule(config)
        case "plateau":
            return Plateau(config.start, config.patience, config.min_delta)
        case "gap":
            return Gap(config.start, config.patience, config.min_delta, config.max_gap)


def _schedule(config: PolicyConfig) -> Schedule:
    return Schedule(config.start, config.every, config.until)


def make_policy(config: RunConfig, chooser: Chooser | None = None) -> HeuristicPolicy:
    """The policy of a run; see `policy_of`."""
    return policy_of(config.growth.policy, epochs=config.train.epochs, seed=config.seed,
                     batch_size=config.data.batch_size, chooser=chooser)


def policy_of(
    given: PolicyConfig, *, epochs: int, batch_size: int, seed: int,
    chooser: Chooser | None = None,
) -> HeuristicPolicy:
    """The policy of these settings, for a run of so many epochs. Of kind bandit it is the heuristic
    with another `chooser`, where there is one.

    Raises:
        ConfigError: its settings leave no epoch to grow at.
    """
    ages = {name: getattr(given, name) for name in (
        "training_epochs", "stabilization_epochs", "fine_tuning_epochs")}
    common: dict[str, Any] = {
        "budget": Budget(**given.budget.model_dump(), batch_size=batch_size),
        "max_growths": given.max_growths, "max_active": given.max_active, "tags": given.tags,
        "seed": seed,
    }
    match given.kind:
        case "heuristic" | "bandit":
            return HeuristicPolicy(_trigger(given), chooser if chooser is not None
                                   else FieldRanking(), Care(**ages, min_gain=given.min_gain),
                                   **common)
        case "random":
            try:
                return RandomTwin(epochs, like=_schedule(given),
                                  care=Care(**ages, min_gain=given.min_gain), **common)
            except ContractError as e:
                raise ConfigError(f"growth.policy: {e}") from e
        case "fixed":
            return FixedSchedule(trigger=_schedule(given), blueprint=given.blueprint,
                                 care=Clockwork(**ages), **common)
