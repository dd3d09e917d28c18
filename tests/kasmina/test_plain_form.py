"""A blueprint in plain torch keeps the contract of a compiled kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.karn.templates import templates_for
from esper.kasmina.plain_form import PlainForm
from esper.kasmina.runner import PlainRunner
from esper.leyline.mode import FULL, GRAFTING, TRAINING
from esper.leyline.reference import apply, initial_parameters
from esper.leyline.signature import SiteKind, SiteSignature
from tests.support import bottleneck

SITES = [SiteSignature(kind=SiteKind.FEATURES, channels=8),
         SiteSignature(kind=SiteKind.TOKENS, channels=8, causal=True),
         SiteSignature(kind=SiteKind.MAP, channels=8)]


def moved(site: SiteSignature, ir: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    born = initial_parameters(ir, site, generator=generator)  # type: ignore[arg-type]
    return [(p + 0.1 * torch.randn(p.shape, generator=generator)).requires_grad_() for p in born]


@pytest.mark.parametrize("site", SITES, ids=[s.kind for s in SITES])
@pytest.mark.parametrize("mode", [TRAINING, GRAFTING, FULL])
def test_outputs_and_gradients_of_every_mode(site: SiteSignature, mode: int) -> None:
    for ir in templates_for(site)[:4]:
        params = moved(site, ir)
        runner = PlainRunner(PlainForm(ir, site), params)
        runner.set(0.3, mode)
        leaf = torch.randn(site.shape(3, 4), requires_grad=True)
        h = leaf * 1
        loss = runner(h).square().sum()
        loss.backward()
        got_h, *got = (t.grad for t in (leaf, *params))
        other = leaf.detach().clone().requires_grad_()
        leaves = [p.detach().clone().requires_grad_() for p in params]
        seed = apply(ir, site, other if mode == FULL else other.detach(), leaves)
        if mode == TRAINING:
            want_h = 2 * other.detach()
            want = list(torch.autograd.grad(seed, leaves, want_h))
        else:
            out = other + 0.3 * (seed - other)
            want_h, *want = torch.autograd.grad(out.square().sum(), [other, *leaves])
        torch.testing.assert_close(got_h, want_h)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_behind_a_frozen_host_it_learns_and_is_not_disturbed() -> None:
    site = SITES[0]
    ir = bottleneck(SiteKind.FEATURES)
    params = moved(site, ir)
    runner = PlainRunner(PlainForm(ir, site), params)
    runner.set(0.0, TRAINING)
    h = torch.randn(5, 8)
    before = h.clone()
    head = nn.Linear(8, 2)
    F.relu_(runner(h) * 1).sum().backward()
    assert torch.equal(h, before)
    seen = [p.grad.clone() for p in params if p.grad is not None]
    assert len(seen) == len(params)
    leaves = [p.detach().clone().requires_grad_() for p in params]
    want = torch.autograd.grad(apply(ir, site, before, leaves), leaves,
                               (before > 0).to(before.dtype))
    for a, b in zip(seen, want, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(runner(head(before) @ head.weight), head(before) @ head.weight)


def test_at_alpha_zero_it_is_the_very_tensor_and_under_autocast_of_its_type() -> None:
    site = SITES[0]
    ir = bottleneck(SiteKind.FEATURES)
    form, params = PlainForm(ir, site), moved(site, bottleneck(SiteKind.FEATURES))
    h = torch.randn(5, 8)
    assert form(h, params, 0.0, FULL) is h
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = h.bfloat16()
        out = form(half, params, 1.0, FULL)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, apply(ir, site, half.float(), params).bfloat16())
