"""Models of timm and transformers, made from configuration: wrapped, grown with compiled kernels,
trained, exported and given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.growth import growth_of
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tolaria.optimizer import OptimizerSurgeon
from tests.kernels import Kernels
from tests.support import command

pytestmark = pytest.mark.slow

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WORDS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    example: Any
    sites: list[str] | str  # names, patterns, or "auto"
    suggested: int
    signature: str


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        reason = "timm is not installed here; it needs torchvision, which torch 2.14 has beside it"
        module: Any = pytest.importorskip("timm", reason=reason)
        model: nn.Module = module.create_model(name, pretrained=False, num_classes=5, **settings)
        return model

    return make


def hf(kind: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module: Any = pytest.importorskip("transformers", reason="transformers is not installed")
        model: nn.Module = getattr(module, kind)(getattr(module, config)(**settings))
        return model

    return make


STAGES: dict[str, Any] = {"hidden_sizes": [16, 16], "depths": [2, 2], "num_labels": 5}
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": 64}
MAP, TOKENS, CAUSAL = ("map[16] float32 cpu", "tokens[32] float32 cpu",
                       "tokens[32] float32 cpu causal")
MODELS = {
    "timm resnet": Model(
        timm("resnet18", channels=(16, 16, 16, 16)), IMAGES, ["layer2.*"], 8, MAP),
    "timm convnext": Model(
        timm("convnext_atto", depths=(2, 2, 1, 1), dims=(16, 16, 16, 16)), IMAGES,
        ["stages.*.blocks.1"], 4, MAP),
    "timm vit": Model(
        timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        IMAGES, ["blocks.0", "blocks.1.attn"], 2, TOKENS),
    "resnet": Model(
        hf("ResNetForImageClassification", "ResNetConfig", embedding_size=16, layer_type="basic",
           **STAGES), IMAGES, ["resnet.encoder.stages.*"], 3, MAP),
    "convnext": Model(
        hf("ConvNextForImageClassification", "ConvNextConfig", num_stages=2, patch_size=2,
           **STAGES), IMAGES, ["convnext.encoder.stages.1.layers.*"], 2, MAP),
    "vit": Model(
        hf("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, num_labels=5,
           **LAYERS), IMAGES, "auto", 2, TOKENS),
    "gpt2": Model(
        hf("GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_positions=16, n_embd=32, n_layer=2,
           n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), WORDS,
        ["transformer.h.0", "transformer.h.1.attn"], 2, CAUSAL),
    "bert": Model(
        hf("BertForSequenceClassification", "BertConfig", vocab_size=64, num_labels=5, **LAYERS),
        {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)},
        ["bert.encoder.layer.*"], 2, TOKENS),
}


def output(model: nn.Module, example: Any) -> Tensor:
    out: Any = model(**example) if isinstance(example, dict) else model(example)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def fresh(entry: Model) -> nn.Module:
    torch.manual_seed(0)
    return entry.make()


class Training:
    """Some steps of a loop that a growth goes through."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example, self.growth = model, example, growth_of(model)
        self.growth.graft_steps = 4
        self.optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        surgeon = OptimizerSurgeon(self.optimizer)
        self.growth.on_join, self.growth.on_leave = surgeon.join, surgeon.leave
        self.losses: list[float] = []

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            logits = output(self.model.train(), self.example)
            target = (torch.arange(logits.shape[0]) % 5)[:, None].expand(logits.shape[:-1]) if (
                logits.ndim == 3) else torch.arange(logits.shape[0]) % 5
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten())
            loss.backward()
            self.optimizer.step()
            self.growth.tick()
            self.losses.append(float(loss.detach()))

    def advance(self) -> None:
        for site in self.growth.sites.values():
            if site.seed is not None:
                self.growth.obey(command(Action.ADVANCE, site.name))


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_grown_trained_exported_and_given_back(
    name: str, kernels: Kernels, tmp_path: Path
) -> None:
    entry = MODELS[name]
    model = fresh(entry)
    before = output(model.eval(), entry.example)
    causal = "causal" in entry.signature
    suggested = [s for s in esper.suggest_sites(model, entry.example, causal=causal) if s.suitable]
    assert len(suggested) == entry.suggested, [str(s) for s in suggested]
    assert {str(s.signature) for s in suggested} == {entry.signature}
    esper.wrap(model, sites=entry.sites, example=entry.example, causal=causal)
    assert torch.equal(output(model, entry.example), before)

    run = Training(model, entry.example)
    assert len(run.growth.sites) == 2
    kernels.germinate(run.growth, *run.growth.sites)
    run.steps(4)
    seeds = run.growth.active()
    assert {s.state for s in seeds} == {SeedState.TRAINING}
    run.advance()
    run.steps(4)
    assert {s.state for s in seeds} == {SeedState.STABILIZATION}
    run.steps(8)
    assert all(s.failure is None for s in seeds)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for s in seeds for p in s.params)
    assert run.losses[-1] < run.losses[0]

    model.eval()
    grown = output(model, entry.example)
    plain = esper.export(model, tmp_path)
    torch.testing.assert_close(output(plain, entry.example), grown, rtol=1e-4, atol=1e-5)
    assert torch.equal(output(model, entry.example), grown)
    for seed in seeds:
        seed.forced = 0.0
    host = output(model, entry.example)
    assert not torch.allclose(host, grown)
    esper.unwrap(model)
    again = fresh(entry)
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(model, entry.example), host)
    assert torch.equal(output(again.eval(), entry.example), host)


def losses(name: str, kernels: Kernels, change: Callable[[nn.Module], Any], example: Any) -> Any:
    """Of a run through all states, and its model, grown."""
    entry = MODELS[name]
    model = fresh(entry)
    change(model)
    esper.wrap(model, sites=entry.sites, example=example, causal="causal" in entry.signature)
    run = Training(model, example)
    kernels.germinate(run.growth, *run.growth.sites)
    run.steps(3)
    run.advance()
    run.steps(8)
    assert {s.state for s in run.growth.active()} == {SeedState.STABILIZATION}
    assert all(s.failure is None for s in run.growth.active())
    return run.losses, model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_tied_weights_of_a_language_model(
    reentrant: bool, kernels: Kernels
) -> None:
    def turn_on(model: Any) -> None:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.24 on
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing

    plain, _ = losses("gpt2", kernels, lambda model: None, WORDS)
    got, model = losses("gpt2", kernels, turn_on, WORDS)
    assert got == pytest.approx(plain, rel=1e-4)
    for tied in (model, esper.export(model), esper.unwrap(model)):
        assert tied.lm_head.weight is tied.transformer.wte.weight


def test_a_channels_last_host_stays_channels_last(kernels: Kernels) -> None:
    seen: list[Tensor] = []

    def turn(model: Any) -> None:
        model.to(memory_format=torch.channels_last)

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    plain, _ = losses("resnet", kernels, lambda model: None, IMAGES)
    images = IMAGES.to(memory_format=torch.channels_last)
    got, model = losses("resnet", kernels, turn, images)
    assert got == pytest.approx(plain, rel=1e-3)
    site = next(iter(growth_of(model).sites))
    model.get_submodule(site).register_forward_hook(watch)
    grown = output(model.eval(), images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output(esper.export(model), images), grown, rtol=1e-4, atol=1e-5)
