/* core.h - what Python calls. The lines between the markers are read as cffi's cdef (build.py), so only plain C stands there.
 *
 * All of it is called by the thread that owns the node, except the heartbeat's own loop. Positions count bytes, run free modulo 2^32
 * and are masked on access: capacity is a power of two, so overflow is harmless. */
#ifndef SHMSOCK_CORE_H
#define SHMSOCK_CORE_H

#include <stdint.h>

/* cdef-begin */
/* ---- what lies where: LAYOUT.md in numbers, asserted in layout.h. Python makes its constants of these ---- */
#define SH_MAGIC 0x314b434f534d4853ull /* the bytes "SHMSOCK1" */
enum sh_limit {
    SH_VERSION = 5,
    SH_VERSION_BITS = 6, /* the same, with bits in the header that peers of 0.1 must not overlook */
    SH_RELEASE = 0 << 24 | 2 << 16 | 0, /* major, minor and patch of this release, as in __init__.py */
    SH_LEAST_RELEASE = 0, /* the oldest release that can talk to this one; 0: every one of this layout */
    SH_LINE = 64,
    SH_PAGE = 4096,
    SH_MAX_PEERS = 64,
    SH_MIN_SLOTS = 16,
    SH_MAX_SLOTS = 65536,
    SH_MIN_MESSAGES = 64, /* in the ring of one direction: the more, the more slots there are */
    SH_MAX_MESSAGES = 256,
    SH_LOG = 16,         /* slots in the log of a pair */
    SH_VIOLATIONS = 3,   /* so many are too many */
    SH_KEPT_FOR_LITTLE = 8, /* one of so many parts of a section is kept for those who hold little of it */
    SH_LISTENERS = 448,  /* of a section */
    SH_ADDRESSES = 6,    /* published in a section, at most */
    SH_PUBLISHING = 255, /* for their number: they are being written */
    SH_COUNTS = 6,       /* words of counters that a section shows */
    SH_MIN_RING = 512,
    SH_MAX_RING = 1 << 30,
    SH_EPOCH_LEAD = 7, /* how far a ring's epoch may be ahead of what its reader knows, modulo 16: so many rings may be outgrown */
    SH_STORAGE = 64 << 10, /* how much is put behind a section with holes at a time */
    SH_RECORD_HEADER = 8,
    SH_DATAGRAM_MAX = 65507, /* as UDP over IPv4 */
    SH_COPY_MAX = 1 << 20 /* bytes copied in one piece: between two, the core checks that the section is still this node's */
};
enum sh_feature { SH_FEATURE_BITS = 1 }; /* of a node: it looks at the bits of others. All that are known stand in SH_FEATURES */
#define SH_FEATURES 0x1ull
enum sh_header_at {
    SH_HEADER_MAGIC = 0, SH_HEADER_VERSION = 8, SH_HEADER_REGION_ID = 16, SH_HEADER_REGION_BYTES = 24, SH_HEADER_FEATURES = 32,
    SH_HEADER_TO_LINK = 40, SH_HEADER_TO_LOOK = 48, SH_HEADER_RELEASE = 56, SH_HEADER_SIZE = 4096
};
enum sh_section_at {
    SH_SECTION_CLAIM = 0x000, SH_SECTION_BEAT = 0x040, SH_SECTION_PUMPS = 0x048, SH_SECTION_COUNTS = 0x050, SH_SECTION_SLEEP_SEQ = 0x080,
    SH_SECTION_INCARNATION = 0x0c0, SH_SECTION_STATE = 0x0c8, SH_SECTION_LISTENERS = 0x0d0, SH_SECTION_FLAGS = 0x0d8, SH_SECTION_SLOTS_USED = 0x0e0,
    SH_SECTION_FEATURES = 0x0e8, SH_SECTION_TO_LINK = 0x0f0, SH_SECTION_TO_LOOK = 0x0f8,
    SH_SECTION_NAME = 0x100, SH_SECTION_MACHINE_ID = 0x140, SH_SECTION_BOOT_ID = 0x150, SH_SECTION_PID = 0x160,
    SH_SECTION_DEV = 0x168, SH_SECTION_INO = 0x170, SH_SECTION_LEFT = 0x178, SH_SECTION_DOORBELL = 0x180,
    SH_SECTION_RELEASE = 0x188, SH_SECTION_OWNER = 0x190, SH_SECTION_PUBLISHED = 0x198, SH_SECTION_ADDRESS = 0x1a0,
    SH_SECTION_LISTENER = 0x200, SH_SECTION_SIZE = 4096
};
enum sh_pair_at { SH_PAIR_NOTIFY_SEQ = 0x00, SH_PAIR_KICKED_FOR = 0x08, SH_PAIR_LOG = 0x10, SH_PAIR_ENDED_NAP = 0x30, SH_PAIR_OUTBOX = 0x40, SH_PAIR_INBOX = 0x80, SH_PAIR_USERS = 0xc0, SH_PAIR_SIZE = 0x100 };
enum sh_slot_at { SH_SLOT_LINK = 0x00, SH_SLOT_RING = 0x08, SH_SLOT_ENDS = 0x10, SH_SLOT_TX_WORD = 0x40, SH_SLOT_RX_WORD = 0x80, SH_SLOT_SIZE = 192 };
enum sh_message_at {
    SH_MESSAGE_SRC_INC = 0, SH_MESSAGE_DST_INC = 4, SH_MESSAGE_SEQ = 8, SH_MESSAGE_KIND = 12, SH_MESSAGE_REASON = 13,
    SH_MESSAGE_SLOT = 16, SH_MESSAGE_DST_SLOT = 18, SH_MESSAGE_GEN = 20, SH_MESSAGE_DST_GEN = 24, SH_MESSAGE_PORT = 28,
    SH_MESSAGE_SRC_PORT = 30, SH_MESSAGE_SIZE = 64
};
enum sh_word_bit { SH_FIN_BIT = 32, SH_RST_BIT, SH_DONE_BIT, SH_WANT_BIT, SH_EPOCH_SHIFT, SH_GEN_SHIFT = 40, SH_LOG2_SHIFT = 30 }; /* in P and C; the last of a ring's descriptor */

