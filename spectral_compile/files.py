"""Files that are read whole, and written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spectral_compile.errors import Mistake


def cache_folder() -> Path:
    """Where what was made or fetched once is kept: ``$SPECTRAL_CACHE`` or ``~/.cache/spectral-compile``."""
    return Path(os.environ.get("SPECTRAL_CACHE") or Path.home() / ".cache" / "spectral-compile")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ``Mistake`` where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is no text in UTF-8: its byte {error.start} is none") from None


def read_texts(paths: Iterable[Path]) -> dict[str, str]:
    """The same of several files, by name, or by path where there was such a name."""
    found: dict[str, str] = {}
    for path in paths:
        found[str(path) if path.name in found else path.name] = read_text(path)
    return found


def check_writable(path: Path | None) -> Path | None:
    """``path``, if ``write_whole`` can write to it now; else a ``Mistake``."""
    if path is None:
        return None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not _is_special(path):
            scratch = _beside(path)
            scratch.touch()
            scratch.unlink()
    except OSError as error:
        raise Mistake(f"cannot write to {path}: {error.strerror}") from None
    return path


def make_folder(path: Path) -> None:
    """Make a folder where there is none; ``Mistake`` where that cannot be done, or no file can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        scratch = path / f".{os.getpid()}"
        scratch.touch()
        scratch.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise Mistake(f"cannot write to the folder {path}: {getattr(error, 'strerror', None) or error}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never there in part: what was there stays until all of ``content`` is on disk.

    ``Mistake`` where that cannot be done.
    """
    with replacing(path) as scratch:
        scratch.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what is to be at ``path`` once all of it is on disk; ``Mistake`` where that cannot be done.

    What was there stays if anything fails. A device or a pipe is written to itself.
    """
    scratch = path if _is_special(path) else _beside(path)
    try:
        yield scratch
        if scratch != path:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())  # else a machine that stops may have the name and not the content
            os.replace(scratch, path.resolve())
    except OSError as error:
        raise Mistake(f"cannot write to {path}: {error.strerror}") from None
    finally:
        if scratch != path:
            scratch.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """Whether this is a device or a pipe, which is written to and must not be replaced by a file."""
    return path.exists() and not path.is_file()


def _beside(path: Path) -> Path:
    """A file in the folder of ``path``, or of what it links to, that no other process writes to."""
    whole = path.resolve()
    return whole.with_name(f".{whole.name}.{os.getpid()}")
