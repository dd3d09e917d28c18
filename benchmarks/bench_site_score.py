"""Does the score of a site say what is gained by growing there? The new score beside the old.

A small host is trained, its sites are scored, and the run then goes on from there once without a
seed and once with the same seed at each site in its turn, with the same batches: the gain is the
difference of their losses on samples that neither training nor score has seen. Reported are the
rank correlation of score and gain over the sites of a run (Spearman's, the mean over runs and
blueprints, with a bootstrap interval over the runs), and what of the gain the site with the best
score has: 1 where it is the best of all, 0 where it is as good as one taken at random.

The score was chosen among several with other random seeds.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import esper
from esper.karn.templates import templates_for
from esper.kasmina.growth import growth_of
from esper.leyline.reference import function, initial_parameters
from esper.tolaria.measure import SCORE_BATCHES
from esper.tolaria.scores import activations, site_scores

RUNS, DRAWS = 8, 2


class Digits:
    """8x8 digits with noise; a CNN whose sites differ in width and resolution."""

    sites: Sequence[str] = ("1", "3", "5", "7")
    blueprints: Sequence[str] = ("bottleneck", "dense conv")
    causal, before, after = False, 300, 200

    def __init__(self, seed: int) -> None:
        digits = load_digits()
        order = np.random.default_rng(seed).permutation(len(digits.data))
        self.x = torch.tensor(digits.data[order], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.y = torch.tensor(digits.target[order])

    def host(self) -> nn.Module:
        widths = ((1, 6, 1), (6, 12, 2), (12, 5, 1), (5, 10, 2))
        layers = [m for a, b, stride in widths
                  for m in (nn.Conv2d(a, b, 3, stride=stride, padding=1), nn.ReLU())]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        at = torch.randint(0, 900, (48,), generator=generator)
        x = self.x[at]
        return x + 0.15 * torch.randn(x.shape, generator=generator), self.y[at]

    def held_out(self) -> list[Any]:
        return [(self.x[i:i + 100], self.y[i:i + 100]) for i in range(900, 1300, 100)]

    def unseen(self) -> Any:
        return self.x[1300:], self.y[1300:]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class Teacher:
    """Regression on a random network (GradMax's setting): there are always fresh samples. The
    narrow layer of the student is early in one half of the runs and late in the other."""

    sites = ("1", "3", "5", "7", "9")
    blueprints = ("bottleneck", "wide")
    causal, before, after = False, 400, 400

    def __init__(self, seed: int) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.teacher = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(),
                                     nn.Linear(48, 4))
        with torch.no_grad():
            for p in self.teacher.parameters():
                wide = 2.2 if p.ndim > 1 else 1.0
                p.uniform_(-1, 1, generator=generator).mul_(wide * p.shape[-1] ** -0.5)
        self.scale = self.targets(self._inputs(0, 4096)).std(0)

    def host(self) -> nn.Module:
        widths = (16, 20, 8, 32, 12, 16) if self.seed % 2 else (16, 28, 20, 20, 7, 14)
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 4))

    def _inputs(self, step: int, count: int) -> Tensor:
        return torch.randn(count, 16, generator=torch.Generator().manual_seed(step))

    @torch.no_grad()
    def targets(self, x: Tensor) -> Tensor:
        return self.teacher(x)

    def batch(self, step: int, count: int = 64) -> tuple[Tensor, Tensor]:
        x = self._inputs(step, count)
        return x, self.targets(x)

    def held_out(self) -> list[Any]:
        return [self.batch(10**6 + i, 256) for i in range(4)]

    def unseen(self) -> Any:
        return self.batch(10**7, 4096)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return ((model(batch[0]) - batch[1]) / self.scale).square().mean()


class Text:
    """The standard library's sources, letter by letter; a causal transformer."""

    sites = ("drop", "layers.0", "layers.1", "layers.2")
    blueprints = ("bottleneck", "wide")
    causal, before, after, length = True, 500, 400, 24

    def __init__(self, seed: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = "".join((folder / f).read_text() for f in ("argparse.py", "ast.py", "difflib.py"))
        letters = {c: i for i, (c, _) in enumerate(Counter(text).most_common(63), 1)}
        coded = torch.tensor([letters.get(c, 0) for c in text])
        rows = coded[: len(coded) // (self.length + 1) * (self.length + 1)].view(
            -1, self.length + 1)
        self.rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]

    def host(self) -> nn.Module:
        return _Letters(16, self.length)

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return self.rows[1600:][torch.randint(0, len(self.rows) - 1600, (32,),
                                              generator=generator)]

    def held_out(self) -> list[Any]:
        return list(self.rows[:400].split(100))

    def unseen(self) -> Any:
        return self.rows[400:1600]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class _Letters(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(64, width), nn.Identity()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True,
                                       norm_first=True) for _ in range(3))
        self.head = nn.Linear(width, 64)
        self.mask: Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.drop(self.embed(letters))
        for layer in self.layers:
            x = layer(x, src_mask=self.mask)
        return self.head(x)


