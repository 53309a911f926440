/* grow.c - rings that grow while bytes are in them. Storage is Python's business (engine/slots.py).
 *
 * The producer copies what the peer has not taken to the same positions of a larger ring, and goes on there. The old one stays as
 * it is until the peer has read behind that: then it knows the new one. A larger ring has all that is to be read, so it does not
 * matter if the peer finds a later descriptor in the slot than P speaks of. */
#include "ring.h"

/* May a write that does not fit ask for a larger ring (SH_GROW)? Else it fills the room there is. */
void sh_ep_may_grow(sh_ep *ep, int may) { ep->may_grow = may != 0; }

/* May the rings before this one be used for something else? */
int sh_ep_outgrown(sh_ep *ep)
{
    if (!ep->theirs || !sh_may_write(ep->nd) || sh_see_head(ep) < 0 || (int32_t)(ep->head_seen - ep->grown_at) <= 0)
        return 0;
    ep->outgrown = 0;
    return 1;
}

/* Go on in a larger ring, at that offset of the own section; P tells of it with the next bytes. 1: done; 0: not now; or a status. */
int sh_ep_grow(sh_ep *ep, uint64_t ring_off, uint32_t ring_bytes)
{
    sh_node *nd = ep->nd;
    uint8_t *ring = sh_section_at(nd->base, &nd->g, nd->self) + ring_off, piece[SH_MIN_RING];
    int r = sh_writable(ep);

    if (r < 0 || (r = sh_see_head(ep)) < 0)
        return r;
    if (ring_bytes <= ep->tx_bytes || ep->outgrown == SH_EPOCH_LEAD)
        return 0;
    sh_fence(nd->wc); /* on a write-combining map: what was written is read back */
    for (uint32_t at = ep->head_seen, n; at != ep->tail; at += n) {
        n = SH_MIN_RING - at % SH_MIN_RING;
        if (n > ep->tail - at)
            n = ep->tail - at;
        sh_copy_in(piece, ep->tx + (at & (ep->tx_bytes - 1)), n);
        sh_copy_out(ring + (at & (ring_bytes - 1)), piece, n);
    }
    ep->tx = ring;
    ep->tx_bytes = ring_bytes;
    ep->grown_at = ep->tail;
    ep->outgrown++;
    ep->flags = (ep->flags & ~SH_EPOCHS) | ((ep->flags + SH_EPOCH_ONE) & SH_EPOCHS);
    /* SYNC G: the copy, then the descriptor, then P; partner: follow, P before the descriptor before the bytes */
    sh_store(&ep->mine->ring, sh_ring_word(ep, ring_off), nd->wc);
    return 1;
}