/* ---- types, and what the core answers ---- */
typedef struct sh_node sh_node;
typedef struct sh_ep sh_ep;
typedef struct sh_heartbeat sh_heartbeat;
typedef struct sh_arena sh_arena;

typedef struct {
    uint64_t section_bytes, pair_off, pair_bytes, toggle_off, ack_off, message_off;
    uint64_t slot_off, arena_off, arena_bytes;
    uint32_t peers, slots, messages;
} sh_geometry;

enum sh_state { SH_STATE_NONE, SH_STATE_LIVE, SH_STATE_LEAVING, SH_STATE_LEFT };
enum sh_kind { SH_CONNECT = 1, SH_ACCEPT, SH_REFUSE };
enum sh_reason { SH_NO_LISTENER = 1, SH_NO_SLOT, SH_NO_MEMORY, SH_BACKLOG, SH_STALE_CONNECT };
enum sh_listen {
    SH_LISTEN_USED = 1, SH_LISTEN_REUSE = 2, SH_LISTEN_LOCAL = 4, SH_LISTEN_TENTATIVE = 8, SH_LISTEN_DATAGRAM = 16
};
enum sh_flag { SH_FLAG_LOCKED = 1, SH_FLAG_FUTEX = 2, SH_FLAG_COUNTS = 4 };
enum sh_link_state { SH_LINK_OPEN = 1, SH_LINK_ASKED }; /* of a slot, for people and tools */
/* how we wake a peer that sleeps */
enum sh_wake_out { SH_WAKE_OUT_NONE, SH_WAKE_OUT_FUTEX, SH_WAKE_OUT_EVENTFD, SH_WAKE_OUT_REGISTER, SH_WAKE_OUT_LOST };
/* what a wakeup by the heartbeat calls for besides a pass: bits of sh_heartbeat_heard() */
enum sh_heard { SH_HEARD_LOCK = 1, SH_HEARD_SUSPECTED_LOSS = 2 };
/* how a peer wakes us: bits; both are set while it changes over, as it hears of our doorbell, or of the doorbell's end */
enum sh_wake_in { SH_WAKE_IN_NOT, SH_WAKE_IN_FUTEX, SH_WAKE_IN_DOORBELL };
/* what reads, writes, polls and spins return when it is no count */
enum sh_status {
    SH_EMPTY = -1,     /* nothing is there: arm and suspend */
    SH_EOF = -2,       /* FIN, and all was read */
    SH_RESET = -3,     /* RST, generation gone, or peer gone: no more bytes */
    SH_YIELD = -4,     /* the loop turn's budget is used up: let the loop turn once */
    SH_VIOLATION = -5, /* the peer wrote nonsense */
    SH_STALE = -6,     /* nothing may be touched (any more): closed, forked, another thread, or the section is another's */
    SH_CLOSED = -7,    /* this side's writing has ended, or the peer will never read */
    SH_UNBOUND = -8,   /* the listener entry that a datagram is for has changed: resolve the address anew */
    SH_SLOW = -10,     /* nothing was read: fewer bytes are there than asked for, or the taker wants none of them */
    SH_FULL = -11,     /* the ring of messages has no room */
    SH_UNADOPTED = -12, /* no life of that peer is known */
    SH_NO_REGION = -13, /* an id that is none, or a region that is too small for it */
    SH_NO_FUTEX = -14, /* words of the region cannot be waited for here */
    SH_NO_THREAD = -15, /* the heartbeat could not be started */
    SH_NO_SLOTS = -16, /* the own section has no slot left for that peer, */
    SH_NO_ROOM = -17,  /* or no ring memory, */
    SH_NO_STORAGE = -18, /* or no storage can be put behind it: the disk is full */
    SH_UNREADABLE = -19 /* a file, or a socket that takes no more: errno says why */
};
/* bits of sh_poll() and of what sh_pump() returns */
enum sh_bits {
    SH_POLL_DATA = 1, SH_POLL_FIN = 2, SH_POLL_DONE = 4, SH_POLL_RESET = 8, SH_POLL_BAD = 16, SH_POLL_SPACE = 32, SH_POLL_MOVED = 64
};
/* What sh_pump() returns: kind << 24 | slot, and above that: SLOT: generation << 40 | bits of a poll << 32; CONNECTED: the same; REFUSED: generation << 40 |
 * reason << 32; ACCEPTED: peer << 16, entry of the port << 55 (SH_LISTENERS: for datagrams) | the peer's port << 39 | bits of a poll << 32. OFFENCE: how
 * many violations << 32; it and ADOPT have a peer for the slot. */