def train(task: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        task.loss(model, task.batch(step)).backward()
        optimizer.step()


def seed_at(model: nn.Module, site: str, signature: Any, blueprint: str, draw: int) -> list[Any]:
    """Put a seed there, in full from its first step; returns its parameters."""
    ir = next(t for t in templates_for(signature) if t.name == blueprint)
    apply = function(ir, signature)
    generator = torch.Generator().manual_seed(draw)
    parameters = [nn.Parameter(v)
                  for v in initial_parameters(ir, signature, generator=generator)]
    model.get_submodule(site).register_forward_hook(lambda m, args, h: apply(h, parameters))
    return parameters


def old_scores(task: Any, model: nn.Module, batch: Any) -> dict[str, float]:
    """What was used before: |dL/dh| |h|, summed over the samples of one batch."""
    return {name: float((g.flatten(1).norm(dim=1) * h.flatten(1).norm(dim=1)).sum())
            for name, h, g in activations(model, growth_of(model), task.loss, batch, task.sites)}


def one_run(make: Any, seed: int) -> Iterator[tuple[list[float], list[float], list[float]]]:
    """(new scores, old scores, gains) by site, for each blueprint."""
    torch.manual_seed(seed)
    task = make(seed)
    model = task.host()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    train(task, model, optimizer, range(task.before))
    held_out = task.held_out()
    example = held_out[0][0] if isinstance(held_out[0], tuple) else held_out[0][:, :-1]
    esper.wrap(model, sites=list(task.sites), example=example, causal=task.causal)
    growth = growth_of(model)
    new = site_scores(model, growth, task.loss, held_out[:SCORE_BATCHES])
    old = old_scores(task, model, held_out[0])
    signatures = {n: s.found.signature for n, s in growth.sites.items()}
    esper.unwrap(model)

    def goes_on(site: str | None, blueprint: str, draw: int) -> float:
        here = copy.deepcopy(model)
        again = torch.optim.Adam(here.parameters(), lr=3e-3)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if site is not None:
            again.add_param_group(
                {"params": seed_at(here, site, signatures[site], blueprint, draw)})
        train(task, here, again, range(task.before, task.before + task.after))
        with torch.no_grad():
            return float(task.loss(here.eval(), task.unseen()))

    alone = goes_on(None, "", 0)
    for blueprint in task.blueprints:
        gains = [alone - statistics.fmean(goes_on(s, blueprint, d) for d in range(DRAWS))
                 for s in task.sites]
        yield [new[s] for s in task.sites], [old[s] for s in task.sites], gains


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, without ties."""
    x, y = (np.argsort(np.argsort(v)) for v in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def share_of_best(scores: Sequence[float], gains: Sequence[float]) -> float:
    mean = statistics.fmean(gains)
    return (gains[int(np.argmax(scores))] - mean) / (max(gains) - mean)


@pytest.mark.slow
@pytest.mark.parametrize("host", [Teacher, Digits, Text], ids=lambda h: h.__name__.lower())
def test_scores(benchmark: Any, host: Any) -> None:
    torch.set_num_threads(1)
    runs = benchmark.pedantic(
        lambda: [list(one_run(host, 2000 + n)) for n in range(RUNS)], rounds=1)
    rng, told = np.random.default_rng(0), {}
    for name, which in (("new", 0), ("old", 1)):
        rho = [statistics.fmean(rank_correlation(b[which], b[2]) for b in run) for run in runs]
        best = [statistics.fmean(share_of_best(b[which], b[2]) for b in run) for run in runs]
        drawn = [statistics.fmean(rng.choice(rho, len(rho))) for _ in range(2000)]
        told[name] = {"rank_correlation": statistics.fmean(rho),
                      "low": float(np.quantile(drawn, 0.025)),
                      "high": float(np.quantile(drawn, 0.975)),
                      "share_of_best": statistics.fmean(best)}
    benchmark.extra_info.update(
        untimed=True, runs=RUNS, gains=np.mean([[b[2] for b in run] for run in runs], 0).tolist(),
        **{f"{name}_{k}": v for name, of in told.items() for k, v in of.items()})
    for name, of in told.items():
        print(f"\n{host.__name__}: the {name} score's rank correlation with the gain is "
              f"{of['rank_correlation']:.2f} [{of['low']:.2f}, {of['high']:.2f}], its first site "
              f"has {of['share_of_best']:.2f} of the best one's lead")
