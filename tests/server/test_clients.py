"""Ids that nobody remembers, and queues that neither lose nor repeat a message."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterator

import pytest

from shmsock.region.ivshmem_protocol import Receiver, send_message
from shmsock.server.clients import Client, Credentials, Flow, Id, Ids, Limiter, credentials
from tests.region.conftest import open_files

ALL = 1 << 20


# -- ids


def numbers(*taken: Id | None) -> list[int | None]:
    return [one and one.number for one in taken]


def test_ids_begin_at_0_and_are_new() -> None:
    ids = Ids()
    taken = [ids.take(None)]
    for join in range(2, 100):
        taken.append(ids.take(1))
        ids.retire(join - 1, join, join)
    assert taken == [Id(number) for number in range(99)]


def test_used_ids_come_again_the_oldest_first() -> None:
    """With word of who may have heard of them; as new, when all of those are gone."""
    ids = Ids(2)
    assert numbers(ids.take(None), ids.take(1), ids.take(1)) == [0, 1, 2]  # joins 1, 2, 3
    assert ids.take(1) is None
    ids.retire(1, 2, 3)
    ids.retire(0, 1, 3)
    assert [ids.take(3), ids.take(4)] == [Id(1, 3, 2), Id(0)]  # 3 knows of both, 4 came after them
    assert ids.take(4) is None


def test_a_used_id_is_given_back_with_what_is_known_of_it() -> None:
    ids = Ids(1)
    assert numbers(ids.take(None), ids.take(1)) == [0, 1]
    ids.retire(1, 2, 2)
    for _ in range(2):
        taken = ids.take(1)
        assert taken == Id(1, 2, 2)
        ids.give_back(taken)


def test_who_took_its_share_gets_used_ids() -> None:
    ids = Ids()
    assert numbers(ids.take(None), ids.take(1, new=False)) == [0, 1]  # there is no other
    ids.retire(1, 2, 2)
    assert numbers(ids.take(1), ids.take(1, new=False), ids.take(1, new=False)) == [2, 1, 3]


def test_ids_begin_anew_when_nobody_is_here() -> None:
    ids = Ids(1)
    assert numbers(ids.take(None), ids.take(1)) == [0, 1]
    ids.retire(0, 1, 2)
    ids.retire(1, 2, 2)
    assert [ids.take(None), ids.take(3), ids.take(3)] == [Id(0), Id(1), None]


def test_an_id_that_nobody_heard_of_is_not_spent() -> None:
    ids = Ids()
    assert numbers(ids.take(None), ids.take(1)) == [0, 1]
    ids.give_back(Id(1))
    assert numbers(ids.take(1), ids.take(1)) == [1, 2]


def test_all_of_65536_ids() -> None:
    ids = Ids()
    assert numbers(ids.take(None), *(ids.take(1) for _ in range(65536))) == [*range(65536), None]


# -- queues


class Pair:
    """A client, and what it would read."""

    def __init__(self, number: int, vectors: int = 3) -> None:
        end, self.far = socket.socketpair()
        self.memory = os.open("/dev/null", os.O_RDWR)
        self.client = Client(end, number, number + 1, vectors, credentials(end), self.memory)
        self.inbox = Receiver(self.far)

    def read(self) -> list[tuple[int, bool]]:
        """All that came: numbers, and whether a descriptor came with them."""
        found: list[tuple[int, bool]] = []
        while True:
            try:
                number, fd = self.inbox.receive()
            except BlockingIOError:
                return found
            found.append((number, fd >= 0))
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        self.client.close()
        self.far.close()
        os.close(self.memory)


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    before = open_files()
    made = [Pair(number) for number in range(4)]
    yield made
    for pair in made:
        pair.close()
    assert open_files() == before


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any queue is a long one."""
    monkeypatch.setattr("shmsock.server.clients._LONG", 1)


def came(*numbers: int, vectors: int = 3) -> list[tuple[int, bool]]:
    return [(number, True) for number in numbers for _ in range(vectors)]


def test_greeting(pairs: list[Pair]) -> None:
    a, b, c, _ = pairs
    c.client.greet([a.client, b.client])
    assert c.client.flush(ALL) == (12, Flow.DONE)
    assert c.read() == [(0, False), (2, False), (-1, True), *came(0, 1, 2)]


def test_a_peer_that_left_before_it_was_told_is_told_all_the_same(pairs: list[Pair]) -> None:
    a, b, _, _ = pairs
    a.client.greet([])
    a.client.tell(b.client)
    b.client.close()
    a.client.forget(b.client)
    a.client.flush(ALL)
    assert a.read()[6:] == [*came(1), (1, False)]


def test_when_the_queue_is_long_it_is_not_mentioned(pairs: list[Pair], long: None) -> None:
    a, b, c, _ = pairs
    a.client.greet([])
    a.client.tell(b.client)
    a.client.tell(c.client)
    b.client.close()
    a.client.forget(b.client)
    a.client.flush(ALL)
    assert a.read()[6:] == came(2)


def test_nobody_hears_of_an_id_again(pairs: list[Pair]) -> None:
    """QEMU would use memory that it freed when the first of that id left."""
    a, b, c, _ = pairs
    c.client.known = a.client.join  # a may have heard of its id, b came later
    for one in (a, b):
        one.client.tell(c.client)
        one.client.forget(c.client)
        one.client.flush(ALL)
    assert a.read() == [(0, False), (0, False), (-1, True)]
    assert b.read()[3:] == [*came(2), (2, False)]


