"""A region in Prometheus' text format: a collector for prometheus_client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from shmsock.observe.rates import Node, View

__all__ = ["RegionCollector"]

STATES = ("free", "left", "attaching", "live", "silent", "dead", "leaving")
COUNTERS = {
    "bytes_in": ("received_bytes", "Bytes that the node has taken out of rings."),
    "bytes_out": ("sent_bytes", "Bytes that the node has put into rings."),
    "reads": ("reads", "Reads that found something."),
    "writes": ("writes", "Writes."),
    "spin_hits": ("spin_hits", "Busy-polls that paid."),
    "spin_misses": ("spin_misses", "Busy-polls in vain."),
    "sleeps": ("sleeps", "Times that the node's loop fell asleep."),
    "kicks": ("kicks", "Peers that the node has woken, by a doorbell or a futex."),
    "received": ("wakeups", "Times that a peer woke the node, by a doorbell or a futex."),
    "spurious": ("spurious_wakeups", "Of these, for nothing."),
    "healed": ("lost_wakeups", "Notifications that were lost, and found by the safety poll."),
    "pumps": ("passes", "Passes over what peers said."),
}
"""Counters of a node: names and help of its metrics."""


class RegionCollector:
    """Asks `look` for what is there, at each scrape, and makes metrics of it. Where that raises OSError, the
    region being gone, shmsock_up is 0, and there is nothing else."""

    def __init__(self, url: str, look: Callable[[], View]) -> None:
        self._url, self._look = url, look

    def collect(self) -> Iterator[Any]:
        up = GaugeMetricFamily("shmsock_up", "Could the region be looked at?", labels=["region"])
        try:
            view = self._look()
        except OSError:
            up.add_metric([self._url], 0)
            yield up
            return
        up.add_metric([self._url], 1)
        yield up
        yield from self._of_region(view)
        yield from self._of_nodes(view.nodes)
        yield from self._of_connections(view)

    def _of_region(self, view: View) -> Iterator[Any]:
        content, url = view.content, self._url
        info = InfoMetricFamily("shmsock_region", "The region.", labels=["region"])
        info.add_metric([url], {"id": content.region_id or "", "format": str(content.version)})
        yield info
        yield _gauge("shmsock_region_bytes", "Its size.", ["region"], [([url], content.bytes or 0)])
        text = "Whether the file at the region's path is another one by now, or none."
        yield _gauge("shmsock_region_displaced", text, ["region"], [([url], bool(view.displaced))])
        count = Counter(section.state for section in content.sections)
        rows = [([url, state], count[state]) for state in STATES]
        yield _gauge("shmsock_sections", "Sections, by the state of their owner.", ["region", "state"], rows)

    def _of_nodes(self, nodes: list[Node]) -> Iterator[Any]:
        names = ["region", "section", "name"]

        def labels(node: Node) -> list[str]:
            return [self._url, str(node.section.number), node.section.name or ""]

        def gauge(name: str, text: str, of: Callable[[Node], float]) -> Any:
            return _gauge(f"shmsock_node_{name}", text, names, [(labels(n), of(n)) for n in nodes])

        info = InfoMetricFamily("shmsock_node", "The owner of a section.", labels=names)
        for node in nodes:
            known = {
                "state": node.section.state,
                "pid": str(node.section.pid or ""),
                "boot": node.section.boot or "",
                "version": node.section.release or "",
            }
            info.add_metric(labels(node), known)
        yield info
        yield gauge("live", "Is its beat seen to move?", lambda n: n.section.state == "live")
        yield gauge("asleep", "Does its loop sleep?", lambda n: n.asleep)
        yield gauge("listeners", "Ports that it listens on.", lambda n: len(n.section.ports))
        yield gauge("ring_bytes", "Ring memory that its connections use.", lambda n: n.ring_bytes)
        yield gauge("unread_bytes", "Bytes for it that it has not read.", lambda n: n.queued_in)
        yield gauge("unsent_bytes", "Bytes that its peers have not read.", lambda n: n.queued_out)
        for counter, (name, text) in COUNTERS.items():
            family = CounterMetricFamily(f"shmsock_node_{name}", text, labels=names)
            for node in nodes:
                if counter in node.counts:
                    family.add_metric(labels(node), node.counts[counter])
            yield family

    def _of_connections(self, view: View) -> Iterator[Any]:
        names = ["region", "name", "peer", "state"]
        streams = Counter(
            (c.local.name or "", c.remote.name or "", c.state) for c in view.connections if not c.datagrams
        )
        links = Counter(
            (c.local.name or "", c.remote.name or "", c.state) for c in view.connections if c.datagrams
        )
        queued: Counter[tuple[str, str]] = Counter()
        for c in view.connections:
            near, far = c.local.name or "", c.remote.name or ""
            queued[near, far] += c.sent.queued or 0
            queued[far, near] += c.received.queued or 0
        text = "Connections, by who opened them and to whom."
        yield _gauge("shmsock_connections", text, names, [([self._url, *k], n) for k, n in streams.items()])
        text = "Links that carry datagrams, by who sends and to whom."
        yield _gauge("shmsock_datagram_links", text, names, [([self._url, *k], n) for k, n in links.items()])
        text = "Bytes that wait in rings, by who wrote them and for whom."
        rows = [([self._url, *k], n) for k, n in queued.items()]
        yield _gauge("shmsock_queued_bytes", text, ["region", "name", "peer"], rows)


def _gauge(name: str, text: str, names: list[str], rows: Iterable[tuple[list[str], float]]) -> Any:
    family = GaugeMetricFamily(name, text, labels=names)
    for labels, value in rows:
        family.add_metric(labels, value)
    return family