enum sh_event { SH_EV_SLOT, SH_EV_ADOPT, SH_EV_ACCEPTED, SH_EV_CONNECTED, SH_EV_REFUSED, SH_EV_OFFENCE };
/* a read: nothing else is to be run, so it may spin; its caller has just let the loop turn; a pass comes before the loop sleeps, and arms */
enum sh_how { SH_MAY_SPIN = 1, SH_YIELDED = 2, SH_PASS_FOLLOWS = 4 };
enum sh_survey { SH_SURVEY_CLAIM, SH_SURVEY_INCARNATION, SH_SURVEY_STATE, SH_SURVEY_DOORBELL, SH_SURVEY_BEAT, SH_SURVEY }; /* words per section */
enum sh_counter { /* statistics() has them by these names, in lower case */
    SH_N_PUMPS, SH_N_READS, SH_N_WRITES, SH_N_BYTES_IN, SH_N_BYTES_OUT, SH_N_NOTIFIES, SH_N_NOTIFIES_PENDING, SH_N_SPIN_HITS, SH_N_SPIN_MISSES,
    SH_N_HEALED, SH_N_NOTIFICATIONS, SH_N_DATAGRAMS_IN, SH_N_DATAGRAMS_OUT, SH_N_KICKS, SH_N_SUPPRESSED,
    SH_N_RECEIVED, SH_N_NAPS, SH_N_ENDED_NAPS, SH_N_SPURIOUS, SH_N_RATE_LIMITED, SH_N_REFUSED, SH_N_COUNTERS
};

