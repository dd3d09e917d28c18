"""The fast path: a kernel in the place of a module's `forward`, and the way back.

Only the instance's `forward` is replaced. Parameters, state_dict, hooks, moves and copies are
the module's own, and whatever does not fit the kernel runs the plain forward, which stays the
truth. The kernel reads the parameters anew at every call, so it does not matter who replaces
them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from esper.kasmina.artifact import Kernel
from esper.leyline.mode import FULL
from esper.leyline.signature import SiteSignature

_plain_wanted = 0


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, every accelerated module runs its plain forward.

    For what a kernel cannot do and cannot notice in time: second derivatives
    (`create_graph=True`), which it refuses with an error in the backward.
    """
    global _plain_wanted
    _plain_wanted += 1
    try:
        yield
    finally:
        _plain_wanted -= 1


class Fast:
    """A module's `forward` while it is accelerated; called with whatever the module is.

    Args:
        module: whose forward this is.
        weights: (dotted name, shape) of the kernel's parameters, in its order.
        flat: all axes but the last are folded into the batch.
        only_eval: why not in training, or "".
        name: what `path` says of the kernel.
    """

    def __init__(
        self,
        module: nn.Module,
        kernel: Kernel,
        signature: SiteSignature,
        weights: Sequence[tuple[str, tuple[int, ...]]],
        *,
        rank: int,
        flat: bool,
        only_eval: str,
        name: str,
    ) -> None:
        self._kernel, self._signature, self._weights = kernel, signature, tuple(weights)
        self.rank, self.flat, self.only_eval, self.name = rank, flat, only_eval, name
        self._dtype: torch.dtype = getattr(torch, signature.dtype)
        self._device, self._channels = signature.device, signature.channels
        self._axis = 1 if signature.kind == "map" else -1
        self._module = module
        self._shapes = tuple(module.get_parameter(name).shape for name, _ in self._weights)
        own = module.__dict__.get("forward")
        self.prior: Callable[..., Any] | None = own
        self._bound = False

    def _bind(self) -> None:
        """Look up, once, the modules that own the parameters and how they hang together.

        Not before the first call: a copy is made while its module is still being put together.
        """
        module = self._module
        self._inner = [m for m in module.modules() if m is not module]
        self._links = [(parent._modules, name, child) for parent in module.modules()
                       for name, child in parent._modules.items() if child is not None]
        self._sources: list[tuple[dict[str, Any], str, torch.Size, tuple[int, ...] | None]] = []
        for (path, wanted), own in zip(self._weights, self._shapes, strict=True):
            owner, _, leaf = path.rpartition(".")
            parameters: dict[str, Any] = module.get_submodule(owner)._parameters
            self._sources.append((parameters, leaf, own, None if own == wanted else wanted))
        self._bound = True

    @property
    def plain(self) -> Callable[..., Any]:
        """The forward that the module has without esper."""
        if self.prior is not None:
            return self.prior
        bound: Callable[..., Any] = type(self._module).forward.__get__(self._module)
        return bound

    # Whoever looks at a forward's signature or code (torch.export does) means the plain one.
    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.plain

    @property
    def __code__(self) -> Any:
        return getattr(self.plain, "__code__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.why_plain(*args, **kwargs):
            return self.plain(*args, **kwargs)
        x = args[0]
        params = [p[leaf] if wanted is None else p[leaf].view(wanted)
                  for p, leaf, _, wanted in self._sources]
        if self.flat:
            return self._kernel(x.view(-1, self._channels), params, 1.0, FULL).view(x.shape)
        return self._kernel(x, params, 1.0, FULL)

    def why_plain(self, *args: Any, **kwargs: Any) -> str:
        """Why a call with these arguments runs the plain forward; "" where the kernel runs."""
        if len(args) != 1 or kwargs:
            return "it is called with more than one argument"
        x = args[0]
        if type(x) is not Tensor:
            return f"its input is a {type(x).__name__}, not a plain tensor"
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "the host is being compiled"
        if x.dtype is not self._dtype:
            return f"its input is {x.dtype}"
        if x.device.type != self._device:
            return f"its input is on {x.device}"
        if x.dim() != self.rank or x.shape[self._axis] != self._channels:
            return f"its input is shaped {list(x.shape)}"
        if not x.is_contiguous() or x.numel() == 0:
            return "its input is empty or not contiguous"
        if torch.is_autocast_enabled(self._device):
            return "it is under autocast"
        if _plain_wanted:
            return "it is inside esper.nn.plain()"
        if self.only_eval and any(m.training for m in self._module.modules()):
            return f"it is training, and {self.only_eval}"
        return self._changed() or _transformed()

    def _changed(self) -> str:
        if not self._bound:
            self._bind()
        for modules, name, child in self._links:
            if modules.get(name) is not child:
                return f"its submodule {name!r} was replaced"
        for m in self._inner:
            if (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
                    or m._backward_pre_hooks):
                return f"a hook was put on its {type(m).__name__}"
        for parameters, leaf, own, _ in self._sources:
            p = parameters.get(leaf)
            if p is None or p.dtype is not self._dtype or p.device.type != self._device:
                return f"its parameter {leaf!r} has changed its kind"
            # Compiled code does not look: it would read beyond the end of a smaller one.
            if p.shape != own:
                return (f"its parameter {leaf!r} was shaped {list(own)} and is shaped "
                        f"{list(p.shape)} now")
        return ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fast:
        other = Fast.__new__(Fast)
        other.__dict__.update(self.__dict__)
        memo[id(self)] = other
        other._module = copy.deepcopy(self._module, memo)
        other.prior = copy.deepcopy(self.prior, memo)
        other._bound = False
        return other

    def __reduce__(self) -> tuple[Callable[[nn.Module], Any], tuple[nn.Module]]:
        # Machine code does not travel: a model that is saved or sent whole arrives plain.
        return plain_forward, (self._module,)


def _transformed() -> str:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is under a transform of torch.func"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is watching"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    return ""


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that `module` has without esper."""
    own = module.__dict__.get("forward")
    if own is None:
        bound: Callable[..., Any] = type(module).forward.__get__(module)
        return bound
    return own.plain if isinstance(own, Fast) else own


def fast_of(module: nn.Module) -> Fast | None:
    own = module.__dict__.get("forward")
    return own if isinstance(own, Fast) else None


def path(module: nn.Module, *args: Any, **kwargs: Any) -> str:
    """Which path computes `module`: "plain", or the kernel that is installed.

    With arguments, which one a call with them would take now, and why where it is the plain.
    """
    fast = fast_of(module)
    if fast is None:
        return "plain"
    if args or kwargs:
        why = fast.why_plain(*args, **kwargs)
        return f"plain: {why}" if why else fast.name
    return fast.name


def undo(model: nn.Module) -> nn.Module:
    """Take every kernel out of `model` again; returns it. Safe on a model without any."""
    for module in model.modules():
        fast = fast_of(module)
        if fast is None:
            continue
        if fast.prior is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = fast.prior
    return model
