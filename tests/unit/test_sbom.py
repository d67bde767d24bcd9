"""`make sbom` names what is installed with milvus-cdc, in the pinned versions, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bom(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("sbom") / "made" / "sbom.cdx.json"
    subprocess.run(
        [sys.executable, "-W", "error", ROOT / "deploy" / "sbom.py", file], check=True, timeout=100
    )
    made: dict[str, Any] = json.loads(file.read_text())
    return made


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_it_names_all_that_is_installed_as_it_is_pinned(bom: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pinned.items()}
    named = {each["name"]: each["version"] for each in bom["components"]}
    assert names(project["dependencies"]) <= set(named)
    assert named == {name: pins.get(name) for name in named}, "in another version, or not pinned"
    # What those need in turn is there, what only tests need is not.
    assert {"pandas", "cffi", "psycopg-binary", "httpcore"} <= set(named)
    tools = names(project["optional-dependencies"]["dev"]) - names(project["dependencies"])
    assert not tools & set(named)


def test_it_says_which_needs_which(bom: dict[str, Any]) -> None:
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    root = bom["metadata"]["component"]
    needs = {each["ref"]: set(each.get("dependsOn", ())) for each in bom["dependencies"]}
    refs = {each["name"]: each["bom-ref"] for each in bom["components"]}
    assert set(needs) == {root["bom-ref"], *refs.values()}
    assert refs["grpcio"] in needs[root["bom-ref"]]
    assert refs["cffi"] in needs[refs["cryptography"]]
    assert all(each["purl"].startswith("pkg:pypi/") for each in bom["components"])
    reached, todo = set(), [root["bom-ref"]]
    while todo:
        one = todo.pop()
        if one not in reached:
            reached.add(one)
            todo += needs[one]
    assert reached == set(needs), "nothing is there without a reason"
