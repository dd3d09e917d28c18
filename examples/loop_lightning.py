"""Growth under Lightning's Trainer: a callback.   python examples/loop_lightning.py"""
import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import esper
from esper.integrations.lightning import EsperCallback

pixels, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
data = TensorDataset(pixels.float().view(-1, 1, 8, 8) / 16, y)
class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(1024, 10))
    def training_step(self, batch, _=0):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
module = Digits()
esper.wrap(module.net, sites=["1"], example=data[:2][0])
with esper.SlowTrack("library"):
    growth = EsperCallback(loss_fn=Digits.training_step, holdout=[data[1400:]],
                           library=esper.open_library("library"), observers=[print])
    trainer = lightning.Trainer(max_epochs=400, callbacks=[growth], logger=False)
    trainer.fit(module, DataLoader(Subset(data, range(1400)), 64, shuffle=True))
