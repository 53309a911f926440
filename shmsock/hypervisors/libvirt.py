"""XML of libvirt that gives a region to a domain: elements, and where each belongs."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import NamedTuple

from shmsock.hypervisors import qemu

__all__ = ["Part", "dax", "doorbell", "plain"]

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
ET.register_namespace("qemu", _QEMU)

SHM = "/dev/shm"
"""The only directory that libvirt looks into for ivshmem-plain."""


class Part(NamedTuple):
    """An element, and the path of the one that it belongs into."""

    place: str
    element: ET.Element

    def __str__(self) -> str:
        ET.indent(self.element)
        return f"<!-- in <{self.place}> -->\n{ET.tostring(self.element, encoding='unicode')}"


def plain(path: str, size: int) -> Iterator[Part]:
    """The file `path` as ivshmem-plain; from elsewhere than /dev/shm by arguments that libvirt passes on."""
    directory, name = os.path.split(path)
    if directory != SHM:
        line = ET.Element(f"{{{_QEMU}}}commandline")
        for argument in qemu.plain(path, size):
            ET.SubElement(line, f"{{{_QEMU}}}arg", value=argument)
        yield Part("domain", line)
        return
    shmem = ET.Element("shmem", name=name)
    ET.SubElement(shmem, "model", type="ivshmem-plain")
    ET.SubElement(shmem, "size", unit="KiB").text = str(size >> 10)
    yield Part("devices", shmem)


def doorbell(socket: str, vectors: int = 1) -> Iterator[Part]:
    """An ivshmem-doorbell device of the server at `socket`, and the IOMMU that vfio in the guest wants."""
    features = ET.Element("features")
    ET.SubElement(features, "ioapic", driver="qemu")
    yield Part("domain", features)
    iommu = ET.Element("iommu", model="intel")
    ET.SubElement(iommu, "driver", intremap="on")
    yield Part("devices", iommu)
    shmem = ET.Element("shmem", name=qemu.ID)
    ET.SubElement(shmem, "model", type="ivshmem-doorbell")
    ET.SubElement(shmem, "server", path=socket)
    ET.SubElement(shmem, "msi", vectors=str(vectors))
    yield Part("devices", shmem)


def dax(
    path: str, size: int, model: str, *, max_memory: int = qemu.MAX_MEMORY, memory: int, cpus: int
) -> Iterator[Part]:
    """The file `path` as persistent memory, for a domain of that `memory` and `cpus`. `model`: nvdimm or
    virtio-pmem. Raises ValueError for a bad `size`."""
    qemu.DAX[model](path, size)
    most = ET.Element("maxMemory", slots="8", unit="KiB")
    most.text = str(max_memory >> 10)
    yield Part("domain", most)
    cpu = ET.Element("cpu")
    known = {"id": "0", "cpus": f"0-{cpus - 1}" if cpus > 1 else "0"}
    numa = ET.SubElement(cpu, "numa")
    ET.SubElement(numa, "cell", known, memory=str(memory >> 10), unit="KiB")
    yield Part("domain", cpu)
    device = ET.Element("memory", model=model, access="shared")
    ET.SubElement(ET.SubElement(device, "source"), "path").text = path
    target = ET.SubElement(device, "target")
    ET.SubElement(target, "size", unit="KiB").text = str(size >> 10)
    if model == "nvdimm":
        ET.SubElement(target, "node").text = "0"
    yield Part("devices", device)
