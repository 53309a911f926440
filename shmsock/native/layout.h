/* layout.h - what lies where in a region. LAYOUT.md is the specification, this is its C form.
 *
 * Everything is little-endian and of fixed width. Each line (64 bytes) has one writer; offsets, never pointers, cross the
 * boundary. The structs here are never handed to cffi: C alone dereferences shared memory. */
#ifndef SHMSOCK_LAYOUT_H
#define SHMSOCK_LAYOUT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the shared layout is little-endian"
#endif

#define SH_MAGIC 0x314b434f534d4853ull /* the bytes "SHMSOCK1" */
#define SH_VERSION 4u
#define SH_LINE 64u
#define SH_PAGE 4096u
#define SH_MAX_PEERS 64u
#define SH_MIN_SLOTS 16u
#define SH_MAX_SLOTS 2048u
#define SH_MAX_WORDS (SH_MAX_SLOTS / 64u)
#define SH_MESSAGES 64u
#define SH_LISTENERS 448u
#define SH_MIN_RING 4096u
#define SH_MAX_RING (1u << 30)
#define SH_RECORD_HEADER 8u
#define SH_DATAGRAM_MAX 65507u /* as UDP over IPv4 */

struct sh_header {
    uint64_t magic;        /* published last */
    uint64_t version;      /* SH_VERSION */
    uint64_t region_id;    /* random:40 | 0:8 | log2(slots):8 | peers:8; compare-and-swapped from 0 */
    uint64_t region_bytes; /* the size all offsets were computed from */
    uint8_t reserved[SH_PAGE - 32];
};

struct sh_section { /* first page of a section */
    uint64_t claim; /* nonce of the owner, 0 = nobody; beside the region id the only word that is compare-and-swapped */
    uint8_t pad0[56];
    uint64_t beat;  /* heartbeat: +1 for each tenth of a second */
    uint64_t pumps; /* heartbeat: copy of the owner's pump counter */
    uint8_t pad1[48];
    uint64_t sleep_seq; /* +1 at each change; odd: the owner's loop sleeps: kick it */
    uint8_t pad2[56];
    uint64_t incarnation; /* random, nonzero: one life of one owner */
    uint64_t state;       /* enum sh_state, stored last at attach */
    uint64_t listeners;   /* entries of listener[] in use, as an upper bound */
    uint64_t flags;       /* SH_FLAG_* */
    uint8_t pad3[32];
    uint8_t name[64]; /* NUL padded */
    uint8_t machine_id[16];
    uint8_t boot_id[16];
    uint64_t pid;
    uint64_t dev; /* st_dev and st_ino of what the owner mapped: where its lock is */
    uint64_t ino;
    uint64_t left; /* departures counted over the region: the smaller, the longer ago */
    uint64_t doorbell; /* id:32 | vectors:32 of the owner's ivshmem doorbell; 0: it has none */
    uint64_t reserved1;
    uint64_t owner; /* claim word under which this identity was written */
    uint8_t pad4[104];
    uint64_t listener[SH_LISTENERS]; /* port:16 | SH_LISTEN_* << 16 */
};

struct sh_pair { /* what i says to j: in section i, one for every j, i included */
    uint64_t notify_seq; /* pair_inc of i towards j : 32 | count : 32 */
    uint64_t kicked_for; /* the value of j's sleep_seq that i last kicked for */
    uint8_t pad0[48];
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
    uint64_t ring; /* of the largest so far: generation:24 | epoch:4 | log2(bytes):6 | (offset in section) / 4096 : 30 */
    uint8_t pad0[48];
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

#define SH_ASSERT(what) static_assert(what, #what)
#define SH_AT(type, field, offset) SH_ASSERT(offsetof(struct type, field) == (offset))
SH_AT(sh_header, magic, 0);
SH_AT(sh_header, version, 8);
SH_AT(sh_header, region_id, 16);
SH_AT(sh_header, region_bytes, 24);
SH_ASSERT(sizeof(struct sh_header) == SH_PAGE);
SH_AT(sh_section, claim, 0x000);
SH_AT(sh_section, beat, 0x040);
SH_AT(sh_section, pumps, 0x048);
SH_AT(sh_section, sleep_seq, 0x080);
SH_AT(sh_section, incarnation, 0x0c0);
SH_AT(sh_section, state, 0x0c8);
SH_AT(sh_section, listeners, 0x0d0);
SH_AT(sh_section, flags, 0x0d8);
SH_AT(sh_section, name, 0x100);
SH_AT(sh_section, machine_id, 0x140);
SH_AT(sh_section, boot_id, 0x150);
SH_AT(sh_section, pid, 0x160);
SH_AT(sh_section, dev, 0x168);
SH_AT(sh_section, ino, 0x170);
SH_AT(sh_section, left, 0x178);
SH_AT(sh_section, doorbell, 0x180);
SH_AT(sh_section, owner, 0x190);
SH_AT(sh_section, listener, 0x200);
SH_ASSERT(sizeof(struct sh_section) == SH_PAGE);
SH_AT(sh_pair, notify_seq, 0x00);
SH_AT(sh_pair, kicked_for, 0x08);
SH_AT(sh_pair, outbox, 0x40);
SH_AT(sh_pair, inbox, 0x80);
SH_AT(sh_pair, users, 0xc0);
SH_ASSERT(sizeof(struct sh_pair) == 0x100);
SH_AT(sh_slot, link, 0x00);
SH_AT(sh_slot, ring, 0x08);
SH_AT(sh_slot, tx_word, 0x40);
SH_AT(sh_slot, rx_word, 0x80);
SH_ASSERT(sizeof(struct sh_slot) == 192);
SH_AT(sh_record, length, 0);
SH_AT(sh_record, src_port, 4);
SH_AT(sh_record, dst_port, 6);
SH_ASSERT(sizeof(struct sh_record) == SH_RECORD_HEADER);
SH_AT(sh_message, src_inc, 0);
SH_AT(sh_message, dst_inc, 4);
SH_AT(sh_message, seq, 8);
SH_AT(sh_message, kind, 12);
SH_AT(sh_message, reason, 13);
SH_AT(sh_message, slot, 16);
SH_AT(sh_message, dst_slot, 18);
SH_AT(sh_message, gen, 20);
SH_AT(sh_message, dst_gen, 24);
SH_AT(sh_message, port, 28);
SH_AT(sh_message, src_port, 30);
SH_ASSERT(sizeof(struct sh_message) == SH_LINE);

/* P */
#define SH_FIN (1ull << 32)
#define SH_RST (1ull << 33)
#define SH_DONE (1ull << 34)
#define SH_WANT (1ull << 35)
#define SH_GEN_SHIFT 40
#define SH_GEN_MASK 0xffffffu
#define SH_GEN(w) ((uint32_t)((w) >> SH_GEN_SHIFT))
#define SH_EPOCH_ONE (1ull << 36)
#define SH_EPOCHS (15ull << 36)
#define SH_EPOCH_LEAD 7u /* by so much it may be ahead of what the reader knows, modulo 16 */
#define SH_EPOCH(w) ((uint32_t)((w) >> 36) & 15u)
#define SH_LOW(w) ((uint32_t)(w))
#define SH_HIGH(w) ((uint32_t)((w) >> 32))
#define SH_PACK(high, low) ((uint64_t)(high) << 32 | (uint32_t)(low))

#endif
