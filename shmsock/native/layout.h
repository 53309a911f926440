/* layout.h - what lies where in a region. LAYOUT.md is the specification, this is its C form.
 *
 * Everything is little-endian and of fixed width. Each line (64 bytes) has one writer; offsets, never pointers, cross the
 * boundary. The structs here are never handed to cffi: C alone dereferences shared memory. */
#ifndef SHMSOCK_LAYOUT_H
#define SHMSOCK_LAYOUT_H

#include "core.h"

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the shared layout is little-endian"
#endif

struct sh_header {
    uint64_t magic;        /* published last */
    uint64_t version;      /* SH_VERSION */
    uint64_t region_id;    /* random:40 | 0:8 | log2(slots):8 | peers:8; compare-and-swapped from 0 */
    uint64_t region_bytes; /* the size all offsets were computed from */
    uint64_t features;     /* enum sh_feature, of the region: to be ignored by who does not know them */
    uint64_t to_link;      /* who does not know these may look only */
    uint64_t to_look;      /* nor that */
    uint64_t release;      /* the oldest that may attach:32 | of the formatter:32, see SH_RELEASE */
    uint8_t reserved[SH_PAGE - 64];
};

struct sh_section { /* first page of a section */
    uint64_t claim; /* nonce of the owner, 0 = nobody; beside the region id the only word that is compare-and-swapped */
    uint8_t pad0[56];
    uint64_t beat;  /* heartbeat: +1 for each tenth of a second */
    uint64_t pumps; /* heartbeat: copy of the owner's pump counter */
    uint64_t counts[SH_COUNTS]; /* heartbeat: copies of more of them, for people and tools only: see sh_shown() */
    uint64_t sleep_seq; /* grows at each change; odd: the owner sleeps: kick it; its bit 1 says by which word */
    uint8_t pad2[56];
    uint64_t incarnation; /* random, nonzero: one life of one owner */
    uint64_t state;       /* enum sh_state, stored last at attach */
    uint64_t listeners;   /* entries of listener[] in use, as an upper bound */
    uint64_t flags;       /* SH_FLAG_* */
    uint64_t slots_used;  /* one more than the highest slot that was ever used, by whomever */
    uint64_t features;    /* that the owner offers, if its release is not 0 */
    uint64_t to_link;     /* that it needs of those who link to it, */
    uint64_t to_look;     /* or look at more than its identity */
    uint8_t name[64]; /* NUL padded */
    uint8_t machine_id[16];
    uint8_t boot_id[16];
    uint64_t pid;
    uint64_t dev; /* st_dev and st_ino of what the owner mapped: where its lock is */
    uint64_t ino;
    uint64_t left; /* departures counted over the region: the smaller, the longer ago */
    uint64_t doorbell; /* id:32 | vectors:32 of the owner's ivshmem doorbell; 0: it has none */
    uint64_t release;  /* the oldest that may link:32 | the owner's:32; 0: it has no bits */
    uint64_t owner; /* claim word under which this identity was written */
    uint64_t published; /* half of the incarnation:32 | changes:24 | addresses that follow:8; SH_PUBLISHING: being written */
    uint8_t address[SH_ADDRESSES][16]; /* of the owner's machine, IPv4 as ::ffff:a.b.c.d */
    uint64_t listener[SH_LISTENERS]; /* port:16 | SH_LISTEN_* << 16 */
};

struct sh_pair { /* what i says to j: in section i, one for every j, i included */
    uint64_t notify_seq; /* pair_inc of i towards j : 32 | count : 32 */
    uint64_t kicked_for; /* the value of j's sleep_seq that i last kicked for */
    uint64_t log[SH_LOG / 4]; /* 16 bits for each of the last counts (modulo 16): the slot of j that was notified with it */
    uint64_t ended_nap;  /* the same as kicked_for, for a nap */
    uint8_t pad0[8];
    uint64_t outbox; /* adopted pair_inc of j : 32 | message tail : 32 */
    uint8_t pad1[56];
    uint64_t inbox; /* adopted pair_inc of j : 32 | message head : 32 */
    uint8_t pad2[56];
    uint64_t users; /* adopted pair_inc of j : 32 | connections that may still read j's rings : 32 */
    uint8_t pad3[56];
    /* then: toggle words T[slots/64], acknowledged words A[slots/64] (each rounded up to lines), messages[64] */
};

struct sh_slot {
    uint64_t link; /* generation:24 | peer section:8 | peer slot:16 | state:8 | 0:8; for people and tools only */
    uint64_t ring; /* of the largest so far: generation:24 | epoch:4 | log2(bytes):6 | (offset in section) / SH_MIN_RING : 30 */
    uint64_t ends; /* generation:24 | 0:7 | accepted:1 | own port:16 | peer's port:16, 0: datagrams; for people and tools only */
    uint8_t pad0[40];
    uint64_t tx_word; /* as producer: generation:24 | epoch:4 | WANT DONE RST FIN : 4 | tail:32 */
    uint8_t pad1[56];
    uint64_t rx_word; /* as consumer: generation:24 | 0:8 | head:32 */
    uint8_t pad2[56];
};

struct sh_record { /* in the ring of a datagram link, at any position: it may wrap. The bytes follow */
    uint32_t length;
    uint16_t src_port, dst_port;
};

