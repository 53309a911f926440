/* slots.c - what the own section has to give: slots, and rings for them. The books are private. Nobody takes all of it from the others: an eighth of the
 * slots, and an eighth of the arena, is for those who hold little. */
#include "node.h"

/* How much memory the books take: all zeros at first. */
uint64_t sh_books_bytes(const sh_geometry *g)
{
    return sizeof(struct sh_books) + 5 * sh_set_bytes(g->slots) + sizeof(uint16_t) * g->peers * g->slots + sh_set_bytes(g->section_bytes / SH_STORAGE + 1) + sh_arena_bytes(g->arena_bytes);
}

/* Nothing is in use. Returns what follows the books. */
void *sh_books_init(sh_node *nd, void *memory)
{
    struct sh_books *b = nd->books = memory;

    memory = sh_set_init(&b->free, b + 1, nd->g.slots);
    memory = sh_set_init(&b->outgrown, memory, nd->g.slots);
    memory = sh_set_init(&b->starved, memory, nd->g.slots);
    memory = sh_set_init(&b->later, memory, nd->g.slots);
    memory = sh_set_init(&b->closing, memory, nd->g.slots);
    memory = sh_set_init(&b->backed, memory, nd->g.section_bytes / SH_STORAGE + 1);
    b->arena = sh_arena_new(memory, nd->g.arena_off, nd->g.arena_bytes);
    memory = (uint8_t *)memory + sh_arena_bytes(nd->g.arena_bytes);
    b->by_theirs = memory;
    b->storage_fd = -1;
    b->most_asked = nd->g.messages / 2;
    nd->retry_ns = UINT64_MAX;
    b->first_ring = b->largest_ring = b->datagram_ring = SH_MIN_RING;
    return b->by_theirs + nd->g.peers * nd->g.slots;
}

/* Rings begin with `first` bytes, and grow up to `largest`; those of links for datagrams have `datagrams` at best. So many CONNECTs of a peer may lack an
 * answer. */
void sh_limits(sh_node *nd, uint32_t first, uint32_t largest, uint32_t datagrams, uint32_t connects)
{
    nd->books->most_asked = connects < nd->g.messages / 2 ? connects : nd->g.messages / 2; /* its answers, and ours to it, share the ring */
    nd->books->datagram_ring = datagrams;
    nd->books->first_ring = first < largest ? first : largest;
    nd->books->largest_ring = largest;
}

/* So many other peers are live: what is kept for those who hold little is for each of them, and for us. */
void sh_others(sh_node *nd, uint32_t others) { nd->books->others = others; }

uint32_t sh_free_slots(const sh_node *nd) { return nd->g.slots - nd->books->used; }
sh_arena *sh_arena_of(sh_node *nd) { return nd->books->arena; }

/* The endpoint of a slot that was taken; NULL: there is no such slot. What it needs is loaded when it is first asked for. */
sh_ep *sh_ep_at(sh_node *nd, uint32_t slot)
{
    sh_ep *ep = slot < nd->g.slots ? &nd->eps[slot] : NULL;

    if (ep && !ep->nd) {
        ep->slot = slot;
        ep->mine = (struct sh_slot *)(sh_section_at(nd->base, &nd->g, nd->self) + nd->g.slot_off) + slot;
        ep->gen = (SH_GEN(sh_peek(&ep->mine->tx_word)) + 1) & SH_GEN_MASK;
        ep->nd = nd;
    }
    return ep;
}

/* Does it hold its part of what is kept for those who hold little? Then it leaves that to them. */
static int holds_much(const struct sh_books *b, uint64_t held, uint64_t total) { return held * SH_KEPT_FOR_LITTLE * (b->others + 1) >= total; }

/* What one peer's connections hold: those that it opened, or our own. */
static struct sh_share *share_of(const sh_ep *ep) { return &ep->nd->books->share[ep->accepted ? ep->peer : ep->nd->self]; }

/* The size of ring to try: one of eight parts of what is left beyond what is reserved, at most `most`. */
uint32_t sh_ring_fit(uint32_t most, uint64_t free_bytes, uint64_t reserved)
{
    uint64_t part = free_bytes > reserved ? (free_bytes - reserved) / 8 : 0;

    return part >= most ? most : part < SH_MIN_RING ? SH_MIN_RING : (uint32_t)1 << (63 - __builtin_clzll(part));
}

