"""The results of an experiment on disk: one JSON file a run, whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.errors import ConfigError
from esper.files import write_whole
from esper.leyline.base import differing, flat


class Store:
    """Runs in `folder`, named by arm and seed. `identity` of a run is all that its outcome depends
    on, in plain values: a run is only ever reused for what it was a run of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = folder / "runs"

    def path(self, arm: str, seed: int) -> Path:
        return self.runs / f"{arm}-{seed}.json"

    def read(self, arm: str, seed: int) -> dict[str, Any] | None:
        """A run that is over, None where there is none.

        Raises:
            ConfigError: the file is not one of ours.
        """
        path = self.path(arm, seed)
        if not path.exists():
            return None
        try:
            run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            assert run["arm"] == arm and run["seed"] == seed
        except (ValueError, KeyError, TypeError, AssertionError) as e:
            raise ConfigError(f"{path} is not the result of a run ({e!r}); remove it, and it is "
                              "run again") from e
        return run

    def done(self, arm: str, seed: int, identity: Mapping[str, Any]) -> bool:
        """Whether there is nothing left to do for it. A run that failed is tried again.

        Raises:
            ConfigError: it was run with another configuration; says what has changed.
        """
        run = self.read(arm, seed)
        if run is None:
            return False
        old, new = flat(run["identity"]), flat(json.loads(json.dumps(identity)))
        if changed := differing(old, new):
            shown = ", ".join(f"{k} was {_say(old, k)} and is {_say(new, k)}" for k in changed)
            raise ConfigError(
                f"{self.path(arm, seed)} is of another configuration: {shown}. Give the file as it "
                "was, or another name or --out; or remove that result, and it is run again")
        return run["failure"] is None

    def write(self, arm: str, seed: int, run: Mapping[str, Any]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        write_json(self.path(arm, seed), {"arm": arm, "seed": seed, **run})


def write_json(path: Path, value: Any) -> None:
    """The file appears whole or not at all. A number that is not finite is refused."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False).encode())


def _say(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not there"