struct sh_message {
    uint32_t src_inc; /* pair_inc of the sender towards the receiver */
    uint32_t dst_inc; /* adopted pair_inc of the receiver */
    uint32_t seq;     /* position in the message ring */
    uint8_t kind;     /* enum sh_kind */
    uint8_t reason;   /* REFUSE: enum sh_reason */
    uint16_t reserved0;
    uint16_t slot;     /* the sender's slot */
    uint16_t dst_slot; /* ACCEPT, REFUSE: the opener's slot */
    uint32_t gen;      /* generation of slot */
    uint32_t dst_gen;  /* generation of dst_slot */
    uint16_t port;     /* CONNECT: port asked for; 0: a ring for datagrams */
    uint16_t src_port; /* CONNECT: the opener's port */
    uint8_t reserved1[32];
};

#define SH_AT(type, field, offset) static_assert(offsetof(struct sh_##type, field) == SH_##offset, #offset)
#define SH_SIZE(type, size) static_assert(sizeof(struct sh_##type) == SH_##size, #size)
SH_AT(header, magic, HEADER_MAGIC);
SH_AT(header, version, HEADER_VERSION);
SH_AT(header, region_id, HEADER_REGION_ID);
SH_AT(header, region_bytes, HEADER_REGION_BYTES);
SH_AT(header, features, HEADER_FEATURES);
SH_AT(header, to_link, HEADER_TO_LINK);
SH_AT(header, to_look, HEADER_TO_LOOK);
SH_AT(header, release, HEADER_RELEASE);
SH_SIZE(header, HEADER_SIZE);
SH_AT(section, claim, SECTION_CLAIM);
SH_AT(section, beat, SECTION_BEAT);
SH_AT(section, pumps, SECTION_PUMPS);
SH_AT(section, counts, SECTION_COUNTS);
SH_AT(section, sleep_seq, SECTION_SLEEP_SEQ);
SH_AT(section, incarnation, SECTION_INCARNATION);
SH_AT(section, state, SECTION_STATE);
SH_AT(section, listeners, SECTION_LISTENERS);
SH_AT(section, flags, SECTION_FLAGS);
SH_AT(section, slots_used, SECTION_SLOTS_USED);
SH_AT(section, features, SECTION_FEATURES);
SH_AT(section, to_link, SECTION_TO_LINK);
SH_AT(section, to_look, SECTION_TO_LOOK);
SH_AT(section, name, SECTION_NAME);
SH_AT(section, machine_id, SECTION_MACHINE_ID);
SH_AT(section, boot_id, SECTION_BOOT_ID);
SH_AT(section, pid, SECTION_PID);
SH_AT(section, dev, SECTION_DEV);
SH_AT(section, ino, SECTION_INO);
SH_AT(section, left, SECTION_LEFT);
SH_AT(section, doorbell, SECTION_DOORBELL);
SH_AT(section, release, SECTION_RELEASE);
SH_AT(section, owner, SECTION_OWNER);
SH_AT(section, published, SECTION_PUBLISHED);
SH_AT(section, address, SECTION_ADDRESS);
SH_AT(section, listener, SECTION_LISTENER);
SH_SIZE(section, SECTION_SIZE);
SH_AT(pair, notify_seq, PAIR_NOTIFY_SEQ);
SH_AT(pair, kicked_for, PAIR_KICKED_FOR);
SH_AT(pair, log, PAIR_LOG);
SH_AT(pair, ended_nap, PAIR_ENDED_NAP);
SH_AT(pair, outbox, PAIR_OUTBOX);
SH_AT(pair, inbox, PAIR_INBOX);
SH_AT(pair, users, PAIR_USERS);
SH_SIZE(pair, PAIR_SIZE);
SH_AT(slot, link, SLOT_LINK);
SH_AT(slot, ring, SLOT_RING);
SH_AT(slot, ends, SLOT_ENDS);
SH_AT(slot, tx_word, SLOT_TX_WORD);
SH_AT(slot, rx_word, SLOT_RX_WORD);
SH_SIZE(slot, SLOT_SIZE);
static_assert(offsetof(struct sh_record, length) == 0, "record");
static_assert(offsetof(struct sh_record, src_port) == 4, "record");
static_assert(offsetof(struct sh_record, dst_port) == 6, "record");
SH_SIZE(record, RECORD_HEADER);
SH_AT(message, src_inc, MESSAGE_SRC_INC);
SH_AT(message, dst_inc, MESSAGE_DST_INC);
SH_AT(message, seq, MESSAGE_SEQ);
SH_AT(message, kind, MESSAGE_KIND);
SH_AT(message, reason, MESSAGE_REASON);
SH_AT(message, slot, MESSAGE_SLOT);
SH_AT(message, dst_slot, MESSAGE_DST_SLOT);
SH_AT(message, gen, MESSAGE_GEN);
SH_AT(message, dst_gen, MESSAGE_DST_GEN);
SH_AT(message, port, MESSAGE_PORT);
SH_AT(message, src_port, MESSAGE_SRC_PORT);
SH_SIZE(message, MESSAGE_SIZE);

/* P */
#define SH_FIN (1ull << SH_FIN_BIT)
#define SH_RST (1ull << SH_RST_BIT)
#define SH_DONE (1ull << SH_DONE_BIT)
#define SH_WANT (1ull << SH_WANT_BIT)
#define SH_GEN_MASK 0xffffffu
#define SH_GEN(w) ((uint32_t)((w) >> SH_GEN_SHIFT))
#define SH_EPOCH_ONE (1ull << SH_EPOCH_SHIFT)
#define SH_EPOCHS (15ull << SH_EPOCH_SHIFT)
#define SH_EPOCH(w) ((uint32_t)((w) >> SH_EPOCH_SHIFT) & 15u)
#define SH_LOW(w) ((uint32_t)(w))
#define SH_HIGH(w) ((uint32_t)((w) >> 32))
#define SH_PACK(high, low) ((uint64_t)(high) << 32 | (uint32_t)(low))

#endif