/* The same for that endpoint. Each free slot keeps a claim to one smallest ring, so nobody who finds a slot lacks a ring. */
uint32_t sh_ring_size(const sh_ep *ep, uint32_t most)
{
    const struct sh_books *b = ep->nd->books;
    uint64_t bytes = ep->nd->g.arena_bytes, kept = holds_much(b, share_of(ep)->bytes, bytes) ? bytes / SH_KEPT_FOR_LITTLE : 0;

    return sh_ring_fit(most, b->arena->free_bytes, (uint64_t)sh_free_slots(ep->nd) * SH_MIN_RING + kept);
}

/* Take a ring of up to *bytes for the endpoint, with storage behind it. Returns its offset in the section, or SH_NO_ROOM or SH_NO_STORAGE. */
int64_t sh_ring_take(sh_ep *ep, uint32_t *bytes)
{
    sh_node *nd = ep->nd;
    uint64_t offset = sh_arena_take(nd->books->arena, bytes);

    if (!offset)
        return SH_NO_ROOM;
    if (sh_back(nd, offset, *bytes)) {
        sh_arena_give(nd->books->arena, offset, *bytes);
        return SH_NO_STORAGE;
    }
    share_of(ep)->bytes += *bytes;
    return (int64_t)offset;
}

void sh_ring_give(sh_ep *ep, uint64_t offset, uint32_t bytes)
{
    sh_arena_give(ep->nd->books->arena, offset, bytes);
    share_of(ep)->bytes -= bytes;
}

/* Give back the rings before the present one. */
void sh_ring_give_former(sh_ep *ep)
{
    for (; ep->outgrown; ep->outgrown--)
        sh_ring_give(ep, ep->former[ep->outgrown - 1] & ~(uint64_t)(SH_MIN_RING - 1), 1u << (ep->former[ep->outgrown - 1] & (SH_MIN_RING - 1)));
    sh_set_remove(&ep->nd->books->outgrown, ep->slot);
}

/* The lowest one; negative: there is none. */
static int64_t free_slot(const sh_node *nd)
{
    const struct sh_books *b = nd->books;
    int64_t slot = sh_set_next(&b->free, 0);

    return slot == SH_NOBODY && b->begun < nd->g.slots ? (int64_t)b->begun : slot;
}

/* Take a slot and a ring for a connection with that peer, which opens it (`accepted`), or is asked for it. Returns the slot; or SH_NO_SLOTS,
 * SH_NO_ROOM or SH_NO_STORAGE. One for datagrams carries them from its opener: the ring of the other side is of no use, so it is the smallest. */
int64_t sh_slot_take(sh_node *nd, uint32_t peer, int accepted, int datagrams)
{
    struct sh_books *b = nd->books;
    int64_t slot = free_slot(nd), ring;
    uint32_t bytes;
    sh_ep *ep;

    if (slot < 0 || (sh_free_slots(nd) <= nd->g.slots / SH_KEPT_FOR_LITTLE && holds_much(b, b->share[accepted ? peer : nd->self].slots, nd->g.slots)))
        return SH_NO_SLOTS;
    if (sh_back(nd, nd->g.slot_off + (uint64_t)slot * sizeof(struct sh_slot), sizeof(struct sh_slot)))
        return SH_NO_STORAGE;
    ep = sh_ep_at(nd, (uint32_t)slot);
    ep->peer = peer;
    ep->accepted = accepted != 0;
    b->used++; /* it uses its claim to a ring now */
    bytes = sh_ring_size(ep, datagrams ? accepted ? SH_MIN_RING : b->datagram_ring : b->first_ring);
    if ((ring = sh_ring_take(ep, &bytes)) < 0) {
        b->used--;
        return ring;
    }
    ep->ring_off = (uint64_t)ring;
    ep->tx = sh_section_at(nd->base, &nd->g, nd->self) + ring;
    ep->tx_bytes = bytes;
    ep->may_grow = !datagrams && bytes < b->largest_ring;
    share_of(ep)->slots++;
    if (slot == b->begun)
        b->begun++;
    else
        sh_set_remove(&b->free, (uint64_t)slot);
    return slot;
}

/* Take back the slot, and its rings. */
void sh_slot_give(sh_ep *ep)
{
    sh_node *nd = ep->nd;
    struct sh_books *b = nd->books;

    sh_ring_give_former(ep);
    sh_ring_give(ep, ep->ring_off, ep->tx_bytes);
    share_of(ep)->slots--;
    sh_set_remove(&b->starved, ep->slot);
    sh_set_add(&b->free, ep->slot);
    b->used--;
}
