/* node.h - the private side of a node: shadows of all it published, and what it last saw of others. Never in shared memory. */
#ifndef SHMSOCK_NODE_H
#define SHMSOCK_NODE_H

#include "atomics.h"
#include "core.h"
#include "layout.h"
#include "set.h"

#include <pthread.h>

#define SH_LIKELY(x) __builtin_expect(!!(x), 1)
#define SH_UNLIKELY(x) __builtin_expect(!!(x), 0)

struct sh_link { /* towards one peer */
    struct sh_pair *out;       /* in my section: written by me */
    const struct sh_pair *in;  /* in the peer's section, about me: written by the peer */
    uint64_t *t_out, *a_out;   /* toggles of the peer's slots; what I acknowledged of my own slots */
    const uint64_t *t_in, *a_in;
    struct sh_message *m_out;
    const struct sh_message *m_in;
    uint32_t my_inc, peer_inc; /* peer_inc: adopted, 0 = none yet */
    uint32_t count;            /* low half of my notify_seq */
    uint64_t log[SH_LOG / 4];  /* as published */
    uint32_t msg_tail, msg_head;
    uint32_t asked;            /* CONNECTs that the peer has not answered: each gets exactly one answer */
    uint32_t mail_misses;      /* spins for a message, in a row, that were in vain */
    uint32_t msg_acked;        /* head as published: behind msg_head while what the last message asked for is being done */
    uint32_t users, users_tag; /* connections that may still read the peer's rings, and the tag under which they are published */
    uint64_t last;             /* the peer's notify_seq as the pump last saw it; the heartbeat reads it too, hence atomic */
    int news;                  /* SH_NEWS_*: what the pump has yet to report, or to act on */
    uint32_t offences;         /* violations that it has yet to report */
    int unread;                /* there are messages that were not acted on yet */
    uint64_t suspect;          /* notify_seq at a safety poll that found something; still the same at the next: healed */
    int suspected;
    uint64_t weighed_ns;       /* when sh_weigh() weighed last; since then: */
    uint32_t polls;            /* how often the peer's words made us poll something, */
    uint32_t moved;            /* and how often that had moved: bytes, space, an end, a message, a life */
    uint32_t weigh_at;         /* polls after which these are weighed next */
    int rate_limited;          /* a thousand polls within a second found too little: ignored until the next safety poll; atomic */
    const uint64_t *sleep_seq; /* the peer's word */
    uint64_t kicked;           /* the value of it that the peer was kicked for */
    int wake_out, kick_fd;     /* SH_WAKE_OUT_*, and the descriptor that a kick is written to */
    uint64_t kick_at;
    uint32_t kick_value;
    int stuck;                 /* a kick towards this peer blocked: it is not kicked any more; atomic */
    int wake_in;               /* SH_WAKE_IN_*; atomic */
    int there;                 /* a live or attaching peer has that section */
    int missed;                /* it kicked by doorbell and none arrived: it is polled until one does */
    uint64_t loss_sleep;       /* our sleep in which its notify_seq moved and no kick came; 0: none */
    uint64_t loss_ns, loss_received;
    int loss_kicked;            /* the peer did kick for that sleep */
    uint64_t *t, *a;            /* my toggles, and my acknowledgements, as published */
};

