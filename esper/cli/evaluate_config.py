"""The YAML configuration of `esper evaluate`: one task, one host, and how it may grow."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from esper.cli.config import GrowthConfig, ModelConfig, Section, TrainConfig, load_yaml
from esper.cli.factory import build_model, build_optimizer
from esper.cli.policies import policy_of
from esper.data.config import DataConfig
from esper.data.sets import load_data
from esper.errors import ConfigError
from esper.evaluation.experiment import GROWN, Experiment, Growing
from esper.evaluation.gromo import gromo_version
from esper.evaluation.kernels import Recipe
from esper.leyline.artifact import Pipeline
from esper.tamiyo.state import Policy

Kind = Literal["random"]
EXAMPLE = "examples/evaluate/mnist1d.yaml"


class FixedConfig(Section):
    """The fixed grower adds `blocks` blocks, behind the sites in turn: after epoch `first`, and
    then every `every` epochs."""

    blocks: int = Field(ge=1, le=1000)
    first: int = Field(ge=1)
    every: int = Field(ge=1)


class KernelsConfig(Section):
    """What the library holds that esper and its random twin choose from: Karn's templates for the
    sites, and `mutants` of them for each kind of site, drawn with `seed`."""

    mutants: int = Field(default=4, ge=0, le=32)
    seed: int = Field(default=0, ge=0)
    pipeline: Pipeline = Pipeline.FAST


class EvaluateConfig(Section):
    """`block` makes what the fixed grower inserts, and is called with `channels` besides its
    arguments. `flops` is the budget of all arms that are not nominal; by default what the fixed
    grower spends in `train.epochs`. `target` is the metric that FLOPs to a target are counted to;
    by default the median end of the big model at equal FLOPs. `seeds` are those reported,
    `tuning_seeds` those on which settings are chosen (`--tuning`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    model: ModelConfig
    block: ModelConfig
    data: DataConfig
    train: TrainConfig
    fixed: FixedConfig
    growth: GrowthConfig
    kernels: KernelsConfig = KernelsConfig()
    flops: float | None = Field(default=None, gt=0)
    target: float | None = None
    seeds: tuple[int, ...] = tuple(range(10))
    tuning_seeds: tuple[int, ...] = tuple(range(100, 105))

    @field_validator("seeds", "tuning_seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise ValueError("give at least one seed, each once, none negative")
        return seeds

    @model_validator(mode="after")
    def _fit_together(self) -> EvaluateConfig:
        if shared := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ValueError(
                f"seeds and tuning_seeds share {', '.join(map(str, shared))}; what was tuned on a "
                "seed cannot be reported on it")
        last = self.fixed.first + (self.fixed.blocks - 1) * self.fixed.every
        if last >= self.train.epochs:
            raise ValueError(
                f"fixed: its last block would come after epoch {last} of {self.train.epochs}; it "
                "must have time to be trained")
        if self.growth.policy.kind == "bandit":
            raise ValueError("growth.policy.kind: a bandit learns over runs, and here each run "
                             "starts from a library without reports; choose heuristic")
        if not self.growth.enabled or self.growth.reproducible:
            raise ValueError("growth.enabled and growth.reproducible are not for evaluate, which "
                             "grows one arm and not another, and always reproducibly")
        return self


def load(path: Path) -> EvaluateConfig:
    """Read the configuration of an experiment.

    Raises:
        ConfigError: it cannot be read, or has a fault; each is listed with its place.
    """
    return load_yaml(path, EvaluateConfig, EXAMPLE)


def experiment_of(config: EvaluateConfig, path: Path) -> Experiment:
    """What the configuration describes, its data loaded.

    Raises:
        EsperError: its data or its model cannot be used.
    """
    growth = config.growth
    if growth.sites == "auto":
        raise ConfigError(f"{path}: growth.sites: name the sites; the arms must share them")

    def host() -> nn.Module:
        return build_model(config.model, path)

    def block(channels: int) -> nn.Module:
        return build_model(config.block, path, "block", channels=channels)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, config.train.optimizer)

    def policy(seed: int, kind: Kind | None = None) -> Policy:
        given = growth.policy.model_copy(update={"kind": kind or growth.policy.kind})
        return policy_of(given, epochs=config.train.epochs, batch_size=config.data.batch_size,
                         seed=seed)

    def random(seed: int) -> Policy:
        return policy(seed, "random")

    return Experiment(
        name=config.name, data=load_data(config.data, path), batch_size=config.data.batch_size,
        epochs=config.train.epochs, host=host, block=block, optimizer=optimizer,
        sites=tuple(growth.sites), blocks=config.fixed.blocks, first=config.fixed.first,
        every=config.fixed.every, policy=policy, random=random,
        flops=None if config.flops is None else round(config.flops), causal=growth.causal,
        growing=Growing(schedule=growth.alpha.kind, graft_steps=growth.alpha.steps,
                        embargo_epochs=growth.embargo_epochs, lr_scale=growth.lr_scale,
                        warm_up=growth.warm_up),
    )


def recipe_of(config: EvaluateConfig, experiment: Experiment) -> Recipe:
    signatures = tuple(dict.fromkeys(experiment.signatures.values()))
    return Recipe(signatures, config.kernels.mutants, config.kernels.seed, config.kernels.pipeline)


def identity(
    config: EvaluateConfig, path: Path, arm: str, budget: int
) -> Mapping[str, Any]:
    """All of the configuration that the outcome of an arm depends on, and nothing else: a policy
    may be changed without running the controls again."""
    whole = config.model_dump(mode="json")
    keys = ["model", "data", "train"]
    if arm in ("big", "big_matched", "fixed", "gromo"):
        keys += ["block", "fixed"]
        whole["sites"] = whole["growth"]["sites"]
        keys.append("sites")
    if arm in GROWN:
        keys += ["growth", "kernels"]
    if arm not in GROWN:
        del whole["data"]["holdout_limit"]  # nobody else looks at the holdout
    if arm == "gromo":
        whole["gromo"] = gromo_version()
        keys.append("gromo")
    files = {config.model.factory.rpartition(":")[0], config.block.factory.rpartition(":")[0]}
    sources = {f: hashlib.sha256((path.parent / f).read_bytes()).hexdigest()
               for f in sorted(files) if f.endswith(".py")}
    return {"budget": budget, "sources": sources, **{k: whole[k] for k in keys}}
