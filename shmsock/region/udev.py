"""Rules for udev that let a group use a guest's devices: errors print them, `install-units` writes them."""

from __future__ import annotations

from shmsock.region.info_block import OURS

__all__ = ["DAX_FILE", "GROUP", "PCI_FILE", "VFIO_FILE", "dax_rule", "pci_rule", "vfio_rule"]

GROUP = "shmsock"
PCI_FILE = "/etc/udev/rules.d/70-shmsock.rules"
DAX_FILE = "/etc/udev/rules.d/70-shmsock-dax.rules"
VFIO_FILE = "/etc/udev/rules.d/70-shmsock-vfio.rules"


def pci_rule(group: str = GROUP) -> str:
    """A rule that lets `group` use every ivshmem device.

    It enables the device too: that takes CAP_SYS_ADMIN, whatever the mode of the file `enable` says.
    """
    files = "%S%p/resource2 %S%p/resource2_wc"
    return (
        'ACTION!="remove", SUBSYSTEM=="pci", ATTR{vendor}=="0x1af4", ATTR{device}=="0x1110", '
        f'ATTR{{enable}}="1", RUN+="/bin/chgrp {group} {files}", RUN+="/bin/chmod 0660 {files}"'
    )


def vfio_rule(group: str = GROUP) -> str:
    """A rule that lets `group` use what vfio-pci has: each IOMMU group that root gave to it."""
    return f'SUBSYSTEM=="vfio", GROUP="{group}", MODE="0660"'


def dax_rule(group: str = GROUP) -> str:
    """A rule that lets `group` use the persistent memory that `shmsock create --dax` made, and no other."""
    first, second, third = OURS[:4].hex(), OURS[4:6].hex(), OURS[6:].hex()
    uuid = f"{first}-{second}-{third}-*"
    return f'SUBSYSTEM=="dax", ATTRS{{uuid}}=="{uuid}", GROUP="{group}", MODE="0660"'
