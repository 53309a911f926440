/* ring.h - the inline part of ring.c: what each read and write goes through. */
#ifndef SHMSOCK_RING_H
#define SHMSOCK_RING_H

#include "foreign.h"

#define SH_FLOW_BYTES 4096u /* reads of fewer bytes count as small pieces, which may gather (sh_gather) */

static inline void sh_publish(sh_ep *ep)
{
    sh_store(&ep->mine->tx_word, sh_tx_word(ep), ep->nd->wc); /* SYNC P: bytes before tail; partner: sh_refresh */
}

static inline uint32_t sh_space_of(const sh_ep *ep) { return ep->tx_bytes - (ep->tail - ep->head_seen); }

static inline int sh_writable(sh_ep *ep)
{
    uint64_t p;

    if (SH_UNLIKELY(!sh_may_write(ep->nd)))
        return SH_STALE;
    if (SH_UNLIKELY(!ep->theirs || ep->orphan || (ep->flags & (SH_FIN | SH_RST | SH_DONE))))
        return SH_CLOSED;
    /* The peer's P as it is now, and not as the last pass saw it: the next pass may be many writes away. */
    p = sh_peek(&ep->theirs->tx_word) ^ (uint64_t)ep->peer_gen << SH_GEN_SHIFT;
    if (SH_UNLIKELY(p & ((uint64_t)SH_GEN_MASK << SH_GEN_SHIFT | SH_DONE | SH_RST)))
        return SH_CLOSED;
    return 0;
}

/* Copy n bytes into the ring, `ahead` bytes behind the tail: nobody sees them yet. */
static inline void sh_stage(sh_ep *ep, uint32_t ahead, const void *data, uint32_t n)
{
    uint32_t at = (ep->tail + ahead) & (ep->tx_bytes - 1), first = ep->tx_bytes - at < n ? ep->tx_bytes - at : n;

    sh_copy_out(ep->tx + at, data, first);
    if (first < n)
        sh_copy_out(ep->tx, (const uint8_t *)data + first, n - first);
}

/* Publish the n bytes that were staged behind the tail, and tell the peer. */
static inline void sh_commit(sh_ep *ep, uint32_t n)
{
    ep->nd->moved_space += (ep->flags & SH_WANT) != 0;
    ep->tail += n;
    ep->one_way = ep->one_way > 0 ? -1 : ep->one_way > -SH_ONE_WAY ? ep->one_way - 1 : ep->one_way;
    ep->flags &= ~SH_WANT;
    sh_publish(ep);
    sh_notify_slot(ep->nd, ep->link, ep->peer_slot);
    if (ep->one_way == -SH_ONE_WAY) /* more is to come: the next fence need not wait for the next line */
        sh_prefetch_write(ep->tx + ((ep->tail + SH_LINE - 1) & (ep->tx_bytes - 1)));
}

/* Copy n bytes out of the peer's ring, from position `at` on. The peer may change them meanwhile: decide on the copy alone. */
static inline void sh_copy_ring(const sh_ep *ep, void *to, uint32_t at, uint32_t n)
{
    uint32_t first;

    at &= ep->rx_bytes - 1;
    first = ep->rx_bytes - at < n ? ep->rx_bytes - at : n;
    sh_copy_in(to, ep->rx + at, first);
    if (first < n)
        sh_copy_in((uint8_t *)to + first, ep->rx, n - first);
}

/* n bytes were copied out: give their space back to the peer. SH_RESET: the slot changed hands meanwhile, and the copy is worthless. */
static inline int sh_read_end(sh_ep *ep, uint32_t n)
{
    sh_node *nd = ep->nd;
    uint32_t old = ep->head, quarter = ep->rx_bytes / 4;

    if (SH_UNLIKELY(!sh_holds(nd))) /* a copy takes long, and so does getting the GIL back */
        return SH_STALE;
    sh_acquire(nd->wc);
    if (SH_UNLIKELY(!sh_same_life(ep)))
        return SH_RESET;
    ep->head += n;
    ep->one_way = n >= SH_FLOW_BYTES ? 0 : ep->one_way < 0 ? 1 : ep->one_way < SH_ONE_WAY ? ep->one_way + 1 : ep->one_way;
    ep->spun_ns = 0;
    sh_store(&ep->mine->rx_word, (uint64_t)ep->gen << SH_GEN_SHIFT | ep->head, nd->wc);
    sh_set_add(&nd->touched, ep->slot);
    nd->n[SH_N_READS]++;
    nd->n[SH_N_BYTES_IN] += n;
    if (SH_UNLIKELY((old ^ ep->head) & -quarter)) {
        sh_fence(nd->wc); /* SYNC W: head before the load of WANT; sh_arm and sh_rearm_touched do it where no quarter was crossed */
        if (!ep->orphan && sh_wants_space(ep))
            sh_notify_slot(nd, ep->link, ep->peer_slot);
    }
    return 0;
}

/* `to` takes what it wants of the n bytes behind a header; their space and the header's goes back to the peer. Returns how many it took; SH_SLOW: none,
 * and all is as before; or sh_read_end()'s status, and what was copied is worthless. */
static inline int64_t sh_take_out(sh_ep *ep, sh_taker *to, uint32_t header, uint32_t n)
{
    int taken = to->take(to, ep, ep->head + header, n), r = taken < 0 ? SH_SLOW : sh_read_end(ep, header + (uint32_t)taken);

    return SH_UNLIKELY(r) ? r : taken;
}

#endif
