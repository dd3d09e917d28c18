"""Builds the model that a configuration names, and its optimizer."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from esper.cli.config import ModelConfig, OptimizerConfig
from esper.errors import ConfigError


def _module(where: str, beside: Path, key: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ImportError as e:
            raise ConfigError(
                f"{key}.factory: module {where!r} cannot be imported ({e}); name an installed "
                "module, or a file ending in .py relative to the configuration"
            ) from e
    path = (beside / where).resolve()
    name = f"esper_host_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"{key}.factory: there is no file {path}; the path is relative to the configuration"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module


def build_model(
    config: ModelConfig, config_path: Path, key: str = "model", **more: Any
) -> nn.Module:
    """Import the factory and call it with its arguments, and `more` that the configuration does
    not name. `key` is where the configuration names it, for messages.

    Raises:
        ConfigError: no such file, module or name; arguments that do not fit; no nn.Module.
    """
    where, _, name = config.factory.rpartition(":")
    module = _module(where, config_path.parent, key)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(names)}"
        raise ConfigError(f"{key}.factory: {where} has no callable {name!r}{hint}")
    try:
        model = factory(**config.arguments, **more)
    except TypeError as e:
        raise ConfigError(f"{key}.arguments: {config.factory} cannot be called so: {e}") from e
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{key}.factory: {config.factory} gave a {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's optimizer of that name, for all parameters that the model has now."""
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    match config.name:
        case "sgd":
            return torch.optim.SGD(model.parameters(), momentum=config.momentum, **common)
        case "adam":
            return torch.optim.Adam(model.parameters(), **common)
        case "adamw":
            return torch.optim.AdamW(model.parameters(), **common)
