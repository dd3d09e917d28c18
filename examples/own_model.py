"""Esper on a model and a training loop of your own.

    python examples/own_model.py

Every line that is about growth is marked; without them this is a plain PyTorch script.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import esper  # growth

torch.manual_seed(0)
torch.set_num_threads(1)  # growth: leaves a core to the processes that make kernels
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
order = torch.randperm(len(y))
train, holdout = order[:1400], order[1400:]

model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(x[batch]), y[batch])


def main():
    library = esper.open_library("library")  # growth: kernels are kept here between runs
    esper.wrap(model, sites=["1", "3"], example=x[:2])  # growth: where the model may grow
    with esper.SlowTrack("library"), esper.Session(  # growth
        model, optimizer, loss_fn=loss_fn, holdout=[holdout], library=library
    ) as session:
        for _ in range(90):  # growth: a run this short would be over before the first kernel
            if not session.catalog.kernels:
                time.sleep(1)
        for epoch in range(1, 401):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                session.step(loss)  # growth
            summary = session.epoch()  # growth: measures, decides, obeys
            for command in summary.decision.commands:
                print(f"epoch {epoch}: {command.action} {command.site}: {command.reason}")
    esper.export(model, "runs/own_model")  # growth: plain torch again, in a folder of its own
    print(f"held-out loss {summary.holdout_loss:.4f}; the grown model is in runs/own_model")


if __name__ == "__main__":
    main()