struct sh_ep {
    sh_node *nd;                  /* NULL: this slot was never used in this life of the node */
    struct sh_link *link;         /* to the peer, once that is known */
    struct sh_slot *mine;
    const struct sh_slot *theirs; /* NULL until open */
    uint8_t *tx;
    const uint8_t *rx;
    uint32_t tx_bytes, rx_bytes;  /* powers of two */
    uint32_t tail, head_seen;     /* producer */
    uint32_t head, tail_seen;     /* consumer */
    uint32_t grown_at;            /* tail when the own ring grew last */
    uint32_t gen, peer_gen;
    uint64_t flags;               /* epoch and FIN RST DONE WANT as published in P */
    uint64_t tx_last;             /* the peer's P as sh_refresh() last took it over */
    uint32_t peer, peer_slot, slot;
    uint8_t state;                /* SH_EP_* */
    uint8_t tries;                /* how often the peer's backlog was full */
    uint16_t port, src_port;      /* of the CONNECT that is to be sent */
    uint64_t life;                /* of the link, when it was opened: both sides' pair_inc */
    uint32_t next, prev;          /* in the queue of those: slot + 1, 0: none */
    uint64_t retry_ns;            /* when it is to be sent again */
    uint8_t orphan;               /* the peer is gone: what it published may still be read */
    uint8_t accepted;             /* the peer opened the connection */
    uint8_t closing;              /* its owner has let go of it, and the peer has not said DONE yet */
    uint8_t may_grow;             /* a write that does not fit tries a larger ring */
    uint64_t ring_off;            /* where the own ring lies in the section */
    uint8_t outgrown;             /* rings before this one, from which the peer may still read: */
    uint64_t former[SH_EPOCH_LEAD]; /* offset in the section | log2(bytes) */
    uint64_t starved_at;          /* bytes that were free when no larger ring was to be had */
    uint8_t rx_epoch, rx_grown;   /* epoch of the peer's ring; whether that has grown since the connection was opened */
    uint8_t waiting;              /* somebody is suspended on this slot since wait_since */
    uint64_t wait_since;
    uint64_t window_ns;           /* learnt busy-poll window */
    uint64_t spun_ns;             /* how much of the window was used in former turns of the loop, which ended before it did */
    uint32_t misses;              /* spins that found nothing */
    uint32_t patience;            /* a long spin is tried again after 16 << patience of these */
    int32_t one_way;              /* small reads in a row, with no write in between; negative: writes with no read; up to SH_ONE_WAY */
    uint64_t polled_ns;           /* when a read last polled P */
    uint64_t turn_end_ns;         /* turn in which something was last taken out of the ring, named by its end, */
    uint64_t since_ns;            /* and when the first of it was */
    uint32_t drains;              /* calls of drain() that had nothing to wait for */
};

/* of an endpoint: its CONNECT waits for a credit; for a while; for its answer; it is open; it was refused, and its owner is yet to release it */
enum sh_ep_state { SH_EP_FREE, SH_EP_WAITS, SH_EP_LATER, SH_EP_ASKED, SH_EP_OPEN, SH_EP_OVER };

struct sh_queue { /* what is to be sent to one peer, as soon as there is room */
    uint32_t first, last;         /* slots + 1: CONNECTs */
    uint32_t kept, first_kept;
    struct sh_message answer[SH_MAX_MESSAGES];
};

struct sh_listener { /* a port that is listened on (connect.c) */
    uint16_t port, next;          /* of the others of that port, in a circle */
    uint8_t serves, local;
    uint32_t backlog, pending;    /* accepted, and not taken yet */
};

#define SH_RING_SIZES 22 /* from SH_MIN_RING on */

struct sh_arena {
    uint64_t offset, bytes, free_bytes;
    int given;                    /* blocks were given back, and not put together yet */
    sh_set free[SH_RING_SIZES];   /* blocks of SH_MIN_RING << i bytes, numbered */
};

struct sh_books { /* what the own section has to give (slots.c) */
    sh_arena *arena;
    sh_set free;                  /* slots that were in use before */
    uint32_t begun, used;         /* slots that ever were; that are now */
    sh_set outgrown;              /* slots with rings before the present one */
    sh_set starved;               /* that found no larger one */
    sh_set closing;               /* that their owners have let go of */
    uint64_t next_closing;        /* the one to look at next when slots are wanted */
    uint32_t first_ring, largest_ring, datagram_ring, others;
    struct sh_share { uint32_t slots; uint64_t bytes; } share[SH_MAX_PEERS]; /* of what each peer opened; the own: of what we did */
    int storage_fd, storage_falloc;
    uint64_t storage_missing;
    uint32_t most_asked;          /* CONNECTs without an answer, of a peer */
    uint64_t here;                /* peers under this kernel */
    struct sh_queue asks[SH_MAX_PEERS];
    sh_set later;                 /* slots whose CONNECT met a full backlog */
    struct sh_listener listener[SH_LISTENERS];
    uint16_t port[65536];         /* index + 1 of the listener whose turn was last */
    uint16_t *by_theirs;          /* by peer and its slot: our slot that is open with it, if that says so, too */
    sh_set backed;                /* pieces of the section that have storage, of SH_STORAGE bytes */
};

