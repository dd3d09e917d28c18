"""Content-addressed files: each is named by the SHA-256 of what is in it.

A blob is written to a temporary file of the same file system, synced, renamed, and the folder
synced. So a name in the store stands for whole, durable content at every moment, whatever
kills the writer; all that a crash can leave is a temporary file, which `sweep` removes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from esper.errors import ArtifactCorrupt, LibraryError, NotInLibrary
from esper.files import abandoned, sync, temporary_name
from esper.leyline.artifact import MAX_LIBRARY_BYTES, MAX_MANIFEST_BYTES
from esper.leyline.base import sha256
from esper.leyline.blueprint import MAX_JSON_BYTES

# The members at their largest, and room for the zip's own headers.
MAX_BLOB_BYTES = 2 * MAX_LIBRARY_BYTES + MAX_MANIFEST_BYTES + MAX_JSON_BYTES + 65536
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BlobFolder:
    """Blobs below `root`, in 256 folders by their first byte. Safe for threads and processes."""

    def __init__(self, root: Path, max_bytes: int = MAX_BLOB_BYTES) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._temporary = root / "tmp"
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            self.sweep()
        except OSError as e:
            raise LibraryError(
                f"cannot keep blobs in {root}: {e}; choose a folder you may write to"
            ) from e

    def put(self, content: bytes) -> str:
        """Store `content` durably; returns its digest. Storing it twice stores it once.

        Raises:
            ArtifactCorrupt: larger than the cap.
            LibraryError: the file system refused.
        """
        self._check_size(len(content), "the content")
        digest = sha256(content)
        if not self.holds(digest):
            self._write(digest, [content])
        return digest

    def take(self, digest: str, chunks: Iterable[bytes]) -> Path:
        """Store what arrives in pieces, hashed on the way; returns its read-only file.

        Raises:
            ArtifactCorrupt: another digest came out, or more than the cap came; nothing is kept.
            LibraryError: the file system refused.
        """
        hashed, size = hashlib.sha256(), 0

        def checked() -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                size += len(chunk)
                self._check_size(size, f"what should be blob {digest}")
                hashed.update(chunk)
                yield chunk
            if hashed.hexdigest() != digest:
                raise ArtifactCorrupt(
                    f"{size} bytes arrived with digest {hashed.hexdigest()}, expected {digest}; "
                    "nothing was kept, try again"
                )

        self._write(digest, checked())
        return self._path(digest)

    def holds(self, digest: str) -> bool:
        """Whether the blob is there and still has its digest: it is read and hashed."""
        if not _DIGEST.fullmatch(digest) or not self._path(digest).exists():
            return False
        try:
            return self._intact(self._path(digest), digest)
        except OSError as e:
            raise LibraryError(
                f"blob {digest} below {self.root} cannot be read: {e}; check the disk and the "
                "folder's permissions"
            ) from e

    def _write(self, digest: str, chunks: Iterable[bytes]) -> None:
        """Durably, as one rename at the end; whatever goes wrong leaves nothing."""
        path = self._path(digest)
        try:
            temporary = self._temporary / temporary_name()
            try:
                with open(temporary, "xb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o444)
                if not path.parent.exists():
                    path.parent.mkdir(exist_ok=True)
                    sync(self.root)
                os.replace(temporary, path)
                sync(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as e:
            raise LibraryError(
                f"could not store blob {digest} below {self.root}: {e}; free some space or check "
                "the folder's permissions, then try again"
            ) from e

    def path(self, digest: str) -> Path:
        """The read-only file of that digest; its content is not read here.

        Raises:
            NotInLibrary: no such blob, or not a digest at all.
            ArtifactCorrupt: the file is larger than any blob may be.
        """
        if not _DIGEST.fullmatch(digest):
            raise NotInLibrary(
                f"{digest!r} is not a digest; a blob is named by 64 lower-case hexadecimal digits"
            )
        path = self._path(digest)
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise NotInLibrary(
                f"no blob {digest} below {self.root}; ask for a digest that a kernel's record names"
            ) from None
        self._check_size(size, f"blob {digest}")
        return path

    def digests(self) -> set[str]:
        """All blobs that are there."""
        return {p.name for p in self.root.glob("[0-9a-f][0-9a-f]/*") if _DIGEST.fullmatch(p.name)}

    def writing(self) -> int:
        """How many writes are under way now, in all processes of this machine."""
        return sum(1 for _ in self._temporary.iterdir())

    def sweep(self) -> int:
        """Remove what dead writers left half-written; returns how many files that were."""
        removed = 0
        for leftover in self._temporary.iterdir():
            if abandoned(leftover):
                leftover.unlink(missing_ok=True)
                removed += 1
        return removed

    def _path(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def _check_size(self, size: int, what: str) -> None:
        if size > self.max_bytes:
            raise ArtifactCorrupt(
                f"{what} has {size} bytes, a blob has at most {self.max_bytes}; it is not an "
                "artifact of esper"
            )

    def _intact(self, path: Path, digest: str) -> bool:
        """Whether the stored file still has its digest: a disk's rot is healed by storing again."""
        self._check_size(path.stat().st_size, f"blob {digest}")
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
