"""`shmsock metrics`: what goes on in a region, for Prometheus."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import click

from shmsock import region as regions
from shmsock.commands.group import Failed
from shmsock.commands.observing import opened, region_argument
from shmsock.observe.rates import LOOK_S, View, Watcher
from shmsock.observe.snapshot import BEAT_S

__all__ = ["metrics"]

PATIENCE_S = 5.0
MOST = 64
"""Connections that have not asked yet: a thread serves each."""
SLOTS = 100_000
"""More than others look at: nobody waits for a screen."""


@click.command()
@region_argument
@click.option(
    "--listen",
    metavar="[HOST]:PORT",
    help="Serve them by HTTP at /metrics, until it is ended; 127.0.0.1 is the host.",
)
def metrics(region: str | None, listen: str | None) -> None:
    """Print metrics for Prometheus, or serve them.

    Changes nothing. Of each peer: bytes, reads, writes, spins, sleeps, wakeups; of each pair of them:
    connections and bytes that wait. A region that comes, goes or is made anew meanwhile is looked at as soon
    as it is there.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest

        from shmsock.observe.metrics import RegionCollector
    except ModuleNotFoundError:
        raise Failed("metrics need prometheus_client: pip install 'shmsock[metrics]'") from None
    registry = CollectorRegistry()
    if listen is None:
        with opened(region) as watcher:
            view = watcher.watch(BEAT_S)
        registry.register(RegionCollector(view.url, lambda: view))
        click.echo(generate_latest(registry).decode(), nl=False)
        return
    host, port = _address(listen)
    exporter = Exporter(region)
    url = region or regions.default_url()
    registry.register(RegionCollector(url, exporter.view))
    _serve(host, port, registry, exporter)


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(f"{listen!r} is not [HOST]:PORT", param_hint="--listen")
    return host.strip("[]") or "127.0.0.1", int(port)


class Exporter:
    """Looks at a region all the time, in a thread of its own, so that counters of 32 bits are never seen to
    have gone round twice; opens it anew when it was lost."""

    def __init__(self, region: str | None) -> None:
        self._region = region
        self._lock = threading.Lock()
        self._watcher: Watcher | None = None
        self._error: OSError = OSError("not looked at yet")
        self.over = threading.Event()
        self.looked = threading.Event()

    def view(self) -> View:
        """Return what is there. Raises OSError when it cannot be seen."""
        with self._lock:
            if self._watcher is None:
                raise self._error
            self._watcher.look()
            return self._watcher.view()

    def run(self) -> None:
        """Look until `over` is set."""
        while not self.over.is_set():
            try:
                with opened(self._region, most=SLOTS) as watcher:
                    self._follow(watcher)
            except OSError as error:
                self._error = error
            except Failed as error:
                self._error = OSError(error.message)
            self.looked.set()
            self.over.wait(1)

    def _follow(self, watcher: Watcher) -> None:
        first = time.monotonic()
        try:
            while not self.over.is_set():
                with self._lock:
                    begin = time.monotonic()
                    watcher.look()
                    took = time.monotonic() - begin
                    if begin - first >= BEAT_S and self._watcher is None:
                        self._watcher = watcher
                        self.looked.set()
                    if watcher.displaced():
                        return
                self.over.wait(max(LOOK_S * (5 if self._watcher else 1), took * 10))
        finally:
            with self._lock:
                self._watcher = None


def _serve(host: str, port: int, registry: Any, exporter: Exporter) -> None:
    from prometheus_client import start_http_server

    try:
        server, serving = start_http_server(port, host, registry)
    except OSError as error:
        raise Failed(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    _bound(server)
    looking = threading.Thread(target=exporter.run, daemon=True)
    looking.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            exporter.looked.wait(10)
            at = f"[{host}]" if ":" in host else host
            click.echo(f"metrics at http://{at}:{server.server_port}/metrics", err=True)
            serving.join()
    finally:
        exporter.over.set()
        server.shutdown()
        server.server_close()
        looking.join(5)


def _bound(server: Any) -> None:
    """Have a server that takes a thread for each connection give up who has not asked within some seconds,
    byte by byte or not at all; and the one that takes longest, where more come than there can be scrapers."""
    take, finish = server.process_request, server.shutdown_request
    asking: dict[Any, float] = {}  # until when, those first that came first

    class Impatient(server.RequestHandlerClass):  # type: ignore[misc]
        timeout = PATIENCE_S

        def parse_request(self) -> bool:
            whole: bool = super().parse_request()
            asking.pop(self.connection, None)
            return whole

        def handle(self) -> None:
            with contextlib.suppress(TimeoutError, ConnectionError):
                super().handle()

    def give_up(request: Any) -> None:
        asking.pop(request, None)
        with contextlib.suppress(OSError):  # its thread has just closed it
            request.shutdown(socket.SHUT_RDWR)  # and its thread finds an end

    def give_up_late() -> None:
        for request, until in [*asking.items()]:
            if until < time.monotonic():
                give_up(request)

    def take_one(request: Any, address: Any) -> None:
        if threading.active_count() > 2 * MOST:  # who has asked is answered, or takes the answer slowly
            finish(request)
            return
        if len(asking) >= MOST:
            give_up(next(iter([*asking])))
        asking[request] = time.monotonic() + PATIENCE_S
        take(request, address)

    def end(request: Any) -> None:
        asking.pop(request, None)
        finish(request)

    server.RequestHandlerClass, server.process_request = Impatient, take_one
    server.shutdown_request, server.service_actions = end, give_up_late
    server.socket.listen(MOST)  # else the sixth of a burst is kept waiting for seconds