struct sh_node {
    uint8_t *base;
    sh_geometry g;
    uint32_t self, words;
    uint32_t used;                /* slots below it may have been used by somebody: as published in slots_used */
    uint64_t *used_at;
    int wc;
    uintptr_t owner;              /* the one thread that may call */
    int inert;                    /* atomic: closed, forked, or not the owner any more */
    const uint64_t *claim_at;
    uint64_t claim, region_id;
    uint64_t turn_end_ns, hold_ns, spin_max_ns, spin_yield_ns;
    uint64_t ask_ns;              /* when to poll loop_fd next; 0: it was readable, and the turn is to end */
    int beaten;                   /* the heartbeat made its eventfd readable, hence loop_fd; atomic */
    int loop_fd;                  /* the loop's selector: readable when another of its descriptors is ready; negative: not known */
    uint64_t counted_ns;          /* the turn in which readers are counted, named by its end */
    uint32_t readers, sharers;    /* how many took something in it; and in the one before, by whom the budget is shared */
    uint64_t n[SH_N_COUNTERS];
    uint64_t moved_messages, moved_space; /* writes that went on where there had been no space */
    uint64_t due_ns;              /* when the engine wants a pass at the latest */
    uint64_t retry_ns;            /* when the next CONNECT is to be sent again */
    uint64_t hot_ns, hot_turns;   /* how long the pump stays hot after something moved: time, and passes in vain */
    uint64_t pumped_ns, hit_ns;   /* when the last pass was; and the last hit: a pass that found that something had moved */
    uint64_t hit_moved, gap_ns;   /* sh_moved() at hit_ns; time between the last two hits */
    uint64_t said, said_ahead;    /* how much this node had said when the last pass was over; and when it began */
    uint8_t own_last, own_next[2]; /* did this node itself speak last? How often it did next, lately, after peers had spoken, and after it had: 0 to 3 */
    uint64_t credit_ns, idle_turns; /* how long passes may still be in vain; how many were, since the last hit */
    int one_cpu;
    int alone;                    /* nobody else wanted this CPU when a spin last offered it */
    int quick;                    /* where it is not offered, a short spin was enough for the last wait */
    uint64_t vain_ns;             /* when a nap was in vain, or another of the loop's descriptors was ready, for the last time */
    uint64_t ready_ns;            /* when one was */
    uint64_t late_ns;             /* when it came back late, for the last time; atomic */
    uint64_t crowded_ns;          /* somebody did, and kept it for long: until then it is not offered again; atomic */
    int attention;                /* a notification spoke of a message or a new life: the pump must run */
    uint32_t start;               /* the peer that the next pass begins with, so that nobody is always last */
    uint64_t *sleep_seq_at;
    uint64_t sleep;               /* the sleep_seq word as published; the heartbeat reads it too, hence atomic */
    uint64_t known_peers;         /* peers that each pass polls; the others, strangers, every 16th one does; written by the owner alone; atomic */
    int strangers;                /* a stranger has moved its notify_seq, or may have: the next pass polls all; atomic */
    int losses;                   /* links with a suspected loss */
    uint64_t end_no_naps;         /* peers that are there, and kick otherwise than by a futex alone; atomic */
    uint64_t by_futex;            /* peers that wake us by a futex; atomic */
    int kick;                     /* wake the heartbeat before the loop sleeps: whom it watches has changed */
    int woke;                     /* slept since the last pump */
    uint64_t slept_received;      /* n[SH_N_RECEIVED] when it fell asleep */
    uint64_t must_poll;           /* peers that do not kick: the heartbeat polls them; atomic */
    uint64_t kicking;             /* count << 8 | peer whose eventfd is being written, 0: none; atomic */
    int unsticking;               /* the heartbeat is using that eventfd; atomic */
    uint64_t kick_count;
    void *(*let_go)(void);        /* releases the GIL if this thread holds it, and returns what take_back() needs; NULL: there is no Python */
    void (*take_back)(void *);
    uint64_t flood_ns;            /* when this second of counting spurious doorbells began */
    uint32_t flood;
    sh_set open;                  /* slots whose peers are there */
    sh_set ready;                 /* slots that the next pass polls */
    sh_set touched;               /* read since the last pump: their toggles are left unacknowledged until then */
    sh_set later;                 /* were touched: the next pass polls them, unless they were read again */
    uint64_t next_ready, next_safe; /* where the next pass, and the next safety poll, begins */
    struct sh_link *links;
    struct sh_ep *eps;
    struct sh_books *books;
};

