"""Says what a wheel is made of (CycloneDX, in .dist-info/sboms as PEP 770 has it)."""

from __future__ import annotations

import datetime
import email
import hashlib
import importlib.metadata
import uuid
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement

__all__ = ["NAME", "problem", "sbom"]

NAME = "shmsock.cdx.json"


def sbom(unpacked: Path, cffi: str, epoch: int) -> str:
    """The list for the wheel that was unpacked there. `cffi`: the version that wrote the wrapper in C."""
    (metadata_file,) = unpacked.glob("*.dist-info/METADATA")
    about = email.message_from_string(metadata_file.read_text(encoding="utf-8"))
    (core,) = unpacked.glob("shmsock/native/_core.*.so")
    digest = hashlib.sha256(core.read_bytes()).hexdigest()
    root = _package(about["Name"], about["Version"], "MIT", kind=ComponentType.LIBRARY)
    root.description = about["Summary"]
    bom = Bom(
        metadata=BomMetaData(
            component=root, timestamp=datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc)
        ),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{about['Name']}-{about['Version']}-{digest}"),
        components=[],
    )
    compiled = Component(
        name=str(core.relative_to(unpacked)),
        type=ComponentType.FILE,
        bom_ref="core",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
    )
    # Within the compiled file: what cffi wrote, and the few functions of the compiler's own library.
    within = [
        _package("cffi", cffi, "MIT-0", suffix="-wrapper"),
        _package("ziglang", importlib.metadata.version("ziglang"), "MIT", suffix="-compiler-rt"),
    ]
    needed = [
        _package(wanted.name, None, None, found=str(wanted))
        for wanted in map(Requirement, about.get_all("Requires-Dist", []))
        if "extra" not in str(wanted.marker)
    ]
    bom.components.update([compiled, *within, *needed])
    bom.register_dependency(root, [compiled, *needed])
    bom.register_dependency(compiled, within)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _package(
    name: str,
    version: str | None,
    license: str | None,
    suffix: str = "",
    found: str = "",
    kind: ComponentType = ComponentType.LIBRARY,
) -> Component:
    return Component(
        name=name,
        type=kind,
        version=version,
        bom_ref=name + suffix,
        purl=PackageURL("pypi", name=name, version=version),
        licenses=[LicenseExpression(license)] if license else None,
        scope=ComponentScope.REQUIRED,
        properties=[Property(name="python:requirement", value=found)] if found else None,
    )


def problem(text: str) -> str:
    """What is wrong with such a list; empty: nothing."""
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return "" if found is None else str(found)
