"""Things prepared once per machine, shared by every test run: unpacked binaries, jars.

Law: a cached folder is complete or absent, however many runs ask for it at once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/milvus-cdc`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "milvus-cdc"


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name`, filled by `fill` if it is not there yet.

    The rename makes it appear complete or not at all; the lock only spares a second run the work.
    """
    root = cache_root()
    final = root / name
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():
            return final
        temporary = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
        try:
            fill(temporary)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return final
