"""Growth in a loop of your own: the session.   python examples/loop_bare.py"""
import torch
from sklearn.datasets import load_digits
from torch import nn

import esper

pixels, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = pixels.float().view(-1, 1, 8, 8) / 16
model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                      nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
optimizer = torch.optim.AdamW(model.parameters())
esper.wrap(model, sites=["1", "3"], example=x[:2])  # where the model may grow

def loss_fn(model, rows):
    return nn.functional.cross_entropy(model(x[rows]), y[rows])

with esper.SlowTrack("library"), esper.Session(
    model, optimizer, loss_fn=loss_fn, holdout=[torch.arange(1400, 1797)],
    library=esper.open_library("library"),
) as session:
    for epoch in range(1, 401):
        for rows in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            loss = loss_fn(model, rows)
            loss.backward()
            optimizer.step()
            session.step(loss)  # guards, and the swap of what is ready
        print(epoch, *(c.action + " " + c.reason for c in session.epoch().decision.commands))