/* memory, for the cold paths; offsets in bytes from base, 8-byte aligned */
uint64_t sh_load64(const void *base, uint64_t offset);
void sh_store64(void *base, uint64_t offset, uint64_t value, int wc);
int sh_cas64(void *base, uint64_t offset, uint64_t old, uint64_t value);
void sh_full_fence(int wc);
void sh_read_bytes(const void *base, uint64_t offset, void *to, uint32_t n);
void sh_write_bytes(void *base, uint64_t offset, const void *from, uint32_t n);
uint64_t sh_clock(void);
uint64_t sh_time_reads(const void *base, uint64_t offset, uint64_t bytes, uint32_t times);
uint64_t sh_time_writes(void *base, uint64_t offset, uint64_t bytes, uint32_t times);
uint64_t sh_survey(const void *base, const sh_geometry *g, uint64_t *words, int wc);
int sh_geometry_of(uint64_t region_id, uint64_t region_bytes, sh_geometry *out);
int sh_listen_still(const void *base, const sh_geometry *g, uint32_t section, uint64_t life, uint32_t port, uint32_t entry, int lock_fd, int wc);
int sh_listen_find(const void *base, const sh_geometry *g, uint32_t section, uint32_t port, int datagram, int wc);

/* node */
uint64_t sh_node_bytes(const sh_geometry *g);
sh_node *sh_node_new(void *memory, void *base, const sh_geometry *g, uint32_t self, int wc);
void sh_node_claim(sh_node *nd, uint64_t claim);
void sh_node_inert(sh_node *nd);
int sh_node_is_inert(sh_node *nd);
void sh_node_own(sh_node *nd);
void sh_node_settings(sh_node *nd, uint64_t hold_ns, uint64_t spin_max_ns, uint64_t spin_yield_ns);
uint64_t sh_node_counter(sh_node *nd, int which);
int sh_shown(uint32_t i);
uint64_t sh_turn(sh_node *nd);
int sh_over(sh_node *nd);
void sh_loop(sh_node *nd, int fd);
void sh_due(sh_node *nd, uint64_t at_ns);
void sh_hot(sh_node *nd, uint64_t hot_ns, uint64_t hot_turns, int one_cpu);
int sh_pumped_just_now(sh_node *nd, uint64_t now);
int sh_stay_hot(sh_node *nd, uint64_t now, int owed);
uint64_t sh_moved(sh_node *nd);
int sh_is_next(const sh_node *nd, uint64_t now);
int sh_pump(sh_node *nd, uint64_t *out, int max);
int sh_pump_more(sh_node *nd, uint64_t *out, int max, uint64_t now, uint64_t ns);
int sh_quiet(sh_node *nd);
int sh_safety(sh_node *nd);
int sh_inspect(sh_node *nd, uint32_t peer);

/* sleep, and waking others */
void sh_set_wake_out(sh_node *nd, uint32_t peer, int kind, int fd, uint64_t offset, uint32_t value);
void sh_set_wake_in(sh_node *nd, uint32_t peer, int wake_in, int there);
int sh_must_poll(sh_node *nd, uint32_t peer);
int sh_sleep(sh_node *nd);
int sh_received(sh_node *nd, uint64_t times);
int sh_hear(sh_node *nd, int fd);
uint64_t sh_lost(sh_node *nd);
int sh_futex_works(void *base, uint64_t offset);
void sh_knock(void *base, const sh_geometry *g, uint32_t section);

/* links */
void sh_restart(sh_node *nd, uint32_t peer, uint32_t pair_inc);
uint32_t sh_adopt(sh_node *nd, uint32_t peer);
int sh_adopted(sh_node *nd, uint32_t peer);
void sh_notify(sh_node *nd, uint32_t peer, uint32_t slot);

/* connections that come to be */
int64_t sh_connect(sh_node *nd, uint32_t peer, uint32_t port, uint32_t src_port);
int64_t sh_connect_again(sh_node *nd, uint32_t peer, uint64_t life, uint32_t port, uint32_t entry, uint32_t src_port);
int sh_messages(sh_node *nd, uint32_t peer, uint64_t *out, int max);
void sh_listen(sh_node *nd, uint32_t index, uint32_t port, uint32_t backlog, int local);
void sh_listen_serve(sh_node *nd, uint32_t index, int serve);
void sh_listen_taken(sh_node *nd, uint32_t index);
uint32_t sh_listen_pending(const sh_node *nd, uint32_t index);
void sh_here(sh_node *nd, uint64_t peers);

