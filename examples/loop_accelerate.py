"""Growth in a loop with Accelerate: the same session.   python examples/loop_accelerate.py"""
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

import esper

pixels, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
data = torch.utils.data.TensorDataset(pixels.float().view(-1, 1, 8, 8) / 16, y)
model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                      nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
esper.wrap(model, sites=["1", "3"], example=data[:2][0])
accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters()),
    torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(1400)), 32, shuffle=True))
loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
with esper.SlowTrack("library"), esper.Session(model, optimizer, loss_fn=loss_fn,
        holdout=[data[1400:]], library=esper.open_library("library")) as session:
    for epoch in range(1, 401):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model, batch)
                accelerator.backward(loss)
                optimizer.step()
                session.step(loss)  # counts where the optimizer really took a step
                optimizer.zero_grad()
        print(epoch, *(c.action + " " + c.reason for c in session.epoch().decision.commands))
