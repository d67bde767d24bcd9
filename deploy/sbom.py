"""`python deploy/sbom.py FILE`: what is installed with milvus-cdc, as a CycloneDX 1.6 document.

Named are the package as pyproject.toml describes it, all it needs at run time in the versions of
this environment, and which needs which. What only tests and builds need is left out.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def needed(lines: Iterable[str], extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Names and extras of what requirements ask for on this machine."""
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def describe() -> Bom:
    """Raises importlib.metadata.PackageNotFoundError where something is not installed."""
    project: dict[str, Any] = tomllib.loads(PROJECT.read_text())["project"]
    root = Component(
        type=ComponentType.APPLICATION,
        name=project["name"],
        version=project["version"],
        bom_ref=f"pkg:pypi/{project['name']}@{project['version']}",
        purl=PackageURL("pypi", name=project["name"], version=project["version"]),
        description=project["description"],
        licenses=[LicenseFactory().make_from_string(project["license"])],
    )
    components: dict[str, Component] = {}
    needs: dict[Component, set[str]] = {root: set()}
    followed: set[tuple[str, frozenset[str]]] = set()
    todo = [(root, *asked) for asked in needed(project["dependencies"], frozenset())]
    while todo:
        by, name, extras = todo.pop()
        needs[by].add(name)
        if (name, extras) in followed:
            continue
        followed.add((name, extras))
        package = distribution(name)
        if name not in components:
            components[name] = _component(name, package)
            needs[components[name]] = set()
        asked = needed(package.requires or (), extras)
        todo += [(components[name], *other) for other in asked]
    bom = Bom(components=components.values())
    bom.metadata.component = root
    for component, names in needs.items():
        bom.register_dependency(component, [components[name] for name in names])
    return bom


def _component(name: str, package: Distribution) -> Component:
    said = package.metadata
    component = Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=package.version,
        bom_ref=f"pkg:pypi/{name}@{package.version}",
        purl=PackageURL("pypi", name=name, version=package.version),
        description=said["Summary"],
    )
    text = said["License-Expression"] or said["License"]
    if text and "\n" not in text:
        component.licenses.add(LicenseFactory().make_from_string(text))
    else:
        for classifier in said.get_all("Classifier") or ():
            if classifier.startswith("License :: OSI Approved :: "):
                component.licenses.add(DisjunctiveLicense(name=classifier.rpartition(" :: ")[2]))
    if said["Home-page"]:
        component.external_references.add(
            ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(said["Home-page"]))
        )
    return component


def main(file: Path) -> None:
    bom = describe()
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if fault is not None:
        raise SystemExit(f"not a valid document: {fault}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
    print(f"{file}: {len(bom.components)} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
