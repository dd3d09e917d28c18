"""The opponent: growth by a fixed schedule, in plain torch. Nothing of esper is imported here.

Residual blocks whose last layer starts at zero are put behind the sites in turn, one every so
many epochs; the optimizer takes their parameters in where it has all others. Once the last one is
in, the model is the one that `big` trains from scratch.
"""

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer


def put_behind(model: nn.Module, site: str, block: nn.Module) -> None:
    """From now on what comes out of `site` goes through `block`."""
    parent, _, name = site.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, nn.Sequential(getattr(owner, name), block))


class FixedGrower:
    """Grows `blocks` blocks: after epoch `first`, and then every `every` epochs."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, sites: Sequence[str],
        make_block: Callable[[str], nn.Module], blocks: int, first: int, every: int,
    ) -> None:
        self.model, self.optimizer, self.make_block = model, optimizer, make_block
        self.due = {first + i * every: sites[i % len(sites)] for i in range(blocks)}

    def end_of_epoch(self, epoch: int) -> bool:
        """True where the model has grown. `epoch` counts those that are done."""
        site = self.due.get(epoch)
        if site is None:
            return False
        block = self.make_block(site)
        put_behind(self.model, site, block)
        self.optimizer.param_groups[0]["params"].extend(block.parameters())
        return True