/* endpoints */
sh_ep *sh_ep_at(sh_node *nd, uint32_t slot);
uint32_t sh_ep_gen(const sh_ep *ep);
uint64_t sh_ep_ring(const sh_ep *ep, uint32_t which);
int sh_ep_open(sh_ep *ep, uint32_t peer, uint32_t peer_slot, uint32_t peer_gen);
int sh_ep_is_open(const sh_ep *ep);
void sh_ep_release(sh_ep *ep);
void sh_ep_orphan(sh_ep *ep);
void sh_ep_finish(sh_ep *ep);
void sh_ep_close(sh_ep *ep, int fin, int rst);
void sh_end_closing(sh_node *nd, uint32_t peer);
uint64_t sh_ep_unsent(sh_ep *ep);
int64_t sh_write(sh_ep *ep, const void *data, uint64_t n);
int64_t sh_write_file(sh_ep *ep, int fd, uint64_t at, uint64_t n);
int64_t sh_write_socket(sh_ep *ep, int fd, uint64_t n);
int sh_wait_space(sh_ep *ep, int spin);
int64_t sh_available(sh_ep *ep);
int64_t sh_read(sh_ep *ep, void *to, uint32_t want);
int64_t sh_read_socket(sh_ep *ep, int fd, uint32_t want);
int64_t sh_read_wait(sh_ep *ep, void *to, uint32_t want, uint32_t min, int how);
int sh_poll(sh_ep *ep);
int sh_arm(sh_ep *ep);

/* what the own section has to give: slots, and ring memory */
void sh_limits(sh_node *nd, uint32_t first, uint32_t largest, uint32_t datagrams, uint32_t connects);
void sh_others(sh_node *nd, uint32_t others);
void sh_storage(sh_node *nd, int fd, int falloc);
uint64_t sh_storage_missing(const sh_node *nd);
int64_t sh_ep_new(sh_node *nd, uint32_t peer, int accepted, int datagrams);
uint32_t sh_free_slots(const sh_node *nd);
uint32_t sh_ring_fit(uint32_t most, uint64_t free_bytes, uint64_t reserved);
void sh_sweep(sh_node *nd);
sh_arena *sh_arena_of(sh_node *nd);
uint64_t sh_arena_bytes(uint64_t bytes);
sh_arena *sh_arena_new(void *memory, uint64_t offset, uint64_t bytes);
uint64_t sh_arena_free(const sh_arena *a);
uint64_t sh_arena_take(sh_arena *a, uint32_t *bytes);
void sh_arena_give(sh_arena *a, uint64_t offset, uint32_t bytes);

/* datagrams */
int sh_send(sh_ep *ep, uint32_t src_port, uint32_t dst_port, uint32_t entry, const void *data, uint32_t n);
int64_t sh_recv(sh_ep *ep, void *to, uint32_t *ports);
uint32_t sh_unread(sh_ep *ep);

/* heartbeat */
uint64_t sh_heartbeat_bytes(void);
int sh_heartbeat_start(sh_heartbeat *k, sh_node *nd, int event_fd, int lock_fd, uint64_t beat_ns, uint64_t cap_ns, int futexes);
int sh_heartbeat_arm(sh_heartbeat *k, int hurry);
int sh_heartbeat_heard(sh_heartbeat *k);
void sh_heartbeat_watch(sh_heartbeat *k, uint32_t peer, int locked);
uint64_t sh_heartbeat_unlocked(sh_heartbeat *k);
void sh_heartbeat_stop(sh_heartbeat *k, int join);
/* cdef-end */

#ifdef SHMSOCK_FAKE_MEMORY
/* cdef-fake-begin */
void sh_fake_reset(void);
void sh_fake_cpu(int cpu);
int sh_fake_pending(int cpu);
int sh_fake_drain(int cpu, int stores);
void sh_fake_hook(void (*hook)(void), int steps);
void sh_fake_time(uint64_t now_ns);
int sh_fake_yields(uint64_t ns);
void sh_fake_cut(int cpu);
void sh_fake_bury(int cpu);
void sh_fake_omit(const char *function);
int sh_fake_any_notified(sh_node *nd);
uint32_t sh_fake_rx_bytes(sh_ep *ep);
uint32_t sh_fake_asks(sh_node *nd, uint32_t peer, int which);
uint64_t sh_fake_share(sh_node *nd, uint32_t peer, int bytes);
/* cdef-fake-end */
#endif

#endif
