"""docs/policies.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn

import esper
import esper.tolaria.library as link
from esper.cli.config import PolicyConfig
from esper.leyline.command import Command
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.state import Catalog
from esper.urza.library import LocalLibrary
from tests.support import ReadyLoader
from tests.tamiyo.states import World, catalog, kernel, site

GUIDE = (Path(__file__).parents[1] / "docs/policies.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_its_configuration_is_understood_and_says_the_defaults() -> None:
    (section,) = blocks("yaml")
    config = PolicyConfig.model_validate(yaml.safe_load(section)["growth"]["policy"])
    assert config.model_copy(update={"budget": PolicyConfig().budget}) == PolicyConfig()


def test_its_chooser_chooses() -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    world = World((site("a"), site("b")), catalog(kernel("k"))).run(names["policy"], 20)
    assert {s for _, s, _ in world.grown} == {"a", "b"}
    assert any(c.reason == "162 parameters" for d in world.decisions for c in d.considered)


def test_its_policy_grows_a_seed(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    esper.wrap(model, sites=["1"], example=torch.randn(2, 16))
    data = [(torch.randn(8, 16), torch.randint(0, 2, (8,))) for _ in range(6)]

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records: list[Any] = []
    session = esper.Session(model, optimizer, loss_fn=loss_fn, holdout=data[:1],
                            library=LocalLibrary(tmp_path), policy=names["Once"](),
                            observers=[records.append])
    assert isinstance(session._link, link.LibraryLink)
    session.growth.graft_steps = 4
    session._loader = ReadyLoader()  # type: ignore[assignment]
    session._link.catalog = lambda run_id, now: Catalog((kernel("k"),))  # type: ignore[method-assign]
    esper.Trainer(model, optimizer, loss_fn, data[1:], session).fit(8)
    session.close()
    (seed,) = session.growth.fossils()
    assert seed.state is SeedState.FOSSILIZED
    assert next(r.reason for r in records if isinstance(r, Command)) == "the first there is"
