"""Where things lie in a region (see native/LAYOUT.md), and the format: making one, and checking one."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from shmsock.address import Address, may_be_published, packed, unpacked
from shmsock.engine.counters import SHOWN
from shmsock.engine.features import NONE, OWN, Terms
from shmsock.engine.memory import Memory
from shmsock.errors import format_error, region_error
from shmsock.native._core import lib
from shmsock.region.ivshmem_protocol import MAX_ID, MAX_VECTORS
from shmsock.region.sizes import format_size

__all__ = [
    "MAX_PEERS",
    "Identity",
    "Layout",
    "SlotWords",
    "default_slots",
    "format_region",
    "has_magic",
    "is_blank",
    "larger",
    "read_layout",
    "region_terms",
    "too_small",
    "version_and_size",
]

# native/LAYOUT.md says what these are; the core's numbers are the only ones
MAGIC: int = lib.SH_MAGIC
VERSION: int = lib.SH_VERSION
VERSIONS: tuple[int, ...] = (lib.SH_VERSION, lib.SH_VERSION_BITS)
HEADER: int = lib.SH_HEADER_SIZE
MAX_PEERS: int = lib.SH_MAX_PEERS
LISTENERS: int = lib.SH_LISTENERS
H_MAGIC: int = lib.SH_HEADER_MAGIC
H_VERSION: int = lib.SH_HEADER_VERSION
H_ID: int = lib.SH_HEADER_REGION_ID
H_BYTES: int = lib.SH_HEADER_REGION_BYTES
H_FEATURES: int = lib.SH_HEADER_FEATURES
H_TO_LINK: int = lib.SH_HEADER_TO_LINK
H_TO_LOOK: int = lib.SH_HEADER_TO_LOOK
H_RELEASE: int = lib.SH_HEADER_RELEASE
CLAIM: int = lib.SH_SECTION_CLAIM
BEAT: int = lib.SH_SECTION_BEAT
PUMPS: int = lib.SH_SECTION_PUMPS
COUNTS: int = lib.SH_SECTION_COUNTS
SLEEP_SEQ: int = lib.SH_SECTION_SLEEP_SEQ
INCARNATION: int = lib.SH_SECTION_INCARNATION
STATE: int = lib.SH_SECTION_STATE
N_LISTENERS: int = lib.SH_SECTION_LISTENERS
FLAGS: int = lib.SH_SECTION_FLAGS
NAME: int = lib.SH_SECTION_NAME
MACHINE: int = lib.SH_SECTION_MACHINE_ID
BOOT: int = lib.SH_SECTION_BOOT_ID
PID: int = lib.SH_SECTION_PID
DEV: int = lib.SH_SECTION_DEV
INO: int = lib.SH_SECTION_INO
SLOTS_USED: int = lib.SH_SECTION_SLOTS_USED
FEATURES: int = lib.SH_SECTION_FEATURES
TO_LINK: int = lib.SH_SECTION_TO_LINK
TO_LOOK: int = lib.SH_SECTION_TO_LOOK
LEFT: int = lib.SH_SECTION_LEFT
DOORBELL: int = lib.SH_SECTION_DOORBELL
RELEASE: int = lib.SH_SECTION_RELEASE
OWNER: int = lib.SH_SECTION_OWNER
PUBLISHED: int = lib.SH_SECTION_PUBLISHED
ADDRESS: int = lib.SH_SECTION_ADDRESS
ADDRESSES: int = lib.SH_ADDRESSES
PUBLISHING: int = lib.SH_PUBLISHING
LISTENER: int = lib.SH_SECTION_LISTENER
NOTIFY_SEQ: int = lib.SH_PAIR_NOTIFY_SEQ
OUTBOX: int = lib.SH_PAIR_OUTBOX
INBOX: int = lib.SH_PAIR_INBOX
USERS: int = lib.SH_PAIR_USERS
SLOT_LINK: int = lib.SH_SLOT_LINK
SLOT_RING: int = lib.SH_SLOT_RING
SLOT_ENDS: int = lib.SH_SLOT_ENDS
SLOT_TX_WORD: int = lib.SH_SLOT_TX_WORD
SLOT_RX_WORD: int = lib.SH_SLOT_RX_WORD
SLOT_BYTES: int = lib.SH_SLOT_SIZE
SLOTS_AT_ONCE = 4096
MAX_SLOTS: int = lib.SH_MAX_SLOTS
MIN_RING: int = lib.SH_MIN_RING
MAX_RING: int = lib.SH_MAX_RING
ASKED: int = lib.SH_LINK_ASKED
KEPT_FOR_LITTLE: int = lib.SH_KEPT_FOR_LITTLE
LIVE: int = lib.SH_STATE_LIVE
LEAVING: int = lib.SH_STATE_LEAVING
GONE: int = lib.SH_STATE_LEFT
FLAG_LOCKED: int = lib.SH_FLAG_LOCKED
FLAG_FUTEX: int = lib.SH_FLAG_FUTEX
FLAG_COUNTS: int = lib.SH_FLAG_COUNTS
FIN = 1 << lib.SH_FIN_BIT
RST = 1 << lib.SH_RST_BIT
DONE = 1 << lib.SH_DONE_BIT
WANT = 1 << lib.SH_WANT_BIT
_NAME = re.compile(rb"[a-z0-9._-]{1,63}")


@dataclass(frozen=True)
class Identity:
    """What a section says about its owner: shown, compared, never trusted."""

    name: str
    boot_id: bytes
    machine_id: bytes
    pid: int
    flags: int
    file: tuple[int, int]
    claim: int = 0
    """The claim word under which it was written: of another's claim it says nothing."""
    terms: Terms = NONE

    def lock_tells(self, boot_id: bytes, file: tuple[int, int]) -> bool:
        """Would this process see it if the owner's section lock fell: same kernel, same file?"""
        return bool(self.flags & FLAG_LOCKED) and self.boot_id == boot_id != bytes(16) and self.file == file


