"""Servers that come in wheels beside the project's own: a version of Milvus that cannot be
installed next to another one, and both generations of milvus-lite.

Laws: every version is pinned here; a wheel is fetched once per machine and unpacked into the cache,
never into the environment that runs the tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.servers.cache import cached_folder

MILVUS_2_2 = ("milvus==2.2.16",)
MILVUS_LITE_2 = ("milvus-lite==2.5.1",)
MILVUS_LITE_3 = ("milvus-lite==3.2.2", "faiss-cpu==1.15.1", "pyarrow==26.0.1")


def unpacked_wheels(requirements: tuple[str, ...]) -> Path:
    """A folder with these packages and nothing they depend on. RuntimeError with pip's words."""

    def install(folder: Path) -> None:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--no-deps", "--only-binary", ":all:", "--target", str(folder)),
                *requirements,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"pip could not fetch {requirements}: {done.stderr.strip()}")

    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return cached_folder(f"wheel-{requirements[0].replace('==', '-')}-{python}", install)
