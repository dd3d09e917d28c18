"""Every error that esper raises on purpose.

A message says what was given, what was expected and what to do next. All of them derive
from `EsperError`, so a training script can fence off esper with one `except`.
"""


class EsperError(Exception):
    """Base class of all errors raised by esper."""


class ContractError(EsperError, ValueError):
    """A value breaks a contract of `esper.leyline`."""


class BlueprintError(ContractError):
    """A blueprint is malformed, too large, or dishonest about its shapes.

    `node` is the id of the offending node, or None where the whole graph is at fault.
    """

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(f"node {node!r}: {message}" if node is not None else message)
        self.node = node


class IllegalTransition(ContractError):
    """A state machine was asked for a transition that its table does not have."""


class ArtifactError(EsperError):
    """Base class: a kernel artifact was refused. Nothing of it has been opened or run."""


class ArtifactCorrupt(ArtifactError):
    """The file is truncated, too large, of a foreign format, or its digest does not match."""


class ArtifactMismatch(ArtifactError):
    """The artifact is sound but made for another ISA, arch, torch build or signature."""


class CompileError(EsperError):
    """Ahead-of-time compilation of one blueprint failed, crashed or ran out of time."""


class NoBackend(CompileError):
    """No backend of this worker compiles a blueprint for its device; another worker's may."""


class LibraryError(EsperError):
    """Base class for errors of Urza, the library."""


class NotInLibrary(LibraryError, KeyError):
    """No blueprint, kernel or blob of that id."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class StaleClaim(LibraryError):
    """The lease behind a claim expired and the item may be somebody else's by now."""


class Unreachable(LibraryError):
    """The library's server did not answer in time. What was asked may have been done, or not."""


class AccessDenied(LibraryError):
    """The library's server asks for a token, or for one with another role."""


class QueueFull(EsperError):
    """A queue refused an arrival because it is full of items of no lower priority."""


class CacheFull(EsperError):
    """Every kernel in the cache is in use, and there is no room for one more.

    The limits are ESPER_CACHE_BYTES and ESPER_CACHE_KERNELS (`esper.kasmina.cache`).
    """


class SiteError(EsperError):
    """A growth site does not exist, or its module cannot be grown there."""


class KernelFailure(EsperError):
    """A kernel failed while training; the host's own output was used in its place."""


class ConfigError(EsperError, ValueError):
    """A configuration file has an unknown key or a value out of range."""


class DataMissing(EsperError):
    """A data set is not on this machine; the message names the two ways to get it."""


class CheckpointError(EsperError):
    """A checkpoint is torn, damaged or foreign, does not fit the run, or cannot be written."""


class RankError(EsperError):
    """A process of a data-parallel run died or hangs, or does otherwise than the others."""
