/* datagram.c - datagrams are records in a ring: a header, then the bytes. A record is published whole or not at all, so every tail is the end of
 * one; all else is as with streams (ring.c). */
#include "ring.h"

static int is_bound(const sh_ep *ep, uint32_t index, uint32_t entry)
{
    const sh_node *nd = ep->nd;
    const struct sh_section *to = (const struct sh_section *)sh_section_at(nd->base, &nd->g, ep->peer);

    return index < SH_LISTENERS && sh_load(&to->listener[index], nd->wc) == entry;
}

/* Send one datagram, whole or not at all, to the peer's listener entry index << 8 | flags. 1: sent; 0: no room (WANT is set);
 * or a status. */
int sh_send(sh_ep *ep, uint32_t src_port, uint32_t dst_port, uint32_t entry, const void *data, uint32_t n)
{
    sh_node *nd = ep->nd;
    const struct sh_record h = {.length = n, .src_port = (uint16_t)src_port, .dst_port = (uint16_t)dst_port};
    int r = sh_writable(ep);

    if (SH_UNLIKELY(r < 0))
        return r;
    if (n > SH_DATAGRAM_MAX || !is_bound(ep, entry >> 8, (entry & 0xff) << 16 | h.dst_port))
        return SH_UNBOUND;
    if (SH_UNLIKELY((r = sh_room(ep, n + SH_RECORD_HEADER, n + SH_RECORD_HEADER)) <= 0))
        return r;
    sh_stage(ep, 0, &h, SH_RECORD_HEADER);
    sh_stage(ep, SH_RECORD_HEADER, data, n);
    sh_commit(ep, n + SH_RECORD_HEADER);
    nd->n[SH_N_WRITES]++;
    nd->n[SH_N_DATAGRAMS_OUT]++;
    nd->n[SH_N_BYTES_OUT] += n;
    return 1;
}

/* Copy n bytes out of the own ring, from a position on. */
static void get(const sh_ep *ep, uint32_t position, void *to, uint32_t n)
{
    uint32_t at = position & (ep->tx_bytes - 1), first = ep->tx_bytes - at < n ? ep->tx_bytes - at : n;

    sh_copy_in(to, ep->tx + at, first);
    if (first < n)
        sh_copy_in((uint8_t *)to + first, ep->tx, n - first);
}

/* Receive the next datagram. *ports (source << 16 | destination) is set before `to` takes its bytes. Returns how many these were (a datagram may have
 * none), or a status. The header is copied once and checked. */
int64_t sh_recv_step(sh_ep *ep, sh_taker *to, uint32_t *ports)
{
    int64_t found = sh_available(ep);
    uint32_t left = (uint32_t)found - SH_RECORD_HEADER;
    struct sh_record h;

    if (found < 0)
        return found;
    if (ep->rx_grown || (uint32_t)found < SH_RECORD_HEADER)
        return SH_VIOLATION;
    sh_copy_ring(ep, &h, ep->head, SH_RECORD_HEADER);
    if (h.length > SH_DATAGRAM_MAX || h.length > left) { /* nonsense, unless the ring changed hands under the copy */
        sh_acquire(ep->nd->wc);
        return sh_same_life(ep) ? SH_VIOLATION : SH_RESET;
    }
    *ports = (uint32_t)h.src_port << 16 | h.dst_port;
    found = sh_take_out(ep, to, SH_RECORD_HEADER, h.length);
    ep->nd->n[SH_N_DATAGRAMS_IN] += found >= 0;
    return found;
}

/* The same, into plain memory for SH_DATAGRAM_MAX bytes. */
int64_t sh_recv(sh_ep *ep, void *to, uint32_t *ports)
{
    struct sh_plain plain = {{sh_take_plain}, to};

    return sh_recv_step(ep, &plain.taker, ports);
}

/* Is the peer's slot of the same life? Another life does not tell how far its reader came. */
static int reads_on(const sh_ep *ep) { return SH_GEN(sh_load(&ep->theirs->rx_word, ep->nd->wc)) == ep->peer_gen; }

/* How many datagrams the peer has not received: they are counted as dropped when it is gone. Others can write this ring, too, so it is checked. */
uint32_t sh_unread(sh_ep *ep)
{
    uint32_t count = 0, left;
    struct sh_record h;

    if (!sh_may_write(ep->nd) || !ep->theirs || !reads_on(ep) || sh_see_head(ep) < 0)
        return 0;
    for (left = ep->tail - ep->head_seen; left >= SH_RECORD_HEADER; left -= h.length, count++) {
        get(ep, ep->tail - left, &h, SH_RECORD_HEADER);
        left -= SH_RECORD_HEADER;
        if (h.length > left)
            break;
    }
    return count;
}
