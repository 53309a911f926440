"""The site: it is built without a warning, its reference has every public name, and it needs no other host.

`python -m tests.test_site` (`make docs`) builds it into build/site.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
from lxml import html

from shmsock.cli import cli
from shmsock.doctor.finding import Finding
from shmsock.doctor.round_trips import Answers
from shmsock.install.manual import walk
from shmsock.observe.connections import Connection, End, Way
from shmsock.observe.metrics import COUNTERS
from shmsock.observe.rates import Node
from shmsock.observe.snapshot import Content, Section

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    "shmsock",
    "shmsock.anyio",
    "shmsock.integrations.aiohttp",
    "shmsock.integrations.dask",
    "shmsock.integrations.httpx",
    "shmsock.testing",
]


def build(target: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-n"]
    argv += ["-c", str(ROOT / "docs/site"), "-d", str(target.parent / "doctrees"), str(source), str(target)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Path = tmp_path_factory.mktemp("docs") / "site"
    done = build(target)
    assert (done.returncode, done.stderr) == (0, "")
    return target


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, name: name)
    return {name for names in inventory.values() for name in names}


def own(kind: type) -> set[str]:
    """The public names that a class of shmsock's has or inherits from another one of them."""
    return {
        name
        for base in kind.__mro__
        if base.__module__.startswith("shmsock.")
        for name, value in vars(base).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    }


#: Of these other rooms use more than users need, or it is another package's contract.
PARTLY = {"Node": {"aclose", "close", "closed", "statistics"}, "Shm": set(), "ShmBackend": set()}
PARTLY |= {"TcpShmBackend": set(), "ShmConnectable": {"connect"}}


def named(module: str) -> Iterator[tuple[str, object]]:
    """The public names of a module, and those of its classes."""
    found = importlib.import_module(module)
    assert found.__all__
    for name in found.__all__:
        there = getattr(found, name)
        yield f"{module}.{name}", there
        if inspect.isclass(there):
            for member in PARTLY.get(name, own(there) - {"extra_attributes"}):
                yield f"{module}.{name}.{member}", getattr(there, member)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str, documented: set[str]) -> None:
    assert {name for name, _ in named(module)} - documented == set()


@pytest.mark.slow
def test_every_command_and_option_is_in_the_reference(documented: set[str]) -> None:
    wanted = set()
    for command, context in walk(cli):
        path = context.command_path.replace(" ", "-")
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                wanted |= {f"{path}.{option}" for option in param.opts}
    assert len(wanted) > 100
    assert wanted - documented == set()


@pytest.mark.slow
def test_what_programs_read_is_in_the_reference(site: Path, documented: set[str]) -> None:
    """The fields of `--json`, whose objects these are, and the names of metrics."""
    of_node = {"asleep", "connections", "links", "ring_bytes", "queued_in", "queued_out", "counts", "rates"}
    wanted = {f"{Node.__module__}.Node.{name}" for name in of_node}
    assert of_node | {"section"} == {field.name for field in dataclasses.fields(Node)}
    for kind in (Content, Section, Connection, End, Way, Answers, Finding):
        wanted |= {f"{kind.__module__}.{kind.__name__}.{field.name}" for field in dataclasses.fields(kind)}
    assert wanted - documented == set()
    told = (site / "docs/site/reference/metrics.html").read_text(encoding="utf-8")
    assert [name for name, _ in COUNTERS.values() if f"shmsock_node_{name}_total" not in told] == []
    assert "shmsock_queued_bytes" in told


def attributes(page: Path, *names: str) -> list[str]:
    tree = html.parse(str(page))
    return [str(value) for name in names for value in tree.xpath(name)]


@pytest.mark.slow
def test_nothing_comes_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    loaded = [
        (page.name, url)
        for page in pages
        for url in attributes(page, "//@src", "//link/@href", "//@srcset", "//form/@action")
        if urlsplit(url).netloc
    ]
    assert loaded == []
    styles = "\n".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    assert styles
    assert "url(http" not in styles
    assert "url(//" not in styles
    assert "@import" not in styles


#: Where links lead out of it. Nobody fetches them here: look at a new one before it is written down.
VERSIONS = tuple(f"https://github.com/shmsock/shmsock/{what}/" for what in ("compare", "releases/tag"))
"""What the changelog links each version to."""
OUTSIDE = {
    "https://cwiki.apache.org/confluence/display/KAFKA/KIP-35+-+Retrieving+protocol+version",
    "https://docs.kernel.org/filesystems/ext4/globals.html",
    "https://docs.oasis-open.org/virtio/virtio/v1.2/virtio-v1.2.html",
    "https://github.com/delta-io/delta/blob/master/PROTOCOL.md",
    "https://github.com/pradyunsg/furo",
    "https://keepachangelog.com/en/1.1.0/",
    "https://semver.org/spec/v2.0.0.html",
}


@pytest.mark.slow
def test_links_to_other_sites_are_known(site: Path) -> None:
    links = {link for page in site.rglob("*.html") for link in attributes(page, "//a/@href")}
    outside = {link for link in links if urlsplit(link).scheme or urlsplit(link).netloc}
    assert {link for link in outside if not link.startswith(VERSIONS)} == OUTSIDE


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    anchors = {page: set(attributes(page, "//@id")) for page in site.rglob("*.html")}
    broken = []
    for page in anchors:
        for link in attributes(page, "//a/@href", "//@src", "//link/@href"):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            there = (page.parent / unquote(url.path)).resolve() if url.path else page
            known = anchors.get(there)
            if not there.exists() or (url.fragment and known and unquote(url.fragment) not in known):
                broken.append(f"{page.name}: {link}")
    assert broken == []


@pytest.mark.slow
def test_a_broken_reference_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# x\n\n[a](none.md)\n[b](#none)\n")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert "none.md" in done.stderr
    assert "'none'" in done.stderr


# -- what docstrings say: CONTRIBUTING.md --------------------------------------------------------------------


def unsaid(name: str, there: object) -> list[str]:
    """What is missing in the docstring of something public."""
    text = there.__doc__ or ""
    wrong = [] if text else ["what it is"]
    if inspect.iscoroutinefunction(there) and "ancel" not in text:
        wrong.append("what cancelling does")
    if inspect.isfunction(there) and "." not in there.__qualname__ and "Raises" not in text:
        wrong.append("what it raises")
    return [f"{name}: {what}" for what in wrong]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_say_what_users_need(module: str) -> None:
    wrong = []
    for name, there in named(module):
        wrong += unsaid(name, there)
    assert wrong == []


async def speechless() -> None:
    """Wait."""


def test_what_is_unsaid_is_found() -> None:
    assert unsaid("x", speechless) == ["x: what cancelling does", "x: what it raises"]


if __name__ == "__main__":
    done = build(ROOT / "build" / "site")
    sys.stderr.write(done.stderr)
    print("the site is in build/site/index.html" if done.returncode == 0 else "the site was not built")
    sys.exit(done.returncode)
