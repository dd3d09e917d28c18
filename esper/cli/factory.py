"""Builds the model that a configuration names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from esper.cli.config import ModelConfig
from esper.errors import ConfigError


def _module(where: str, beside: Path) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except ImportError as e:
            raise ConfigError(
                f"model.factory: module {where!r} cannot be imported ({e}); name an installed "
                "module, or a file ending in .py relative to the configuration"
            ) from e
    path = (beside / where).resolve()
    name = f"esper_host_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"model.factory: there is no file {path}; the path is relative to the configuration"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module


def build_model(config: ModelConfig, config_path: Path) -> nn.Module:
    """Import the factory and call it with its arguments.

    Raises:
        ConfigError: no such file, module or name; arguments that do not fit; no nn.Module.
    """
    where, _, name = config.factory.rpartition(":")
    module = _module(where, config_path.parent)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(names)}"
        raise ConfigError(f"model.factory: {where} has no callable {name!r}{hint}")
    try:
        model = factory(**config.arguments)
    except TypeError as e:
        raise ConfigError(f"model.arguments: {config.factory} cannot be called so: {e}") from e
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory: {config.factory} gave a {type(model).__name__}, not a torch.nn.Module"
        )
    return model
