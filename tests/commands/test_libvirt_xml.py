"""`shmsock libvirt-xml`: what it prints is what libvirt's own schema allows, at the place that it names."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from tests.commands.test_cli import good, shmsock

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
DOMAIN = """
<domain type="kvm">
  <name>vm-a</name>
  <memory unit="GiB">2</memory>
  <vcpu>2</vcpu>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <devices/>
</domain>
"""


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(prefix="shmsock-test-", dir="/dev/shm") as file:
        yield Path(file.name)


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed (Debian's package libvirt-common; libvirt0 in 12)")
    return etree.RelaxNG(etree.parse(str(SCHEMA)))


def domain(printed: str) -> etree._Element:
    """A domain with the printed elements, each where it is said to belong."""
    made = etree.fromstring(DOMAIN)
    parts = re.split(r"<!-- in <(\w+)> -->\n", printed)
    assert parts[0] == ""
    for place, text in zip(parts[1::2], parts[2::2], strict=True):
        (made if place == made.tag else made.find(place)).append(etree.fromstring(text))
    return made


def test_plain(path: Path, schema: etree.RelaxNG) -> None:
    good("create", path, "--size", "16M", "--force")
    made = domain(good("libvirt-xml", path))
    schema.assertValid(made)
    shmem = made.find("devices/shmem")
    # libvirt looks for the name in /dev/shm, and nowhere else
    assert (shmem.get("name"), shmem.find("model").get("type")) == (path.name, "ivshmem-plain")
    assert (shmem.find("size").get("unit"), shmem.find("size").text) == ("KiB", "16384")


def test_plain_elsewhere(tmp_path: Path, schema: etree.RelaxNG) -> None:
    path = tmp_path / "region"
    good("create", path, "--size", "16M")
    done = shmsock("libvirt-xml", path)
    made = domain(done.stdout)
    schema.assertValid(made)
    passed = [argument.get("value") for argument in made.iterfind(".//{*}arg")]
    assert " ".join(passed) == " ".join(good("qemu-args", path).split())
    assert f'allow it in /etc/apparmor.d/abstractions/libvirt-qemu (or local/): `"{path}" rw,`' in done.stderr


def test_doorbell(schema: etree.RelaxNG) -> None:
    made = domain(good("libvirt-xml", "--doorbell", "/run/ivshmem.sock", "--vectors", 2))
    schema.assertValid(made)
    assert made.find("devices/shmem/server").get("path") == "/run/ivshmem.sock"
    assert made.find("devices/shmem/msi").get("vectors") == "2"
    assert made.find("devices/iommu/driver").get("intremap") == "on"


@pytest.mark.parametrize("model", ["nvdimm", "virtio-pmem"])
def test_dax(path: Path, schema: etree.RelaxNG, model: str) -> None:
    good("create", path, "--size", "16M", "--dax", "--force")
    done = shmsock("libvirt-xml", path, "--dax", model, "--cpus", 2, "--max-memory", "8G")
    made = domain(done.stdout)
    schema.assertValid(made)
    memory = made.find("devices/memory")
    assert (memory.get("model"), memory.get("access")) == (model, "shared")
    assert (memory.findtext("source/path"), memory.findtext("target/size")) == (str(path), "16384")
    assert made.findtext("maxMemory") == str(8 << 20)
    assert made.find("cpu/numa/cell").attrib == {"id": "0", "cpus": "0-1", "memory": "2097152", "unit": "KiB"}
    assert "libvirt gives the file to that user and group while a domain runs" in done.stderr


def test_the_schema_refuses_nonsense(schema: etree.RelaxNG) -> None:
    """So that the tests above can fail."""
    made = domain(good("libvirt-xml", "--doorbell", "/run/ivshmem.sock"))
    made.find("devices/shmem/model").set("type", "ivshmem-nothing")
    assert not schema.validate(made)
