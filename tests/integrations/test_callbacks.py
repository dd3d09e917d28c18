"""Growth inside the loops of Lightning, transformers and Accelerate: steps, epochs, optimizers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.errors import ContractError, SiteError
from esper.leyline.command import Action
from esper.leyline.lifecycle import SeedState
from esper.tamiyo.state import Catalog, Decision, SystemState
from esper.tolaria.session import Session
from tests.support import ReadyLoader, command, mlp

ROWS, BATCH, EPOCHS = 48, 4, 3
X = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 10, (ROWS,), generator=torch.Generator().manual_seed(1))
HELD = (X[:8], Y[:8])


class Grows:
    """A seed after the first epoch, blended in from the second on."""

    def decide(self, state: SystemState, catalog: Catalog) -> Decision:
        action = {1: Action.GERMINATE, 2: Action.ADVANCE}.get(state.epoch)
        return Decision((command(action, state.sites[0].name),) if action else ())


@pytest.fixture(autouse=True)
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """The sessions that callbacks began, with kernels in plain torch."""
    made = []

    def begin(*args: Any, **options: Any) -> Session:
        session = Session(*args, policy=Grows(), **options)
        session._loader = ReadyLoader()  # type: ignore[assignment]
        session.growth.graft_steps = 4
        session.told = []  # type: ignore[attr-defined]
        add = session._losses.add

        def told(loss: Tensor) -> bool:
            session.told.append(loss)  # type: ignore[attr-defined]
            return add(loss)

        session._losses.add = told  # type: ignore[method-assign]
        made.append(session)
        return session

    monkeypatch.setattr("esper.integrations.growing.Session", begin)
    return made


def check(session: Session, model: nn.Module, steps: int) -> None:
    """Every optimizer step was one step of the session, and what grew is trained, once."""
    assert session.growth.step == steps and session.growth.epoch == EPOCHS
    (seed,) = session.growth.active()
    assert seed.state is SeedState.STABILIZATION and seed.failure is None
    grouped = [id(p) for g in session.optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    per_epoch = steps // EPOCHS
    taken = {int(session.optimizer.state[p]["step"]) for p in seed.params}
    # They join after the first step of the second epoch; the first of the third is at alpha = 0.
    assert taken == {2 * per_epoch - 2}


# -- Lightning ---------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    """The framework, whichever of its two packages is there."""
    module: Any = pytest.importorskip("esper.integrations.lightning", exc_type=ImportError,
                                      reason="neither lightning nor pytorch_lightning is installed")
    return module


def lightning_module(framework: Any, **attributes: Any) -> Any:
    class Module(framework._framework().LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = mlp()

        def training_step(self, batch: Any, index: int = 0) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return loss * math.nan if self.global_step in getattr(self, "bad", ()) else loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [scheduler]

    module = Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    esper.wrap(module.net, sites=["1"], example=X[:2])
    return module


def fit(framework: Any, module: Any, folder: Path, **settings: Any) -> Any:
    growth = framework.EsperCallback(loss_fn=type(module).training_step, holdout=[HELD])
    trainer = framework._framework().Trainer(
        max_epochs=EPOCHS, callbacks=[growth], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=folder, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(TensorDataset(X, Y), BATCH))
    return growth.session


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_lightning(lightning: Any, micro: int, precision: str, tmp_path: Path) -> None:
    module = lightning_module(lightning)
    first = module.training_step((X[: BATCH * micro], Y[: BATCH * micro])).item()
    session = fit(lightning, module, tmp_path, accumulate_grad_batches=micro, precision=precision)
    check(session, module, EPOCHS * ROWS // BATCH // micro)
    assert float(session.told[0]) == pytest.approx(first, rel=2e-2 if precision != "32" else 1e-5)
    rates = [g["lr"] for g in session.optimizer.param_groups]
    assert len(rates) == 2 and rates == pytest.approx([1e-2 * 0.5**EPOCHS] * 2)


def test_lightning_rolls_back_and_goes_on(lightning: Any, tmp_path: Path) -> None:
    module = lightning_module(lightning, bad=(20,))
    session = fit(lightning, module, tmp_path)
    assert session.growth.sites["1"].state is SeedState.ROLLED_BACK
    assert all(p.isfinite().all() for p in module.parameters())
    assert len(session.optimizer.param_groups) == 1


def test_lightning_says_what_it_cannot_do(lightning: Any, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"optimizes by hand; use esper\.Session"):
        fit(lightning, lightning_module(lightning, automatic_optimization=False), tmp_path)
    module = lightning_module(lightning)
    esper.unwrap(module)
    with pytest.raises(SiteError, match="not wrapped"):
        fit(lightning, module, tmp_path)
    module = lightning_module(lightning)

    def two() -> Any:
        optimizer = torch.optim.SGD(module.parameters())
        halved = torch.optim.lr_scheduler.ExponentialLR
        return [optimizer], [halved(optimizer, 0.5), halved(optimizer, 0.5)]

    module.configure_optimizers = two
    with pytest.raises(ContractError, match="1 optimizers and 2 schedulers"):
        fit(lightning, module, tmp_path)


# -- transformers ------------------------------------------------------------------------------


class Scored(nn.Module):
    """As models of transformers do: the loss comes from the model, beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = mlp()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Shared(Scored):
    """And as those do that are told how many items the whole step has."""

    def forward(  # type: ignore[override]
        self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None,
        **kwargs: Any
    ) -> dict[str, Tensor]:
        made = super().forward(x, labels)
        if labels is not None and num_items_in_batch is not None:
            made["loss"] = made["loss"] * len(labels) / num_items_in_batch
        return made


