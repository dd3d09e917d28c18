"""An average of the model's weights (an EMA, say) that grows along with the model."""

from __future__ import annotations

from torch import nn

from esper.errors import ContractError
from esper.kasmina.growth import Growth
from esper.kasmina.seed import Seed
from esper.kasmina.slot import taken_up
from esper.leyline.command import Transition


class Average:
    """Keeps the seeds of a copied model like those of the model it was copied from.

    `module` is what the average was made of by copying: the `module` of torch's `AveragedModel` and
    of most others, else the module itself. A seed that joins is copied as it is born; what becomes
    of the values is the averaging's business, which goes by the order of the parameters.

    Raises:
        ContractError: the average has other parameters than the model.
    """

    def __init__(self, growth: Growth, average: nn.Module) -> None:
        inner = getattr(average, "module", None)
        copied = inner if isinstance(inner, nn.Module) else average
        self._module: nn.Module = getattr(copied, "_orig_mod", copied)  # behind torch.compile
        self._growth = growth
        ours = {n: p.shape for n, p in growth.model.named_parameters()}
        theirs = {n: p.shape for n, p in self._module.named_parameters()}
        if ours != theirs:
            odd = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
            raise ContractError(f"the average and the model differ in {odd}; make the average of "
                                "the wrapped model, by copying it")
        # A copy that was made of a grown model has seeds already, hung up by the copying.
        self._copies: dict[Seed, Seed] = {}
        by_number = {s.number: s for s in growth.fossils() + growth.active()}
        for module in self._module.modules():
            for seed in taken_up(module):
                if seed.number in by_number:
                    self._copies[by_number[seed.number]] = seed
        self.follow()

    def moved(self, transition: Transition) -> None:
        """An observer of the growth; alpha moves without a transition, see `follow`."""
        self.follow()

    def follow(self) -> None:
        """Take up what joined, drop what left, blend as the model does."""
        live = [s for s in self._growth.fossils() + self._growth.active() if s.runner is not None]
        for gone in [s for s in self._copies if s.runner is None]:
            self._copies.pop(gone).remove()
        for seed in sorted(live, key=lambda s: s.number):
            if seed not in self._copies:
                copied = seed.copied_to(self._module.get_submodule(seed.site.name))
                self._copies[seed] = copied
            self._copies[seed].imitate(seed)

    def parameters_of(self, seed: Seed) -> list[nn.Parameter]:
        return self._copies[seed].params if seed in self._copies else []