class SlotWords(NamedTuple):
    """A slot in use, as its owner tells: to be shown, nothing follows from it."""

    slot: int
    generation: int
    asked: bool
    """Its CONNECT has no answer yet."""
    peer: int
    """A section; it need not exist."""
    peer_slot: int
    ports: tuple[int, int] | None
    """The own one, and the peer's, 0 for datagrams; None: not known."""
    accepted: bool
    ring: int
    """Bytes; 0: no size."""
    bits: int
    """FIN, RST, DONE, WANT."""
    tail: int
    head: int


class Layout:
    """The geometry of a formatted region: a function of its id and size alone."""

    geometry: Any
    memory: Memory
    region_bytes: int
    region_id: int

    def __init__(self, memory: Memory, region_id: int, region_bytes: int) -> None:
        ffi, lib = memory.core
        g = ffi.new("sh_geometry *")
        if lib.sh_geometry_of(region_id, region_bytes, g) < 0:
            raise format_error(
                f"region id {region_id:#x} and size {region_bytes} do not go together: not a region of this "
                "version, "
                "or overwritten; make it anew with `shmsock create --force`"
            )
        self.memory, self.geometry = memory, g
        self.region_id, self.region_bytes = region_id, region_bytes
        self.peers: int = g.peers
        self.slots: int = g.slots
        self.section_bytes: int = g.section_bytes
        self.slot_off: int = g.slot_off
        self.arena_off: int = g.arena_off
        self.arena_bytes: int = g.arena_bytes

    @property
    def connections(self) -> int:
        """How many connections one peer can open to another, if nobody else has any: an eighth of the slots
        is kept for those who hold few (native/slots.c)."""
        return self.slots - self.slots // KEPT_FOR_LITTLE

    def section(self, index: int) -> int:
        return HEADER + index * self.section_bytes

    def pair(self, of: int, towards: int) -> int:
        g: Any = self.geometry
        return self.section(of) + int(g.pair_off) + towards * int(g.pair_bytes)

    def slot(self, of: int, index: int) -> int:
        return self.section(of) + self.slot_off + index * SLOT_BYTES

    # -- words of others: read here and nowhere else, and only what was checked is returned

    def claim(self, index: int) -> int:
        """The nonce of the owner; 0 for nobody."""
        return self.memory.load(self.section(index) + CLAIM)

    def life(self, index: int) -> int:
        """The incarnation of the owner, or of the last one; 0 when the section was never used."""
        return self.memory.load(self.section(index) + INCARNATION)

    def state(self, index: int) -> int:
        """0 (not yet there), LIVE, LEAVING, or GONE for anything else."""
        state = self.memory.load(self.section(index) + STATE)
        return state if state in (0, LIVE, LEAVING) else GONE

    def beat(self, index: int) -> int:
        """Return the owner's beat, to be compared for equality only."""
        return self.memory.load(self.section(index) + BEAT)

    def departure(self, index: int) -> int:
        """Return when the section was left: the smaller, the longer ago."""
        return self.memory.load(self.section(index) + LEFT)

    def doorbell(self, index: int) -> tuple[int, int] | None:
        """Return the owner's id on the region's ivshmem server, and its vectors; None when it has no
        doorbell."""
        word = self.memory.load(self.section(index) + DOORBELL)
        number, vectors = word >> 32, word & 0xFFFFFFFF
        return (number, vectors) if number <= MAX_ID and 0 < vectors <= MAX_VECTORS else None

    def listener_entries(self, index: int) -> list[tuple[int, int]]:
        """(port, flags) of the listeners in use."""
        at = self.section(index)
        used = min(self.memory.load(at + N_LISTENERS), LISTENERS)
        entries = struct.unpack(f"<{used}Q", self.memory.read(at + LISTENER, 8 * used))
        return [(e & 0xFFFF, e >> 16 & 0xFF) for e in entries if e >> 16 & lib.SH_LISTEN_USED]

    def slots_used(self, index: int) -> int:
        """Return how many slots of a section were in use at the most: no other is."""
        return min(self.memory.load(self.section(index) + SLOTS_USED), self.slots)

    def slots_in_use(self, index: int, most: int = MAX_SLOTS) -> Iterator[SlotWords]:
        """The slots of a section that are in use, of the first `most`. None whose words are of different
        lives."""
        used = min(self.slots_used(index), most)
        for first in range(0, used, SLOTS_AT_ONCE):
            yield from self._slots(index, first, min(SLOTS_AT_ONCE, used - first))

    def slot_in_use(self, index: int, slot: int) -> SlotWords | None:
        """That slot; None: it is not in use."""
        return next(self._slots(index, slot, 1), None)

    def _slots(self, index: int, first: int, count: int) -> Iterator[SlotWords]:
        raw = self.memory.read(self.slot(index, first), count * SLOT_BYTES)
        words, step, shift = memoryview(raw).cast("Q"), SLOT_BYTES // 8, int(lib.SH_GEN_SHIFT)
        for slot, link in enumerate(words[SLOT_LINK // 8 :: step]):
            at = slot * step
            tx = words[at + SLOT_TX_WORD // 8]
            if not link or tx >> shift != link >> shift:
                continue
            ring, ends = words[at + SLOT_RING // 8], words[at + SLOT_ENDS // 8]
            mine, size = ends >> shift == tx >> shift, 1 << (ring >> lib.SH_LOG2_SHIFT & 63)
            yield SlotWords(
                slot=first + slot,
                generation=tx >> shift,
                asked=link >> 8 & 0xFF == ASKED,
                peer=link >> 32 & 0xFF,
                peer_slot=link >> 16 & 0xFFFF,
                ports=(ends >> 16 & 0xFFFF, ends & 0xFFFF) if mine else None,
                accepted=mine and bool(ends >> 32 & 1),
                ring=size if MIN_RING <= size <= MAX_RING else 0,
                bits=tx & (FIN | RST | DONE | WANT),
                tail=tx & 0xFFFFFFFF,
                head=words[at + SLOT_RX_WORD // 8] & 0xFFFFFFFF,
            )

    def told(self, writer: int, reader: int) -> bytes:
        """A bit for each of the reader's slots: the writer has told it to poll that, and it has not done so
        since. To be shown."""
        size, g = self.slots // 8, self.geometry
        said = self.memory.read(self.pair(writer, reader) + int(g.toggle_off), size)
        seen = self.memory.read(self.pair(reader, writer) + int(g.ack_off), size)
        return bytes(a ^ b for a, b in zip(said, seen, strict=True))

    def counts(self, index: int) -> dict[str, int]:
        """Counters of a section's owner, by the names that statistics() gives, as it shows them to people:
        those in SHOWN modulo 2**32. (Whether it does is a flag of its identity.)"""
        n = int(lib.SH_COUNTS)
        words = struct.unpack(f"<{n}Q", self.memory.read(self.section(index) + COUNTS, 8 * n))
        halves = [half for word in words[2:] for half in (word & 0xFFFFFFFF, word >> 32)]
        return {"bytes_in": words[0], "bytes_out": words[1], **dict(zip(SHOWN, halves, strict=True))}

    def pumps(self, index: int) -> int:
        """Return the owner's count of passes: to be shown."""
        return self.memory.load(self.section(index) + PUMPS)

    def sleep_seq(self, index: int) -> tuple[int, bool]:
        """Return how often the owner fell asleep (modulo 2**62), and whether it sleeps now: to be shown."""
        word = self.memory.load(self.section(index) + SLEEP_SEQ)
        return word >> 2, bool(word & 1)

    def terms(self, index: int) -> Terms:
        """What the section's owner says of its version. (SYNC FEATURES: after its tag was read; partner:
        write_identity().)"""
        load, at = self.memory.load, self.section(index)
        return _terms(load(at + RELEASE), load(at + FEATURES), load(at + TO_LINK), load(at + TO_LOOK))

    def is_read_by(self, section: int, reader: int) -> bool:
        """Has the reader left messages of the section's last owner unread, or does it still read what that
        published?"""
        load, there, back = self.memory.load, self.pair(section, reader), self.pair(reader, section)
        tag, mine = load(there + NOTIFY_SEQ) >> 32, load(back + NOTIFY_SEQ) >> 32
        sent, taken = load(there + OUTBOX), load(back + INBOX)
        head = taken if taken >> 32 == tag else 0
        if sent >> 32 == mine and (sent ^ head) & 0xFFFFFFFF:
            return True
        users = load(back + USERS)  # SYNC U: inbox before users; partner: handshake.c, acknowledge()
        return bool(users & 0xFFFFFFFF) and users >> 32 == tag

    def knock(self, section: int) -> None:
        """Have the section's owner look at once whose lock fell, if a futex can wake it."""
        self.memory.knock(self.geometry, section)

    def swap_claim(self, index: int, old: int, new: int) -> bool:
        """Compare and swap a section's claim word (0: nobody's). Returns whether it was `old`."""
        return self.memory.cas(self.section(index) + CLAIM, old, new)

    def tag(self, of: int, towards: int) -> int:
        """The pair_inc under which a section's owner speaks to another."""
        return self.memory.load(self.pair(of, towards) + NOTIFY_SEQ) >> 32

    def survey(self) -> tuple[Callable[[], int], Callable[[int], int]]:
        """Return two functions. The first surveys all sections as cheaply as can be, and returns a mask of
        those whose owner, or its state, has changed since the survey before. The second tells a section's
        beat at the last survey."""
        ffi, lib = self.memory.core
        step, beat = int(lib.SH_SURVEY), int(lib.SH_SURVEY_BEAT)
        words = ffi.new("uint64_t[]", self.peers * step)
        return partial(self.memory.survey, self.geometry, words), lambda section: words[section * step + beat]

    def identity(self, index: int) -> Identity | None:
        """Return who owns the section; None when nobody does, or when what it says is no identity (half
        written, hostile)."""
        memory, at = self.memory, self.section(index)
        if not (life := memory.load(at + INCARNATION)):
            return None
        raw = memory.read(at + FLAGS, LISTENER - FLAGS)  # at once, as a newcomer reads all there are
        if memory.load(at + INCARNATION) != life:
            return None

        def field(offset: int, size: int = 8) -> bytes:
            return raw[offset - FLAGS : offset - FLAGS + size]

        def word(offset: int) -> int:
            return int.from_bytes(field(offset), "little")

        name, _, rest = field(NAME, 64).partition(b"\0")
        if not _NAME.fullmatch(name) or rest.strip(b"\0"):
            return None
        return Identity(
            name=name.decode("ascii"),
            boot_id=field(BOOT, 16),
            machine_id=field(MACHINE, 16),
            pid=word(PID),
            flags=word(FLAGS),
            file=(word(DEV), word(INO)),
            claim=word(OWNER),
            terms=_terms(word(RELEASE), word(FEATURES), word(TO_LINK), word(TO_LOOK)),
        )

    def published_word(self, index: int) -> int:
        """Return what changes with the addresses that a section publishes: to be compared only."""
        return self.memory.load(self.section(index) + PUBLISHED)

    def published(self, index: int, life: int) -> tuple[int, frozenset[Address]]:
        """Return published_word(), and the addresses that the section's owner publishes in that life: none
        while they are being written, and none that cannot be a machine's for others."""
        memory, at = self.memory, self.section(index)
        word = memory.load(at + PUBLISHED)
        count = word & 0xFF
        if word >> 32 != life & 0xFFFFFFFF or not 0 < count <= ADDRESSES:
            return word, frozenset()
        raw = memory.read(at + ADDRESS, 16 * count)
        memory.fence()  # the copy, and then the word again
        if memory.load(at + PUBLISHED) != word:
            return word, frozenset()
        found = (unpacked(raw[i : i + 16]) for i in range(0, len(raw), 16))
        return word, frozenset(filter(may_be_published, found))

    def publish(self, index: int, life: int, changes: int, addresses: Sequence[Address]) -> None:
        """Publish the first ADDRESSES of these in the own section. `changes`: another number each time."""
        memory, at, some = self.memory, self.section(index), addresses[:ADDRESSES]
        word = (life & 0xFFFFFFFF) << 32 | (changes & 0xFFFFFF) << 8
        memory.store(at + PUBLISHED, word | PUBLISHING)
        memory.fence()
        if some:
            memory.write(at + ADDRESS, b"".join(map(packed, some)))
        memory.fence()
        memory.store(at + PUBLISHED, word | len(some))

    def write_identity(self, index: int, who: Identity, incarnation: int) -> None:
        """Store the own identity. (SYNC FEATURES: before any tag of this life; partner: terms().)"""
        memory, at = self.memory, self.section(index)
        memory.store(at + N_LISTENERS, 0)
        memory.write(at + NAME, who.name.encode("ascii").ljust(64, b"\0"))
        memory.write(at + MACHINE, who.machine_id)
        memory.write(at + BOOT, who.boot_id)
        memory.store(at + PID, who.pid)
        memory.store(at + DEV, who.file[0])
        memory.store(at + INO, who.file[1])
        memory.store(at + FLAGS, who.flags)
        release, least, features, to_link, to_look = who.terms
        memory.store(at + RELEASE, least << 32 | release)
        memory.store(at + FEATURES, features)
        memory.store(at + TO_LINK, to_link)
        memory.store(at + TO_LOOK, to_look)
        memory.store(at + OWNER, who.claim)
        memory.store(at + INCARNATION, incarnation)


def _terms(release: int, features: int, to_link: int, to_look: int) -> Terms:
    """Terms from their words. Releases without them store 0 for the first, and leave the others as they
    were."""
    release, least = release & 0xFFFFFFFF, release >> 32
    return Terms(release, least, features, to_link, to_look) if release else NONE


def _slots_fit(memory: Memory, size: int, peers: int, log2_slots: int) -> Any:
    g = memory.core.ffi.new("sh_geometry *")
    return g if memory.core.lib.sh_geometry_of(log2_slots << 8 | peers, size, g) == 0 else None


def default_slots(memory: Memory, size: int, peers: int) -> int:
    """Connections per section: as many as can have two smallest rings (512 bytes) each, 16 to 65,536; 0:
    region too small."""
    most, least = int(lib.SH_MAX_SLOTS).bit_length() - 1, int(lib.SH_MIN_SLOTS).bit_length() - 1
    for log2_slots in range(most, least - 1, -1):
        g = _slots_fit(memory, size, peers, log2_slots)
        if g is not None and (g.arena_bytes >= g.slots * 2 * lib.SH_MIN_RING or log2_slots == least):
            return 1 << log2_slots
    return 0


def too_small(memory: Memory, peers: int = 1) -> str:
    """Say why a region of so many peers does not fit into so few bytes; "" when it does."""
    if memory.size >= HEADER and default_slots(memory, memory.size, peers):
        return ""
    need = next(s for s in (1 << k for k in range(12, 40)) if default_slots(memory, s, peers))
    count = f"{peers} peers" if peers > 1 else "even one peer"
    fewer = ", or ask for fewer peers" if peers > 1 else ""
    has, wanted = format_size(memory.size), format_size(need)
    return f"{has} are too few for a region of {count}: make it {wanted} or more{fewer}"


def format_region(memory: Memory, *, peers: int = 16, rng: random.Random | None = None) -> Layout:
    """Format a zeroed region; harmless if it is formatted already, or being formatted by another at this
    moment.

    Everything follows from one word that is compared and swapped, so two that format write the same words.
    Raises RegionFormatError when the region holds something else, OSError(EINVAL) when it is too small for
    `peers`.
    """
    if not 1 <= peers <= MAX_PEERS:
        raise region_error(22, f"a region of {peers} peers was asked for, expected 1 to {MAX_PEERS}")
    if small := too_small(memory, peers):
        raise format_error(small)
    magic = memory.load(H_MAGIC)
    if magic == MAGIC:
        return read_layout(memory)
    head = memory.read(0, HEADER)
    memory.fence()
    # What appeared in the header since can be another's format, and then its first word, the id, is there.
    if magic or (any(head) and memory.load(H_ID) == 0):
        raise format_error(
            f"the region begins with {head[:16].hex()}, expected zeros or a shmsock magic: it holds "
            "something else; `shmsock create --force` overwrites it"
        )
    draw = rng or random.SystemRandom()
    log2_slots = default_slots(memory, memory.size, peers).bit_length() - 1
    memory.cas(H_ID, 0, draw.getrandbits(39) << 24 | 1 << 63 | log2_slots << 8 | peers)
    region_id = memory.load(H_ID)
    layout = Layout(memory, region_id, memory.size)
    memory.store(H_BYTES, memory.size)
    memory.store(H_VERSION, VERSION)
    memory.store(H_RELEASE, OWN.release)
    memory.fence()
    memory.store(H_MAGIC, MAGIC)  # last: whoever sees the magic sees the rest
    return layout


def has_magic(memory: Memory) -> bool:
    """Was the region formatted, in whatever version?"""
    return memory.size >= HEADER and memory.load(H_MAGIC) == MAGIC


def version_and_size(memory: Memory) -> tuple[int, int]:
    """Return the version and the size that the header states, to be shown."""
    return memory.load(H_VERSION), memory.load(H_BYTES)


def is_blank(memory: Memory) -> bool:
    """No magic yet, and nothing else either: a BAR2 that nobody formatted, or a format that was begun."""
    return memory.size >= HEADER and memory.load(H_MAGIC) == 0


def read_layout(memory: Memory, *, looks: bool = False) -> Layout:
    """Check the header, once. `looks`: nothing will be written. Raises RegionFormatError that says what was
    seen and what to do."""
    if memory.size < HEADER:
        raise format_error(f"the region has {memory.size} bytes, expected at least {HEADER}: truncated?")
    magic, version = memory.load(H_MAGIC), memory.load(H_VERSION)
    if magic != MAGIC:
        if small := too_small(memory):
            raise format_error(small)
        state = "not formatted, or zeroed by a guest's boot" if magic == 0 else "it holds something else"
        raise format_error(
            f"the region has magic {magic:#x}, expected {MAGIC:#x}: {state}; run "
            "`shmsock create --force` on the host when nobody has it mapped, no QEMU either"
        )
    if version not in VERSIONS:
        newer = version > max(VERSIONS)
        do = "upgrade it here, `pip install -U shmsock`" if newer else "upgrade those who made it"
        raise format_error(
            f"the region has format version {version}, this shmsock knows {VERSION}: {do}; "
            "when nobody has the region mapped, no QEMU either, `shmsock create --force` makes it anew"
        )
    terms = region_terms(memory)
    if barred := OWN.barred(terms, "the region was made by", looks):
        raise format_error(
            f"{barred}; or make it anew, when nobody has it mapped, no QEMU either: `shmsock create --force`"
        )
    size = memory.load(H_BYTES)
    if size > memory.size:
        raise format_error(
            f"the region was formatted with {size} bytes, but only {memory.size} are there: truncated, or "
            "the VM was "
            "given a smaller size= than the file has"
        )
    return Layout(memory, memory.load(H_ID), size)


def region_terms(memory: Memory) -> Terms:
    """What a region needs of those who use it, and which release made it."""
    load = memory.load
    return _terms(load(H_RELEASE), load(H_FEATURES), load(H_TO_LINK), load(H_TO_LOOK))


def larger(layout: Layout, enough: Callable[[Layout], bool]) -> tuple[str, int] | None:
    """Find a larger region, of as many peers, that is `enough`. Returns size and peers, for messages."""
    for factor in (1 << k for k in range(1, 20)):
        size = layout.region_bytes * factor
        slots = default_slots(layout.memory, size, layout.peers)
        if not slots:
            break
        if enough(Layout(layout.memory, (slots.bit_length() - 1) << 8 | layout.peers, size)):
            return format_size(size), layout.peers
    return None
