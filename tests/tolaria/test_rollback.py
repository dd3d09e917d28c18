"""What went wrong is undone: NaN, a loss that explodes, a kernel that fails."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper.kasmina.growth as kasmina
from esper.errors import EsperError
from esper.leyline.command import Action, Transition
from esper.leyline.lifecycle import SeedState
from esper.tolaria.session import Session
from esper.tolaria.snapshot import Parts, Snapshot
from tests.support import HOSTS, ReadyLoader, bottleneck, command, germinate, plain_kernel
from tests.tolaria.test_session import batches, loss_fn


class Grown:
    """A session in mid-epoch with a fossil, an average, and a seed being blended in."""

    def __init__(self, host: str = "cnn", loader: Any = None) -> None:
        torch.manual_seed(0)
        make, example, self.sites, causal = HOSTS[host]
        self.data, self.seen = batches(host), []  # type: ignore[var-annotated]
        self.model = make()
        kasmina.wrap(self.model, sites=self.sites, example=example(), causal=causal)
        self.names = list(kasmina.growth_of(self.model).sites)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, amsgrad=True)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.session = Session(self.model, self.optimizer, loss_fn=loss_fn, holdout=self.data[:1],
                               ema=self.ema, observers=[self.seen.append])
        self.growth = self.session.growth
        self.growth.graft_steps = 4
        self.grow(self.names[0], to=SeedState.EVALUATING)
        self.growth.obey(command(Action.FOSSILIZE, self.names[0]))
        self.train(3)
        self.session.epoch()
        self.good = self.everything()
        self.grow(self.names[1], to=SeedState.GRAFTING, loader=loader)
        self.train(2)

    def train(self, steps: int) -> None:
        for batch in self.data[1 : 1 + steps]:
            self.optimizer.zero_grad()
            loss = loss_fn(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.ema.update_parameters(self.model)
            self.session.step(loss)

    def grow(self, site: str, to: SeedState, loader: Any = None) -> None:
        germinate(self.growth, site, loader)
        self.train(2)
        seed = self.growth.sites[site].seed
        assert seed is not None
        while seed.state is not to:
            if seed.state is SeedState.GRAFTING:
                self.train(1)
            else:
                self.growth.obey(command(Action.ADVANCE, site))

    def everything(self) -> dict[str, Any]:
        named = dict(self.model.named_parameters())
        state = {n: {k: v.clone() if isinstance(v, Tensor) else v
                     for k, v in self.optimizer.state[p].items()} for n, p in named.items()}
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "ema": {k: v.clone() for k, v in self.ema.state_dict().items()},
            "optimizer": state, "groups": len(self.optimizer.param_groups),
            "torch": torch.get_rng_state(), "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
        }

    def is_good_again(self) -> None:
        assert not self.growth.active() and len(self.growth.fossils()) == 1
        same(self.everything(), self.good)
        self.train(3)  # and can go on
        self.session.close()


def same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert (a == b).all()
    else:
        assert a == b


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("injected", ["weights", "loss", "explosion", "holdout"])
def test_everything_is_as_it_was_when_it_was_last_good(host: str, injected: str) -> None:
    run = Grown(host)
    random.random(), np.random.rand(), torch.rand(3)
    if injected == "explosion":
        for _ in range(20):
            assert run.session.step(torch.tensor(1.0))
        assert not run.session.step(torch.tensor(50.0))
    elif injected == "loss":
        assert not run.session.step(torch.tensor(float("inf")))
    else:
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(float("nan"))
        if injected == "holdout":
            # The weights went bad in the last step; the boundary notices, and is one more epoch.
            assert run.session.epoch().rolled_back
        else:
            x = run.data[0]
            assert not run.session.step(loss_fn(run.model, x))
    run.is_good_again()


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_kernel_that_fails_costs_its_seed_and_nothing_else(when: str) -> None:
    class Breaks:
        """Sound for its first calls."""

        def __init__(self) -> None:
            self.calls = 0
            self.kernel: Any = None

        def __call__(self, h: Tensor, params: list[Tensor], alpha: float, mode: int) -> Tensor:
            self.calls += 1
            if self.calls < 5:
                return self.kernel(h, params, alpha, mode)  # type: ignore[no-any-return]
            if when == "forward":
                raise RuntimeError("the kernel broke")
            h.register_hook(lambda g: g * float("nan"))  # what it gives back is bad
            return self.kernel(h, params, alpha, mode) * 1

    breaks = Breaks()

    class Loader(ReadyLoader):
        def prefetch(self, kernel_id: str, signature: Any, seed: int) -> Any:
            breaks.kernel = plain_kernel(bottleneck(signature.kind), signature)
            return super().prefetch(kernel_id, signature, seed)

    run = Grown("mlp", Loader(breaks))
    if when == "forward":
        run.train(4)
        assert run.growth.sites[run.names[1]].state is SeedState.CULLED
        trained = [p for g in run.optimizer.param_groups for p in g["params"]]
        assert {id(p) for p in trained} == {id(p) for p in run.model.parameters()}
        assert any(isinstance(r, Transition) and "the kernel broke" in r.trigger for r in run.seen)
        assert run.session.rollbacks == 0, "the host's own output stood"
    else:
        run.train(8)  # NaN reaches the host, the next loss shows it
        assert run.session.rollbacks >= 1 and not run.growth.active()
        assert all(bool(p.isfinite().all()) for p in run.model.parameters())
    run.session.close()


def test_memory_is_used_again_and_a_snapshot_given_up_is_of_no_use() -> None:
    run = Grown("mlp")
    parts = Parts(run.model, run.optimizer, ema=run.ema)
    first = Snapshot(parts)
    places = {t.data_ptr() for t in first.tensors.values()}
    second = Snapshot(parts, (), first)
    assert {t.data_ptr() for t in second.tensors.values()} == places
    with pytest.raises(EsperError, match="interrupted"):
        first.restore(parts)
    second.lent = True  # being written to disk
    third = Snapshot(parts, (), second)
    assert not places & {t.data_ptr() for t in third.tensors.values()}
    live = {p: run.optimizer.state[p]["exp_avg"].data_ptr() for p in run.model.parameters()}
    third.restore(parts)
    assert all(run.optimizer.state[p]["exp_avg"].data_ptr() == place for p, place in live.items())
    run.session.close()


def test_the_average_computes_as_a_copy_of_the_model_would() -> None:
    run = Grown("mlp")
    site = run.growth.sites[run.names[1]]
    assert site.seed is not None and site.seed.state is SeedState.GRAFTING
    averaged = run.ema.module
    with torch.no_grad():
        for ours, theirs in zip(run.model.parameters(), averaged.parameters(), strict=True):
            theirs.copy_(ours)
        x = run.data[0][0]
        torch.testing.assert_close(averaged(x), run.model(x), rtol=0, atol=0)
        before = averaged(x)
        site.seed.alpha = 1.0
        run.train(0)
        run.session._average.follow()  # type: ignore[union-attr]
        assert not torch.equal(averaged(x), before), "alpha is followed"
    # An average made of a model that has grown already follows as well.
    late = AveragedModel(run.model)
    run.session.close()
    again = Session(run.model, run.optimizer, loss_fn=loss_fn, holdout=run.data[:1], ema=late)
    again.growth.obey(command(Action.CULL, run.names[1]))
    assert [n for n, _ in late.module.named_parameters()] == [
        n for n, _ in run.model.named_parameters()]
    with torch.no_grad():
        torch.testing.assert_close(late(x), run.model(x), rtol=0, atol=0)
    again.close()
