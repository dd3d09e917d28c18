"""A host not written for esper is wrapped, grown, unwrapped and exported."""

from __future__ import annotations

import ast
import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import esper.kasmina.growth as kasmina
from esper.errors import ArtifactCorrupt, IllegalTransition, SiteError
from esper.kasmina.export import export
from esper.kasmina.sites import suggest_sites
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from tests.support import (
    HOSTS,
    ReadyLoader,
    command,
    germinate,
    mlp,
    stir,
    to_full,
)


def wrapped(host: str) -> tuple[nn.Module, kasmina.Growth, torch.Tensor]:
    torch.manual_seed(0)
    make, example, sites, causal = HOSTS[host]
    model, x = make(), example()
    kasmina.wrap(model, sites=sites, example=x, causal=causal)
    growth = kasmina.growth_of(model)
    growth.graft_steps = 4
    return model.eval(), growth, x


@pytest.mark.parametrize("host", HOSTS)
def test_a_wrapped_model_is_untouched_until_a_seed_germinates(host: str) -> None:
    torch.manual_seed(0)
    make, example, sites, causal = HOSTS[host]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kasmina.wrap(model, sites=sites, example=example(), causal=causal)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("host", HOSTS)
def test_grow_unwrap_gives_the_host_back(host: str) -> None:
    model, growth, x = wrapped(host)
    names, plain = list(model.state_dict()), model(x)
    site = next(iter(growth.sites))
    germinate(growth, site)
    to_full(growth, site)
    stir(growth)
    assert not torch.equal(model(x), plain)
    assert len(list(model.state_dict())) > len(names)
    kasmina.unwrap(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("host", HOSTS)
def test_an_export_runs_without_esper(host: str, tmp_path: Path) -> None:
    model, growth, x = wrapped(host)
    for site in growth.sites:
        germinate(growth, site)
    to_full(growth, next(iter(growth.sites)))  # the second one stays in TRAINING
    stir(growth)
    expected = model(x)
    plain = export(model, tmp_path)
    torch.testing.assert_close(plain(x), expected)
    assert "esper" not in {type(m).__module__.partition(".")[0] for m in plain.modules()}

    from safetensors.torch import save_file

    save_file({"x": x, "expected": expected.detach().contiguous()}, tmp_path / "io.safetensors")
    # The host's own class comes along as a file; esper itself cannot be imported there.
    source = Path(__file__).parents[1] / "support.py"
    text = source.read_text()
    start, end = text.index("class ResidualBlock"), text.index("HOSTS = {")
    (tmp_path / "hosts.py").write_text(
        "import torch\nfrom torch import Tensor, nn\n\n\n" + text[start:end]
    )
    program = f"""
import pickle, sys
sys.modules["esper"] = None
import torch
from safetensors.torch import load_file, load_model
import hosts
from grown import grow
model = grow(hosts.{HOSTS[host][0].__name__}())
load_model(model, "model.safetensors")
io = load_file("io.safetensors")
torch.testing.assert_close(model.eval()(io["x"]), io["expected"])
sent = pickle.loads(pickle.dumps(model))  # as torch.multiprocessing does
torch.testing.assert_close(sent(io["x"]), io["expected"])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("name", ['"""\nopened = 1\n"""', "\\", "back\\slash\"\"\"", "'"])
def test_a_blueprints_name_is_no_code_in_an_export(name: str, tmp_path: Path) -> None:
    model, growth, x = wrapped("mlp")
    germinate(growth, "1")
    to_full(growth, "1")
    (seed,) = growth.active()
    assert seed.kernel is not None
    seed.kernel = replace(seed.kernel, ir=seed.kernel.ir.model_copy(update={"name": name}))
    torch.testing.assert_close(export(model, tmp_path)(x), model(x))
    (function,) = [n for n in ast.parse((tmp_path / "grown.py").read_text()).body
                   if isinstance(n, ast.FunctionDef) and n.name == "seed_0"]
    assert name in (ast.get_docstring(function, clean=False) or "")


def test_gradient_isolation_by_state() -> None:
    model, growth, x = wrapped("mlp")
    model.train()
    first = model[0].weight

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(x).square().sum().backward()
        assert first.grad is not None
        return first.grad.clone()

    alone = gradient()
    plain = model(x)
    germinate(growth, "3")
    seed = growth.active()[0]
    assert torch.equal(model(x), plain), "TRAINING leaves the output as it is"
    assert torch.equal(gradient(), alone), "and the host's gradients"
    up = seed.params[2]
    assert up.grad is not None and up.grad.abs().sum() > 0, "while the seed learns"

    stir(growth)
    growth.obey(command(Action.ADVANCE, "3"))
    growth.tick()
    growth.tick()
    assert 0 < seed.alpha < 1
    h = torch.randn(3, 12, requires_grad=True)
    assert seed.kernel is not None
    seed.kernel.kernel(h, seed.params, seed.alpha, 1).sum().backward()
    torch.testing.assert_close(h.grad, torch.full_like(h, 1 - seed.alpha))
    to = seed.alpha
    growth.tick(), growth.tick()
    assert seed.state is SeedState.STABILIZATION and seed.alpha == 1 > to
    assert not torch.allclose(gradient(), alone)


def test_an_illegal_command_changes_nothing() -> None:
    _model, growth, _x = wrapped("mlp")
    germinate(growth, "1")
    with pytest.raises(IllegalTransition, match="TRAINING -> FOSSILIZED"):
        growth.obey(command(Action.FOSSILIZE, "1"))
    assert growth.sites["1"].state is SeedState.TRAINING
    with pytest.raises(SiteError, match="no site 'nowhere'"):
        growth.obey(command(Action.CULL, "nowhere"))
    with pytest.raises(SiteError, match="only a DORMANT one"):
        growth.obey(command(Action.GERMINATE, "1"), ReadyLoader())  # type: ignore[arg-type]


def test_a_culled_site_rests_for_its_embargo() -> None:
    _model, growth, _x = wrapped("mlp")
    growth.embargo_epochs = 2
    told = []
    growth.observers.append(told.append)
    germinate(growth, "1")
    growth.obey(command(Action.CULL, "1"))
    assert growth.sites["1"].state is SeedState.CULLED
    growth.end_epoch()
    assert growth.sites["1"].state is SeedState.CULLED
    growth.end_epoch()
    assert growth.sites["1"].state is SeedState.DORMANT
    assert [(t.before.value, t.after.value) for t in told] == [
        ("DORMANT", "GERMINATED"), ("GERMINATED", "TRAINING"), ("TRAINING", "CULLED"),
        ("CULLED", "DORMANT"),
    ]


def test_a_failing_kernel_leaves_the_host_alone_and_is_reported() -> None:
    model, growth, x = wrapped("mlp")
    plain, failed = model(x), []
    growth.on_failure = lambda seed, reason: failed.append((seed.kernel_id, reason))

    def broken(*args: object) -> torch.Tensor:
        raise RuntimeError("the kernel broke")

    germinate(growth, "1", ReadyLoader(kernel=broken))
    model.train()
    assert torch.equal(model(x), plain)
    growth.tick()
    assert growth.sites["1"].state is SeedState.CULLED
    assert failed and failed[0][0] == "k-test" and "the kernel broke" in failed[0][1]


@pytest.mark.parametrize(
    ("error", "blamed"),
    [(FileNotFoundError("no such blob"), False), (ArtifactCorrupt("a bit flipped"), True)],
)
def test_a_kernel_that_cannot_be_loaded_is_culled(error: Exception, blamed: bool) -> None:
    model, growth, x = wrapped("mlp")
    failed, told = [], []
    growth.on_failure = lambda seed, reason: failed.append(reason)
    growth.observers.append(told.append)
    growth.embargo_epochs = 1
    germinate(growth, "1", ReadyLoader(error=error))
    assert growth.sites["1"].state is SeedState.CULLED
    assert bool(failed) == blamed
    assert model(x).isfinite().all()
    growth.end_epoch()
    assert growth.sites["1"].state is SeedState.DORMANT
    assert len({t.trace_id for t in told}) == 1, "the whole life of a seed is one trace"


def test_a_kernel_opened_on_another_gpu_is_refused() -> None:
    """By names of devices alone, for the machine may have none."""

    def on(*devices: str) -> Any:
        found = [SimpleNamespace(device=torch.device(d)) for d in devices]
        return SimpleNamespace(name="1", module=SimpleNamespace(parameters=lambda: found),
                               parameters=lambda: found)

    first = torch.device("cuda:0")
    with pytest.raises(SiteError, match=r"'1' is on cuda:1, its kernel was opened on cuda:0"):
        kasmina.check_device(on("cuda:1"), on("cuda:0"), first)
    with pytest.raises(SiteError, match="CUDA_VISIBLE_DEVICES"):
        kasmina.check_device(on(), on("cuda:1", "cpu"), first)
    kasmina.check_device(on("cuda:0"), on("cuda:1"), first)
    kasmina.check_device(on("cpu"), on("cpu"), first)  # weights that are brought when needed


def test_a_wrapped_model_is_not_kept_alive() -> None:
    model, growth, _ = wrapped("mlp")
    # As the hooks of a session lead back to its model.
    growth.on_failure = lambda seed, reason, host=model: host.eval()
    gone = weakref.ref(model)
    del model, growth
    gc.collect()
    assert gone() is None


def test_fossils_stack_and_keep_growing_from_the_same_site() -> None:
    model, growth, x = wrapped("mlp")
    for _ in range(2):
        germinate(growth, "1")
        to_full(growth, "1")
        growth.obey(command(Action.ADVANCE, "1"))
        growth.obey(command(Action.FOSSILIZE, "1"))
    assert len(growth.fossils()) == 2 and growth.sites["1"].state is SeedState.DORMANT
    stir(growth)
    torch.testing.assert_close(export(model)(x), model(x))


def test_sites_are_refused_with_a_reason() -> None:
    model = mlp()
    x = torch.randn(2, 16)
    with pytest.raises(SiteError, match="matches no module; nearest names"):
        kasmina.wrap(model, sites=["layer9"], example=x)
    with pytest.raises(SiteError, match="not called in the model's forward"):
        kasmina.wrap(nn.MultiheadAttention(16, 2), sites=["out_proj"], example=(x, x, x))
    with pytest.raises(SiteError, match="give wrap an example"):
        kasmina.wrap(model, sites=["1"])
    with pytest.raises(SiteError, match="not wrapped"):
        kasmina.unwrap(model)


def test_suggestions_explain_themselves() -> None:
    make, example, _, _ = HOSTS["cnn"]
    suggestions = {s.name: s for s in suggest_sites(make(), example())}
    assert [n for n, s in suggestions.items() if s.suitable] == ["2", "3"]
    assert "repeated block" in suggestions["2"].reason
    assert "the model's result" in suggestions["6"].reason
    assert all(s.reason for s in suggestions.values())


def test_a_deep_copy_of_a_grown_model_computes_the_same_on_its_own() -> None:
    model, growth, x = wrapped("mlp")
    germinate(growth, "1")
    to_full(growth, "1")
    stir(growth)
    average = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(average(x), expected)
    with torch.no_grad():
        growth.active()[0].params[0].zero_()
    assert torch.equal(average(x), expected) and not torch.equal(model(x), expected)


def test_a_host_may_work_in_place_on_what_a_learning_seed_saw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(inplace=True), nn.Linear(12, 2))
    kasmina.wrap(model, sites=["0"], example=torch.randn(2, 16))
    growth = kasmina.growth_of(model)
    germinate(growth, "0")
    x = torch.randn(4, 16)
    model(x).sum().backward()
    (seed,) = growth.active()
    # What the seed should have learnt: the gradient where it sits, before the activation.
    h = model[0](x).detach()
    before = h.clone().requires_grad_()
    model[2](torch.relu(before)).sum().backward()
    assert seed.kernel is not None
    leaves = [p.detach().requires_grad_() for p in seed.params]
    out = seed.kernel.kernel(h, leaves, 1.0, 2)
    expected = torch.autograd.grad(out, leaves, before.grad)
    for p, g in zip(seed.params, expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_backward_that_fails_stays_in_the_seed() -> None:
    model, growth, x = wrapped("mlp")

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, h: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("the backward broke")

    germinate(growth, "1", ReadyLoader(kernel=lambda h, params, *_: Broken.apply(h, *params)))
    model.train()
    model(x).sum().backward()
    growth.tick()
    assert growth.sites["1"].state is SeedState.CULLED


def test_a_seed_that_leaves_lets_go_of_its_kernel() -> None:
    """The cache may close it then; whoever keeps the seed for its history does not pin it."""
    _, growth, _ = wrapped("mlp")
    germinate(growth, "1")
    (seed,) = growth.active()
    assert seed.kernel is not None
    growth.roll_back("test")
    assert seed.kernel is None and not seed.params
