"""Our own services as a release of another version: what an upgrade brings.

Laws: it is the code of this checkout, in a folder of its own; only what is named differs: the
version in the package's metadata, and the newest protocol that both services speak. What runs
from there takes nothing of ours from elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "clients/milvus_cdc",
    "clients/milvuscdc",
    "clients/buf",
    "controller/milvus_cdc_controller",
    "replicator/milvus_cdc_replicator",
)
SPEAKERS = ("milvus_cdc_controller/wire.py", "milvus_cdc_replicator/session.py")
_PROTOCOL_MAX = re.compile(r"^PROTOCOL_MAX = \d+$", re.MULTILINE)


class Release:
    """`env` makes a process of ours run it."""

    def __init__(self, folder: Path, version: str, *, protocol_max: int) -> None:
        self.version = version
        self.folder = folder
        for package in PACKAGES:
            shutil.copytree(
                ROOT / package,
                folder / Path(package).name,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        for speaker in SPEAKERS:
            path = folder / speaker
            text, changed = _PROTOCOL_MAX.subn(f"PROTOCOL_MAX = {protocol_max}", path.read_text())
            assert changed == 1, f"{speaker}: no PROTOCOL_MAX"
            path.write_text(text)
        metadata = folder / f"milvus_cdc-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: milvus-cdc\nVersion: {version}\n"
        )
        entry_points = distribution("milvus-cdc").read_text("entry_points.txt")
        (metadata / "entry_points.txt").write_text(entry_points or "")

    @property
    def env(self) -> Mapping[str, str]:
        # Before everything that is installed: its modules and its metadata are found first.
        return {"PYTHONPATH": os.pathsep.join((str(self.folder), os.environ.get("PYTHONPATH", "")))}
