"""A folder of artefacts that only its owner can write, safe to share between processes and to interrupt.

Files are written under another name and renamed, so that a reader sees all of one or nothing; a checksum behind
the content tells a damaged one. A file is never updated, only found or made.
"""

import functools
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmcomp.errors import CacheError

SEAL = b"llmcomp:"


@dataclass(frozen=True)
class Cache:
    """A folder of build artefacts that only its owner can write.

    Where it cannot be written (read-only, full), a folder of the user's in the system's temporary place
    takes its role, with a warning; what `root` holds already is used in any case.
    """

    root: Path

    def find(self, filename: str, intact: Callable[[bytes], bool]) -> Path | None:
        """The path of an artefact, or None where there is none or a damaged one. Raises CacheError."""
        folders = [self.root] if check_folder(self.root) else []
        for folder in [*folders, *_safe(overflow_folder())]:
            path = folder / filename
            if path.is_file() and intact(path.read_bytes()):
                return path
        return None

    def write(self, filename: str, data: bytes) -> Path:
        """Write an artefact: a reader sees all of it or nothing. Raises CacheError if no folder takes it."""
        try:
            return _write(self.root, filename, data)
        except OSError as error:
            reason = error.strerror
        overflow = overflow_folder()
        _warn_once(
            f"llmcomp cannot write to {self.root} ({reason}): generated kernels go to {overflow}. "
            "Set LLMCOMP_CACHE to a folder that you can write."
        )
        try:
            return _write(overflow, filename, data)
        except OSError as error:
            raise CacheError(
                f"expected a folder for generated kernels, but neither {self.root} ({reason}) nor {overflow} "
                f"({error.strerror}) can be written. Set LLMCOMP_CACHE to a folder with free space."
            ) from error


@functools.cache
def _warn_once(text: str) -> None:
    """Every file of a cache would say the same."""
    warnings.warn(text, RuntimeWarning, stacklevel=3)


def overflow_folder() -> Path:
    """The folder in the system's temporary place that is used where the cache cannot be written."""
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError:  # no place can be written
        temporary = "/tmp"
    return Path(temporary) / f"llmcomp-{os.getuid()}"


def _safe(folder: Path) -> list[Path]:
    """The overflow folder, if it is there to be used; somebody else may have taken its name to stop us."""
    try:
        return [folder] if check_folder(folder) else []
    except CacheError:
        return []


def check_folder(folder: Path) -> bool:
    """Whether `folder` exists. Raises CacheError unless it is a folder that only its owner, us, can write."""
    try:
        found = folder.stat()
    except (FileNotFoundError, PermissionError):
        return False
    except NotADirectoryError:
        found = folder.parent.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"expected a folder for generated kernels, found a file: {folder}. Set LLMCOMP_CACHE.")
    if found.st_uid not in (os.getuid(), 0):
        raise CacheError(
            "expected a folder for generated kernels that belongs to you, "
            f"found one of user {found.st_uid}: {folder}. "
            "Code in it would run as you. Set LLMCOMP_CACHE to a folder of your own."
        )
    if found.st_mode & 0o022:
        raise CacheError(
            "expected a folder for generated kernels that only you can write, "
            f"found mode {found.st_mode & 0o777:o}: {folder}. Run: chmod go-w {folder}"
        )
    return True


def _write(folder: Path, filename: str, data: bytes) -> Path:
    if not check_folder(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=f".{filename}")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, folder / filename)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return folder / filename


def seal(data: bytes) -> bytes:
    """`data` with its checksum behind it; the loader of shared libraries does not read so far."""
    return data + SEAL + hashlib.sha256(data).digest()


def sealed(data: bytes) -> bool:
    """Whether `data` is what `seal` returned, undamaged."""
    body, digest = data[: -len(SEAL) - 32], data[-32:]
    return data[len(body) : -32] == SEAL and hashlib.sha256(body).digest() == digest


def unsealed(data: bytes) -> bytes:
    """What `seal` was given."""
    return data[: -len(SEAL) - 32]
