"""Versions of the policy: one JSON file each, below the library's folder, never changed or deleted.

    policies/bandit-3.json     {"digest": SHA-256 of what follows, "version": {...}}

A file says of itself whether it was promoted, over whom and by which figures, so the promoted
version is the newest of those that were: no mark that could go astray. It is written whole beside
its place and then linked to its name, which fails where that name is taken.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from esper.errors import LibraryError
from esper.files import sync
from esper.leyline.base import Contract, canonical_json, sha256
from esper.tamiyo.bandit import LinearModel

FOLDER = "policies"
MAX_BYTES = 8 << 20
_NAME = re.compile(r"bandit-(\d{1,9})\.json")


class Score(Contract):
    """How a model does on held-out reports, within their runs (see `judge`): the root of the mean
    squared error, in shares of the loss, and Spearman's rank correlation of predicted and observed
    worths; None where one of them is constant."""

    error: float
    rank: float | None


class Verdict(Contract):
    """`better` is by how much the new one's mean squared error is smaller, as a share of the
    rival's, from `low` to `high` in 98 of 100 resamples of the held-out runs."""

    rival: str
    runs: int = Field(ge=0)
    reports: int = Field(ge=0)
    new: Score
    old: Score
    better: float
    low: float
    high: float

    @property
    def wins(self) -> bool:
        """Outside the noise, and it orders seeds better than the rival, and than not at all."""
        return self.low > 0 and (self.new.rank or 0.0) > max(0.0, self.old.rank or 0.0)


class Version(Contract):
    """One trained policy. `reports` and `runs` count what it was trained on; `reason` says why it
    was promoted or was not. UTC seconds."""

    number: int = Field(ge=1)
    time: float = Field(default_factory=time.time)
    reports: int = Field(ge=0)
    runs: int = Field(ge=0)
    verdict: Verdict
    promoted: bool
    reason: str
    model: LinearModel

    @property
    def name(self) -> str:
        return f"bandit-{self.number}"


def digest_of(version: Version) -> str:
    return sha256(canonical_json(version.model_dump(mode="json")))


class Versions:
    """The versions of one library's folder, oldest first in `all`."""

    def __init__(self, library_folder: str | Path) -> None:
        self.folder = Path(library_folder) / FOLDER

    def numbers(self) -> list[int]:
        found = (_NAME.fullmatch(p.name) for p in self.folder.glob("bandit-*.json"))
        return sorted(int(m[1]) for m in found if m is not None)

    def read(self, number: int) -> Version:
        """One version, its digest checked.

        Raises:
            LibraryError: it cannot be read, or is not what was written.
        """
        path = self.folder / f"bandit-{number}.json"
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as e:
            raise LibraryError(f"{path}: {e.strerror}") from e
        if len(content) > MAX_BYTES:
            raise LibraryError(f"{path} has more than {MAX_BYTES} bytes; a version has fewer")
        try:
            held: Any = json.loads(content)
            said, body = held["digest"], held["version"]
            if sha256(canonical_json(body)) != said:
                raise LibraryError(f"{path} is not what was written: its digest is another. Move "
                                   "it away; the versions before it stay")
            version = Version.model_validate(body)
        except (ValueError, KeyError, TypeError, ValidationError) as e:
            raise LibraryError(f"{path} is no version of a policy that this esper can use: {e}. "
                               "Move it away; the versions before it stay") from e
        if version.number != number:
            raise LibraryError(f"{path} says that it is {version.name}")
        return version

    def named(self, name: str) -> Version:
        """The version that a run or a report names.

        Raises:
            LibraryError: see `read`.
        """
        found = _NAME.fullmatch(f"{name}.json")
        if found is None:
            raise LibraryError(f"{name!r} is not the name of a version, such as bandit-1")
        return self.read(int(found[1]))

    def all(self) -> list[Version]:
        """Every version.

        Raises:
            LibraryError: see `read`.
        """
        return [self.read(n) for n in self.numbers()]

    def promoted(self) -> Version | None:
        """The newest version that was promoted, None where none ever was.

        Raises:
            LibraryError: see `read`.
        """
        return next((v for v in reversed(self.all()) if v.promoted), None)

    def add(self, version: Version) -> Path:
        """Keep a version, durable when this returns.

        Raises:
            LibraryError: its number is taken, or the file system refused.
        """
        held = {"digest": digest_of(version), "version": version.model_dump(mode="json")}
        path = self.folder / f"{version.name}.json"
        beside = self.folder / f".partial-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(beside, "xb") as file:
                file.write(canonical_json(held))
                file.flush()
                os.fsync(file.fileno())
            os.link(beside, path)
            sync(self.folder)
        except FileExistsError as e:
            raise LibraryError(f"{path} is there already: somebody else trained at the same time; "
                               "run it again") from e
        except OSError as e:
            raise LibraryError(f"{path}: {e.strerror}") from e
        finally:
            beside.unlink(missing_ok=True)
        return path