def train(
    model: nn.Module, folder: Path, compute_loss_func: Any = None, **settings: Any
) -> Session:
    module: Any = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from esper.integrations.transformers import EsperCallback

    rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    growth = EsperCallback(holdout=[{"x": HELD[0], "labels": HELD[1]}])
    arguments = module.TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, report_to=[],
        use_cpu=True, save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
        remove_unused_columns=False, lr_scheduler_type="linear", **settings)
    sampled = module.Trainer(model, arguments, train_dataset=rows, callbacks=[growth],
                             compute_loss_func=compute_loss_func)
    sampled._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    sampled.train()
    assert not model._forward_hooks
    session: Session = growth.session
    return session


@pytest.mark.parametrize("make", [Scored, Shared])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_transformers(
    make: Callable[[], nn.Module], micro: int, bf16: bool, tmp_path: Path
) -> None:
    model = make()
    first = model(X[: BATCH * micro], Y[: BATCH * micro])["loss"].item()
    esper.wrap(model, sites=["net.1"], example={"x": X[:2]})
    session = train(model, tmp_path, gradient_accumulation_steps=micro, bf16=bf16)
    check(session, model, EPOCHS * ROWS // BATCH // micro)
    told = float(session.told[0])  # type: ignore[attr-defined]
    assert told == pytest.approx(first, rel=2e-2 if bf16 else 1e-5)
    rates = [g["lr"] for g in session.optimizer.param_groups]
    assert len(set(rates)) == 1 and rates[0] < 1e-3, "new groups follow the schedule"


def test_transformers_without_a_loss_says_so(tmp_path: Path) -> None:
    model = Scored()
    esper.wrap(model.net, sites=["1"], example=X[:2])

    def outside(outputs: Any, labels: Tensor, **more: Any) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    with pytest.raises(ContractError, match=r"no loss was seen.*compute_loss_func"):
        train(model, tmp_path, compute_loss_func=outside)


# -- Accelerate --------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(micro: int, precision: str) -> None:
    module: Any = pytest.importorskip("accelerate", reason="accelerate is not installed")
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    model = mlp()
    esper.wrap(model, sites=["1"], example=X[:2])
    accelerator = module.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=micro)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, optimizer, scheduler, DataLoader(TensorDataset(X, Y), BATCH))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    session = Session(model, optimizer, loss_fn=loss_fn, holdout=[HELD], scheduler=scheduler,
                      policy=Grows())
    session._loader = ReadyLoader()  # type: ignore[assignment]
    session.growth.graft_steps = 4
    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                assert session.step(loss)
                scheduler.step()
                optimizer.zero_grad()
        session.epoch()
    check(session, model, EPOCHS * ROWS // BATCH // micro)
    assert len({g["lr"] for g in session.optimizer.param_groups}) == 1
    session.close()