@pytest.mark.parametrize(("told", "rest"), [(3, 0), (4, 2), (6, 0)])
def test_what_is_not_told_yet_of_an_id_is_overlooked_when_it_comes_again(
    pairs: list[Pair], told: int, rest: int
) -> None:
    """But vectors that began come whole."""
    a, b, _, _ = pairs
    a.client.tell(b.client)
    a.client.flush(told)
    a.client.forget(b.client)
    a.client.overlook(b.client.join)
    assert a.client.flush(ALL) == (rest, Flow.DONE)


@pytest.mark.parametrize("told", [1, 2])
def test_a_peer_that_left_while_it_was_told_is_told_to_its_end(
    pairs: list[Pair], told: int, long: None
) -> None:
    a, b, c, _ = pairs
    a.client.greet([])
    a.client.tell(b.client)
    a.client.tell(c.client)
    assert a.client.flush(6 + told) == (6 + told, Flow.MORE)
    b.client.close()
    a.client.forget(b.client)
    assert a.client.flush(ALL)[1] is Flow.DONE
    assert a.read()[6:] == [*came(1), *came(2), (1, False)]


def test_a_peer_that_left_after_it_was_told(pairs: list[Pair]) -> None:
    a, b, _, _ = pairs
    a.client.greet([b.client])
    a.client.flush(ALL)
    b.client.close()
    a.client.forget(b.client)
    a.client.flush(ALL)
    assert a.read()[3:] == [*came(1, 0), (1, False)]


def test_eventfds_do_not_block_and_are_of_their_own(pairs: list[Pair]) -> None:
    fds = pairs[0].client.eventfds
    assert len(set(fds)) == 3
    for fd in fds:
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
    os.eventfd_write(fds[1], 1)
    assert [os.eventfd_read(fds[1])] == [1]
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fds[0])


def test_a_client_that_does_not_read_is_full_and_goes_on_where_it_was(pairs: list[Pair]) -> None:
    a, b, _, _ = pairs
    a.client.greet([])
    a.client.flush(ALL)
    told, flow = 0, Flow.DONE
    while flow is Flow.DONE:
        a.client.tell(b.client)
        told += 1
        _, flow = a.client.flush(ALL)
    assert a.client.unread() > 0
    assert a.client.flush(ALL) == (0, Flow.FULL)
    seen = a.read()
    assert a.client.unread() == 0
    while a.client.flush(ALL)[0]:
        seen += a.read()
    assert seen[6:] == came(1) * told


def test_a_churn_of_peers_takes_no_room_in_the_queue_of_one_that_does_not_read(pairs: list[Pair]) -> None:
    a, b, _, _ = pairs
    a.client.greet([b.client])
    assert a.client.flush(5) == (5, Flow.MORE)
    b.client.close()
    a.client.forget(b.client)
    before = len(open_files())
    for join in range(10, 3000):
        end, far = socket.socketpair()
        peer = Client(end, join, join, 3, Credentials(1, 0, "x"), a.memory)
        a.client.tell(peer)
        peer.close()
        far.close()
        a.client.forget(peer)
    assert len(open_files()) == before
    assert len(a.client._queue) <= 1025


@pytest.mark.parametrize("limit", [1, 1024])
def test_random_comings_and_goings_are_told_right(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sent when: whole peers, each once, and leaving after coming."""
    monkeypatch.setattr("shmsock.server.clients._LONG", limit)
    draw = random.Random(7)
    watcher = Pair(0, 2)
    watcher.client.greet([])
    here: list[Pair] = []
    seen: list[tuple[int, bool]] = []
    for number in range(1, 400):
        if here and draw.random() < 0.5:
            gone = here.pop(draw.randrange(len(here)))
            gone.close()
            watcher.client.forget(gone.client)
        else:
            here.append(Pair(number, 2))
            watcher.client.tell(here[-1].client)
        watcher.client.flush(draw.randrange(4))
        seen += watcher.read()
    watcher.client.flush(ALL)
    seen += watcher.read()
    assert seen[:5] == [(0, False), (0, False), (-1, True), *came(0, vectors=2)]
    known: set[int] = set()
    rest = iter(seen[5:])
    for number, with_fd in rest:
        if with_fd:
            assert next(rest) == (number, True)
            assert number not in known
            known.add(number)
        else:
            known.remove(number)
    assert known == {pair.client.number for pair in here}
    for pair in (watcher, *here):
        pair.close()


@pytest.mark.parametrize("code", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
def test_what_the_kernel_has_no_room_for_is_sent_later(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    a, b, _, _ = pairs
    a.client.greet([b.client])
    real = send_message
    calls = []

    def fails_at_fifth(sock: socket.socket, number: int, fd: int | None = None) -> None:
        calls.append(number)
        if len(calls) == 5:
            raise OSError(code, os.strerror(code))
        real(sock, number, fd)

    monkeypatch.setattr("shmsock.server.clients.send_message", fails_at_fifth)
    assert a.client.flush(ALL) == (4, Flow.LATER)
    assert a.client.flush(ALL) == (5, Flow.DONE)
    assert a.read() == [(0, False), (0, False), (-1, True), *came(1, 0)]


def test_one_that_is_gone_is_an_error(pairs: list[Pair]) -> None:
    pairs[0].far.close()
    pairs[0].client.greet([])
    with pytest.raises(BrokenPipeError):
        pairs[0].client.flush(ALL)


def test_who_it_is() -> None:
    a, b = socket.socketpair()
    with a, b:
        who = credentials(a)
    assert (who.pid, who.uid) == (os.getpid(), os.getuid())
    assert who.name.isprintable()
    assert len(who.name) > 1


# -- log lines


def test_limiter() -> None:
    limiter = Limiter(3, 2.0)
    assert [limiter.allows(10.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert limiter.missed == 2
    assert not limiter.allows(11.9)
    assert limiter.allows(12.0)
    assert [limiter.allows(100.0) for _ in range(4)] == [True] * 3 + [False]