#define SH_ONE_WAY 32 /* so many in a row: bytes flow one way */
#define SH_POLLS 1000u /* so many polls of a peer are weighed against what moved */

#define SH_NEWS_TAG 1  /* notify_seq carries another pair_inc than the adopted one */
#define SH_NEWS_MAIL 2 /* messages wait */
#define SH_NEWS_OFFENCE 4 /* it broke a rule */

#define SH_WORD(slot) ((slot) >> 6)

/* What the files offer each other; each uses only those above it (tests/test_house.py). What Python calls is in core.h. */

/* ---- memory.c ---- */
uint8_t *sh_section_at(const void *base, const sh_geometry *g, uint32_t section);
int sh_lock_fell(int fd, uint32_t section);
struct sh_pair *sh_pair_at(const void *base, const sh_geometry *g, uint32_t of, uint32_t towards);

/* ---- arena.c ---- */
int sh_back(sh_node *nd, uint64_t offset, uint64_t bytes);

/* ---- slots.c ---- */
uint64_t sh_books_bytes(const sh_geometry *g);
void *sh_books_init(sh_node *nd, void *memory);
uint32_t sh_ring_size(const sh_ep *ep, uint32_t most);
int64_t sh_ring_take(sh_ep *ep, uint32_t *bytes);
void sh_ring_give(sh_ep *ep, uint64_t offset, uint32_t bytes);
void sh_ring_give_former(sh_ep *ep);
int64_t sh_slot_take(sh_node *nd, uint32_t peer, int accepted, int datagrams);
void sh_slot_give(sh_ep *ep);

/* ---- wake.c ---- */
#define SH_ALL (~0ull)
void sh_notify_peer(sh_node *nd, struct sh_link *l);
void sh_wake_up(sh_node *nd);
void sh_unstick(sh_node *nd, uint64_t *seen);
void sh_suspect_loss(sh_node *nd, struct sh_link *l, uint64_t now);
int sh_any_notified(const sh_node *nd, uint64_t of);
uint64_t sh_drain(int fd);
void sh_know_peer(sh_node *nd, uint32_t peer, int known);
struct sh_waiter { /* as in linux/futex.h since 5.16, which may be newer than the headers here */
    uint64_t val, uaddr;
    uint32_t flags, reserved;
};
#define SH_WAIT_32 2u
#define SH_SLEEPS 1 /* in sleep_seq; alone: it naps */
#define SH_SLEEPS_LONG 2
long sh_wait_for_any(const struct sh_waiter *w, uint32_t n, uint64_t until);
int sh_nap(sh_node *nd, uint64_t until);

/* ---- link.c ---- */
int sh_collect(sh_node *nd, struct sh_link *l);
int sh_collect_all(sh_node *nd, struct sh_link *l);
int sh_acknowledge(sh_ep *ep);
void sh_weigh(sh_node *nd, struct sh_link *l);
void sh_rate_limit(sh_node *nd, struct sh_link *l);

