/* grow.c - rings that grow while bytes are in them.
 *
 * The producer copies what the peer has not taken to the same positions of a larger ring, and goes on there. The old one stays as
 * it is until the peer has read behind that: then it knows the new one. A larger ring has all that is to be read, so it does not
 * matter if the peer finds a later descriptor in the slot than P speaks of. */
#include "ring.h"

/* Give the rings before this one back, once the peer has read behind them. */
static void collect(sh_ep *ep)
{
    if (ep->outgrown && ep->theirs && sh_may_write(ep->nd) && sh_see_head(ep) >= 0 && (int32_t)(ep->head_seen - ep->grown_at) > 0)
        sh_ring_give_former(ep);
}

/* Go on in that ring of the own section; P tells of it with the next bytes. */
static void move(sh_ep *ep, uint64_t ring_off, uint32_t ring_bytes)
{
    sh_node *nd = ep->nd;
    uint8_t *ring = sh_section_at(nd->base, &nd->g, nd->self) + ring_off, piece[SH_MIN_RING];

    sh_fence(nd->wc); /* on a write-combining map: what was written is read back */
    for (uint32_t at = ep->head_seen, n; at != ep->tail; at += n) {
        n = SH_MIN_RING - at % SH_MIN_RING;
        if (n > ep->tail - at)
            n = ep->tail - at;
        sh_copy_in(piece, ep->tx + (at & (ep->tx_bytes - 1)), n);
        sh_copy_out(ring + (at & (ring_bytes - 1)), piece, n);
    }
    ep->former[ep->outgrown++] = ep->ring_off | (uint64_t)__builtin_ctz(ep->tx_bytes);
    sh_set_add(&nd->books->outgrown, ep->slot);
    ep->tx = ring;
    ep->ring_off = ring_off;
    ep->tx_bytes = ring_bytes;
    ep->grown_at = ep->tail;
    ep->flags = (ep->flags & ~SH_EPOCHS) | ((ep->flags + SH_EPOCH_ONE) & SH_EPOCHS);
    /* SYNC G: the copy, then the descriptor, then P; partner: follow, P before the descriptor before the bytes */
    sh_store(&ep->mine->ring, sh_ring_word(ep), nd->wc);
}

/* Go on in a larger ring, before a write of `need` bytes that the present one has no room for: of sixteen times the size, or as large as they need, if the
 * settings and the free memory allow it. Else it goes on as it is, and does not ask again until there is more memory than now. (A full disk is no
 * error here: a small ring will do.) */
void sh_grow(sh_ep *ep, uint64_t need)
{
    struct sh_books *b = ep->nd->books;
    uint64_t wish = 16 * (uint64_t)ep->tx_bytes;
    uint32_t bytes;
    int64_t ring = -1;

    collect(ep);
    while (wish < ep->tx_bytes + need && wish < b->largest_ring)
        wish *= 2;
    bytes = sh_ring_size(ep, wish < b->largest_ring ? (uint32_t)wish : b->largest_ring);
    if (bytes > ep->tx_bytes && ep->outgrown < SH_EPOCH_LEAD && (ring = sh_ring_take(ep, &bytes)) > 0 && bytes <= ep->tx_bytes) {
        sh_ring_give(ep, (uint64_t)ring, bytes);
        ring = -1;
    }
    if (ring > 0) {
        move(ep, (uint64_t)ring, bytes);
        ep->may_grow = bytes < b->largest_ring;
        return;
    }
    ep->may_grow = 0;
    ep->starved_at = b->arena->free_bytes;
    sh_set_add(&b->starved, ep->slot);
}

/* Once a second: collect rings that no peer reads any more, and let those that found no larger one try again when there is more memory than then. */
void sh_sweep(sh_node *nd)
{
    struct sh_books *b = nd->books;

    SH_EACH(slot, &b->outgrown)
        collect(sh_ep_at(nd, (uint32_t)slot));
    SH_EACH(slot, &b->starved) {
        sh_ep *ep = sh_ep_at(nd, (uint32_t)slot);

        if (b->arena->free_bytes > ep->starved_at) {
            sh_set_remove(&b->starved, (uint64_t)slot);
            ep->may_grow = 1;
        }
    }
}

/* The ring in use, which = 0, or one before it: offset in the section | log2(bytes); 0: there is none. */
uint64_t sh_ep_ring(const sh_ep *ep, uint32_t which)
{
    if (which)
        return which <= ep->outgrown ? ep->former[which - 1] : 0;
    return ep->ring_off | (uint64_t)__builtin_ctz(ep->tx_bytes);
}
