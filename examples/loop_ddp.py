"""Growth in several processes.   torchrun --nproc-per-node 2 examples/loop_ddp.py"""
import torch
from sklearn.datasets import load_digits
from torch import nn

import esper

torch.distributed.init_process_group("gloo")
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
pixels, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
x = pixels.float().view(-1, 1, 8, 8) / 16
model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
                      nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
model = nn.parallel.DistributedDataParallel(esper.wrap(model, sites=["1", "3"], example=x[:2]))
optimizer = torch.optim.AdamW(model.parameters())
loss_fn = lambda model, rows: nn.functional.cross_entropy(model(x[rows]), y[rows])  # noqa: E731
with esper.SlowTrack("library"), esper.Session(
    model, optimizer, loss_fn=loss_fn, holdout=[torch.arange(1400, 1796)[rank::ranks]],
    library=esper.open_library("library"),
) as session:
    for epoch in range(1, 401):
        for rows in torch.randperm(1400, generator=torch.Generator().manual_seed(epoch)).split(56):
            loss = loss_fn(model, rows[rank::ranks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)  # on every rank, after the same number of steps
        print(rank, epoch, *(c.action + " " + c.reason for c in session.epoch().decision.commands))
torch.distributed.barrier()  # torch may abort in a process whose peers end first