/* ---- budget.c ---- */
int sh_asked(sh_node *nd, uint64_t now);

/* ---- spin.c ---- */
int sh_spin_on(sh_ep *ep, const uint64_t *word, uint64_t seen, uint64_t now);
int sh_spin_for_mail(sh_node *nd, uint32_t peer);
uint64_t sh_gather(sh_ep *ep, uint64_t now);
uint64_t sh_clock_and_yield(sh_node *nd, uint64_t *yield_at, uint64_t end);
int sh_is_crowded(const sh_node *nd, uint64_t now);
uint64_t sh_offer(sh_node *nd, uint64_t now);
#define SH_NAP_MAX_NS 4000000u /* longer than a slice of the hog */
uint64_t sh_nap_ns(const sh_node *nd, uint64_t now);
uint64_t sh_yield_at(sh_node *nd, uint64_t now);

/* ---- ring.c; more in ring.h ---- */
void sh_notify_slot(sh_node *nd, struct sh_link *l, uint32_t slot);
void sh_shut(sh_ep *ep, uint64_t flags);
int sh_refresh(sh_ep *ep);
int sh_ring_of(sh_ep *ep, uint64_t ring, uint32_t least);
/* Takes bytes out of a ring: copies what it wants of the n bytes from position `at` on (sh_copy_ring), and returns how many these are; negative:
 * none, and they stay in the ring. */
typedef struct sh_taker {
    int (*take)(struct sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n);
} sh_taker;
struct sh_plain { sh_taker taker; void *to; }; /* copies all of them into plain memory */
int sh_take_plain(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n);
int sh_empty(const sh_ep *ep);
int sh_see_head(sh_ep *ep);
int sh_room(sh_ep *ep, uint32_t need, uint64_t wish);
int sh_space_came(const sh_ep *ep);
void sh_rearm_touched(sh_node *nd);
int sh_poll_at(sh_ep *ep, uint64_t now);

/* ---- handshake.c ---- */
int sh_post(sh_node *nd, uint32_t peer, struct sh_message m);
int sh_message_recv(sh_node *nd, uint32_t peer, struct sh_message *m);
void sh_message_done(sh_node *nd, uint32_t peer);
void sh_ask_queue(sh_ep *ep);
void sh_ask_dequeue(sh_ep *ep);
void sh_ep_closing(sh_ep *ep, int bits);
int sh_release_closing(sh_node *nd);

/* ---- connect.c ---- */
void sh_ask_again(sh_node *nd, uint64_t now);

/* ---- grow.c ---- */
void sh_grow(sh_ep *ep, uint64_t need);

/* ---- stream.c ---- */
int64_t sh_read_some(sh_ep *ep, sh_taker *to, uint32_t want);
int64_t sh_read_step(sh_ep *ep, sh_taker *to, uint32_t want, uint32_t min, int how);
int sh_drain_step(sh_ep *ep, int quick);

/* ---- datagram.c ---- */
int64_t sh_recv_step(sh_ep *ep, sh_taker *to, uint32_t *ports);

/* ---- what is inline ---- */

/* Bracket a call that may block: sh_let_go() releases the GIL if this thread holds it, sh_take_back() takes it again. */
static inline void *sh_let_go(const sh_node *nd) { return nd->let_go ? nd->let_go() : NULL; }
static inline void sh_take_back(const sh_node *nd, void *held)
{
    if (held)
        nd->take_back(held);
}

/* Where is noted which slot of ours is open with that one of the peer? */
static inline uint16_t *sh_by_theirs(const sh_node *nd, uint32_t peer, uint32_t theirs) { return &nd->books->by_theirs[peer * nd->g.slots + theirs]; }

static inline uint64_t sh_tx_word(const sh_ep *ep)
{
    return (uint64_t)ep->gen << SH_GEN_SHIFT | ep->flags | ep->tail;
}

