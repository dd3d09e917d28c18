"""The YAML configuration of `esper train`.

Paths under `model` and `data` are relative to the configuration file, so that an example
can be moved with its model; `out` and `library.path` are relative to the working folder,
for they are where this machine keeps things.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from esper.data.config import DataConfig
from esper.errors import ConfigError
from esper.leyline.artifact import Pipeline
from esper.rpc.address import parse_address

MAX_CONFIG_BYTES = 1 << 20
M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    """Frozen, and closed: a misspelt key is an error, not a setting that does nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """`factory` is "file.py:name" or "package.module:name"; called with `arguments`."""

    factory: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")
    arguments: dict[str, Any] = Field(default_factory=dict)


class OptimizerConfig(Section):
    """`momentum` is for sgd only."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)


class TrainConfig(Section):
    epochs: int = Field(ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()


class BudgetConfig(Section):
    """What all seeds together may add; absent is no limit. `flops` are of one forward pass of one
    sample, `latency_ms` and `memory_mb` of one step; see `tamiyo.budgets.Budget`."""

    parameters: int | None = Field(default=None, ge=1)
    flops: int | None = Field(default=None, ge=1)
    latency_ms: float | None = Field(default=None, gt=0)
    memory_mb: float | None = Field(default=None, gt=0)


class PolicyConfig(Section):
    """When and where to grow, and what becomes of seeds; see docs/policies.md. Times are in
    epochs. A kernel must carry all of `tags`. Settings of another `kind` or `trigger` than the one
    chosen are refused, for they would do nothing. With kind "bandit", what Simic promoted says
    where and which, see docs/learning.md."""

    kind: Literal["heuristic", "bandit", "random", "fixed"] = "heuristic"
    trigger: Literal["schedule", "plateau", "gap"] = "schedule"
    start: int = Field(default=2, ge=0)
    every: int = Field(default=3, ge=1)
    until: float = Field(default=0.6, gt=0, le=1)
    patience: int = Field(default=3, ge=1)
    min_delta: float = Field(default=0.01, ge=0)
    max_gap: float = Field(default=0.1, ge=0)
    max_growths: int = Field(default=8, ge=0)
    max_active: int = Field(default=1, ge=1)
    training_epochs: int = Field(default=3, ge=1)
    stabilization_epochs: int = Field(default=1, ge=0)
    fine_tuning_epochs: int = Field(default=1, ge=0)
    min_gain: float = Field(default=0.0, ge=0)
    tags: tuple[str, ...] = ()
    blueprint: str | None = None
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _nothing_idle(self) -> PolicyConfig:
        if self.kind in ("random", "fixed") and self.trigger != "schedule":
            raise ValueError(f"kind {self.kind} grows at times of its own; trigger {self.trigger} "
                             "goes with kind heuristic or bandit")
        used_by = {
            "every": ("trigger", ("schedule",)), "until": ("trigger", ("schedule",)),
            "patience": ("trigger", ("plateau", "gap")),
            "min_delta": ("trigger", ("plateau", "gap")), "max_gap": ("trigger", ("gap",)),
            "min_gain": ("kind", ("heuristic", "bandit", "random")),
            "blueprint": ("kind", ("fixed",)),
        }
        for name, (key, values) in used_by.items():
            chosen = getattr(self, key)
            if name in self.model_fields_set and chosen not in values:
                raise ValueError(f"{name} goes with {key} {' or '.join(values)}, and {key} is "
                                 f"{chosen}; leave it out")
        return self


class AlphaConfig(Section):
    """How a seed is blended in: the curve, and over how many steps."""

    kind: Literal["linear", "cosine", "sigmoid"] = "cosine"
    steps: int = Field(default=100, ge=1)


class GrowthConfig(Section):
    """`sites` is "auto" or names and patterns of modules. `lr_scale` multiplies the learning
    rate of seeds, which rises to that over their first `warm_up` steps. `embargo_epochs` is how
    long a site rests after a seed left it. With `reproducible`, kernels and the library are waited
    for, so that the run depends on nothing but the library's content."""

    enabled: bool = True
    sites: Literal["auto"] | tuple[str, ...] = "auto"
    causal: bool = False
    policy: PolicyConfig = PolicyConfig()
    alpha: AlphaConfig = AlphaConfig()
    embargo_epochs: int = Field(default=5, ge=0)
    lr_scale: float = Field(default=1.0, gt=0)
    warm_up: int = Field(default=0, ge=0)
    reproducible: bool = False

    @field_validator("sites")
    @classmethod
    def _some(cls, sites: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not sites:
            raise ValueError('name at least one site, or write "auto"')
        return sites


class LibraryConfig(Section):
    """`path` is a folder. `urza` is the address of an `esper serve` instead, with `token_file`
    and `tls_ca` where that is host:port."""

    path: str = "library"
    urza: str | None = None
    token_file: str | None = None
    tls_ca: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> LibraryConfig:
        if self.urza is not None and "path" in self.model_fields_set:
            raise ValueError("give path or urza, not both")
        if self.urza is not None:
            parse_address(self.urza)
        elif self.token_file is not None or self.tls_ca is not None:
            raise ValueError("token_file and tls_ca go with urza")
        return self

    @property
    def where(self) -> str | Path:
        return Path(self.path) if self.urza is None else self.urza


class SlowTrackConfig(Section):
    """The processes that make kernels beside the run. `workers` counts compile services.

    With `priority: idle` they get what the training leaves; where it leaves nothing, nothing
    is compiled, so keep a core free by `threads`, or say "normal". `wait_seconds` lets the
    run wait before its first step until a first kernel is ready, at most so long.
    """

    enabled: bool = True
    priority: Literal["idle", "normal"] = "idle"
    workers: int = Field(default=1, ge=1, le=256)
    pipeline: Pipeline | None = None
    wait_seconds: float = Field(default=0.0, ge=0)


class CheckpointConfig(Section):
    """How often the run is saved by itself, and how many checkpoints stay. null is never."""

    every_epochs: int | None = Field(default=5, ge=1)
    every_steps: int | None = Field(default=None, ge=1)
    keep: int = Field(default=3, ge=1)


class RunConfig(Section):
    """One run. `threads` is for torch, None is torch's own choice; `compare` trains the same
    host without growth as well, for the report; `out` is by default runs/<name>."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(default=0, ge=0, lt=2**32)
    threads: int | None = Field(default=None, ge=1)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    growth: GrowthConfig = GrowthConfig()
    library: LibraryConfig = LibraryConfig()
    slow_track: SlowTrackConfig = SlowTrackConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compare: bool = True
    out: str | None = None

    @property
    def folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.name


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would keep the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise ConfigError(f"key {key!r} is given twice, on lines {seen[key]} and {line}")
            seen[key if isinstance(key, str) else repr(key)] = line
        return super().construct_mapping(node, deep)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _keys_beside(path: Sequence[int | str], section: type[BaseModel]) -> list[str]:
    """The keys of `section` that were open where the last part of `path` was given."""
    for part in path[:-1]:
        if isinstance(part, int):  # a place in a list, whose items are all of one kind
            continue
        field = section.model_fields.get(str(part))
        inner = _section_of(field.annotation) if field is not None else None
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def _explain(error: Any, model: type[BaseModel]) -> str:
    path = list(error["loc"])
    dotted = ".".join(str(p) for p in path) or "the file"
    if error["type"] == "extra_forbidden":
        keys = _keys_beside(path, model)
        near = difflib.get_close_matches(str(path[-1]), keys, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{dotted}: unknown key; {hint}the keys here are: {', '.join(keys)}"
    if error["type"] == "missing":
        return f"{dotted}: this key is required and not there"
    message = str(error["msg"])
    message = message.removeprefix("Value error, ")
    given = error.get("input")
    shown = f"; given: {given!r}" if isinstance(given, str | int | float | None) else ""
    return f"{dotted}: {message[:1].lower()}{message[1:]}{shown}"


def parse_config(text: str, source: str = "configuration") -> RunConfig:
    """Read the configuration of a run; see `parse_yaml`."""
    return parse_yaml(text, source, RunConfig)


def parse_yaml(text: str, source: str, model: type[M]) -> M:
    """Read a configuration that `model` describes; `source` names it in messages.

    Raises:
        ConfigError: not YAML, an unknown or missing key, or a value out of range; every
            fault is listed with its dotted path.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{source}: {len(text)} characters; a configuration has at most {MAX_CONFIG_BYTES}"
        )
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{source}: not valid YAML: {e}") from e
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source}: expected a mapping with the keys {', '.join(model.model_fields)}, "
            f"found {'nothing' if data is None else type(data).__name__}"
        )
    try:
        return model.model_validate(data)
    except ValidationError as e:
        # A union reports every member; one line per place in the file is enough.
        faults = dict.fromkeys(_explain(error, model) for error in e.errors(include_url=False))
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults)) from None


def load_config(path: str | Path) -> RunConfig:
    """Read the configuration file of a run; see `load_yaml`."""
    return load_yaml(path, RunConfig, "examples/digits.yaml")


def load_yaml(path: str | Path, model: type[M], example: str) -> M:
    """Read a configuration file that `model` describes, such as `example`.

    Raises:
        ConfigError: it cannot be read, or see `parse_yaml`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"{path}: {reason}; give the path of a YAML file, such as {example}"
        ) from e
    return parse_yaml(text, str(path), model)
