"""Files that are either the old or the new one, whole, whenever the power goes."""

from __future__ import annotations

import errno
import os
import tempfile
from typing import TYPE_CHECKING

from ..errors import StoreFull, StoreReadOnly
from .files import private_folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replace `path` by `parts`, readable by its owner alone, on the disk when this returns.

    Raises StoreFull, StoreReadOnly; then the old file stands.
    """
    private_folder(path.parent)
    draft = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            draft = file.name
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        draft = None
        sync_folder(path.parent)
    except OSError as error:
        kind = StoreFull if error.errno == errno.ENOSPC else StoreReadOnly
        raise kind(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if draft is not None:
            os.unlink(draft)


def sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