/* The descriptor of the own ring. */
static inline uint64_t sh_ring_word(const sh_ep *ep)
{
    return (uint64_t)ep->gen << SH_GEN_SHIFT | (ep->flags & SH_EPOCHS) | (uint64_t)__builtin_ctz(ep->tx_bytes) << SH_LOG2_SHIFT | ep->ring_off / SH_MIN_RING;
}

/* Changes of these alone are no news: spins ignore them, so that no peer can end a spin with them. */
#define SH_IDLE_BITS (SH_WANT | SH_EPOCHS)

/* Count polls that this peer's words cause. What moved because of the former ones has been counted by now. */
static inline void sh_caused(sh_node *nd, struct sh_link *l, uint32_t polls)
{
    if (SH_UNLIKELY(l->polls >= l->weigh_at))
        sh_weigh(nd, l);
    l->polls += polls;
}

/* Prefetch the next bytes while polling P, so that they arrive with the word that tells of them, and not after it. */
static inline void sh_prefetch_bytes(const sh_ep *ep)
{
    sh_prefetch(ep->rx + (ep->head & (ep->rx_bytes - 1)));
    sh_prefetch(ep->rx + ((ep->head + SH_LINE) & (ep->rx_bytes - 1)));
}

/* pthread_self() without a call. */
static inline uintptr_t sh_thread(void)
{
#ifdef __has_builtin
#if __has_builtin(__builtin_thread_pointer)
    return (uintptr_t)__builtin_thread_pointer();
#endif
#endif
    return (uintptr_t)pthread_self();
}

/* Is the section still this node's? A zombie (stopped for long, its section claimed by another) is found out here. */
static inline int sh_holds(const sh_node *nd)
{
    return SH_LIKELY(!__atomic_load_n(&nd->inert, __ATOMIC_RELAXED)) && SH_LIKELY(sh_peek(nd->claim_at) == nd->claim);
}

/* Do bytes come one way, in small pieces, and are too few of them known to be there? */
static inline int sh_one_way(const sh_ep *ep, uint32_t least)
{
    return ep->one_way == SH_ONE_WAY && ep->tail_seen - ep->head < least && ep->nd->spin_max_ns;
}

/* Atomic, as the heartbeat may rate-limit a peer as well. */
static inline int sh_rate_limited(const struct sh_link *l) { return __atomic_load_n(&l->rate_limited, __ATOMIC_ACQUIRE); }

/* Is it time to let the loop turn? */
static inline int sh_over_at(sh_node *nd, uint64_t now) { return SH_UNLIKELY(now >= nd->ask_ns) && sh_asked(nd, now); }

/* Count this slot among those that took something in this turn. 1: it is the first time. */
static inline int sh_takes_part(sh_ep *ep)
{
    sh_node *nd = ep->nd;

    if (nd->counted_ns != nd->turn_end_ns) {
        nd->counted_ns = nd->turn_end_ns;
        nd->sharers = nd->readers;
        nd->readers = 0;
    }
    if (ep->turn_end_ns == nd->turn_end_ns)
        return 0;
    ep->turn_end_ns = nd->turn_end_ns;
    nd->readers++;
    return 1;
}

/* Has this slot used its share of the turn's budget? As many share it as took part in the last turn: reads are so quick that the first
 * reader would leave the others nothing. */
static inline int sh_share_is_used(sh_ep *ep, uint64_t now)
{
    sh_node *nd = ep->nd;

    if (sh_takes_part(ep))
        ep->since_ns = now;
    return SH_UNLIKELY(nd->sharers > 1) && (now - ep->since_ns) * nd->sharers > nd->hold_ns;
}

/* May this call write the section, and read the region? Another thread may not; and when the node was closed the region is not mapped any more.
 * So all that Python may call asks this before it touches anything. */
static inline int sh_may_write(const sh_node *nd)
{
    return SH_LIKELY(sh_thread() == nd->owner) && sh_holds(nd);
}

#endif
