"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from edgecompile.errors import InputError


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``chunks`` to a temporary file beside ``path``, flush it to disk, then rename it into place.

    Raises:
        InputError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes ``path`` when the block ends; on any error ``path`` stays as it was.

    A folder already at ``path`` is replaced as a whole.

    Raises:
        InputError: the parent folder cannot be written, or ``path`` exists and is not a folder.
    """
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    with _beside(path) as temporary:
        try:
            yield temporary
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise cannot_write(path, error) from None
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(old, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Refuse a path that :func:`new_folder` would refuse; nothing is left of the attempt.

    Raises:
        InputError: as :func:`new_folder` before its block.
    """
    with _beside(path):
        pass


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """An empty temporary folder; it goes when the block ends, with parents made for it if ``path`` is not there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write {path}", "a file of that name exists", "choose another output folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    made = [p for p in path.parents if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            with contextlib.suppress(OSError):
                for parent in made:
                    parent.rmdir()


def cannot_write(path: Path, error: OSError) -> InputError:
    """The error for a file or folder that the system refuses to write."""
    return InputError(f"cannot write {path}", error.strerror or str(error), "check the folder and free space")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
