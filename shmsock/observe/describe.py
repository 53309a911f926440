"""How a region is mapped, and what a device is, as data for people and programs."""

from __future__ import annotations

from typing import Any

from shmsock.observe.snapshot import old_files
from shmsock.region.base import Region
from shmsock.region.file import FileRegion
from shmsock.region.pci import PciDevice

__all__ = ["describe_device", "describe_region"]


def describe_region(region: Region) -> dict[str, Any]:
    """Describe how it is mapped."""
    known, bell = region.describe(), region.doorbell
    origin = region.origin if isinstance(region, FileRegion) else 0
    return {
        "url": region.url,
        "kind": region.kind,
        "path": region.path,
        "size": region.size,
        "dax": origin > 0,
        "file_size": origin + region.size if region.kind == "file" else None,
        "write_combining": region.write_combining,
        "file_system": known.filesystem,
        "page_size": known.page_size,
        "allocated": known.allocated,
        "mode": f"{known.mode:04o}",
        "uid": known.uid,
        "gid": known.gid,
        "section_locks": region.can_lock,
        "old_files": old_files(region.path) if region.kind == "file" else [],
        "doorbell": None if bell is None else {"id": bell.id, "vectors": bell.vectors, "lost": bell.lost},
    }


def describe_device(device: PciDevice) -> dict[str, Any]:
    """Describe a device as lspci does."""
    return {
        "address": device.address,
        "ids": "{:04x}:{:04x}".format(*device.ids),
        "subsystem": "{:04x}:{:04x}".format(*device.subsystem),
        "class": f"{device.class_code:06x}",
        "revision": device.revision,
        "model": device.model,
        "doorbell": device.doorbell,
        "driver": device.driver,
        "enabled": device.enabled > 0,
        "decoding": device.decoding,
        "numa_node": None if device.numa_node < 0 else device.numa_node,
        "mappable": list(device.mappable),
        "bars": [
            {
                "index": bar.index,
                "address": f"{bar.address:#x}" if bar.assigned else None,
                "size": bar.size,
                "wide": bar.wide,
                "prefetchable": bar.prefetchable,
                "text": str(bar),
            }
            for bar in device.bars[:3]
        ],
    }
