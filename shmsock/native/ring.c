/* ring.c - the way of a byte: write -> ring -> P -> toggle, and poll -> ring -> C. One producer, one consumer, two sections.
 *
 * The rules' names (F1, R1, W) are those of LAYOUT.md, "Ordering". Each comment "SYNC X" has its partner of the same name. */
#include "ring.h"

/* ---- telling the peer ---- */

void sh_notify_slot(sh_node *nd, struct sh_link *l, uint32_t slot)
{
    uint32_t lane = (l->count + 1) % SH_LOG, at = lane % 4 * 16;
    uint64_t *t = &l->t[SH_WORD(slot)], *log = &l->log[lane / 4];

    sh_fence(nd->wc); /* SYNC F1: what was published, before the load of A; partner: R1, A before the load of P */
    if ((sh_load(&l->a_in[SH_WORD(slot)], nd->wc) ^ *t) & SH_BIT(slot)) {
        nd->n[SH_N_NOTIFIES_PENDING]++; /* the peer was notified and has not polled yet: it will see this, too */
        return;
    }
    *t ^= SH_BIT(slot);
    nd->n[SH_N_NOTIFIES]++;
    *log = (*log & ~(0xffffull << at)) | (uint64_t)slot << at;
    sh_put(&l->t_out[SH_WORD(slot)], *t);
    sh_store(&l->out->log[lane / 4], *log, 0); /* SYNC LOG: behind the notify_seq before; on a write-combining map F1's fence suffices; partner: sh_collect */
    sh_notify_peer(nd, l); /* SYNC NOTIFY: toggle and log before notify_seq; partner: sh_collect */
}

/* ---- producer ---- */

/* Take over the consumer's head. It may only grow, and never past what was written. */
int sh_see_head(sh_ep *ep)
{
    uint64_t c = sh_load(&ep->theirs->rx_word, ep->nd->wc);

    if (SH_GEN(c) != ep->peer_gen)
        return 0; /* another life of the slot: its P says what happened */
    if (SH_LOW(c) - ep->head_seen > ep->tail - ep->head_seen)
        return SH_VIOLATION;
    ep->link->moved += ep->head_seen != SH_LOW(c);
    ep->head_seen = SH_LOW(c);
    return 0;
}

/* Ask to be told of space. Returns the space that is found after asking. */
static int want_space(sh_ep *ep)
{
    int r;

    if (!(ep->flags & SH_WANT)) {
        ep->flags |= SH_WANT;
        sh_publish(ep);
    }
    sh_fence(ep->nd->wc); /* SYNC W: WANT before the load of head; partner: sh_read_end, head before the load of WANT */
    r = sh_see_head(ep);
    return r < 0 ? r : (int)sh_space_of(ep);
}

/* Find room for `need` bytes, at best for `wish`. Returns the space there is; 0: less than need (then WANT is set); or a status. */
int sh_room(sh_ep *ep, uint32_t need, uint64_t wish)
{
    int r;

    if (sh_space_of(ep) < wish && SH_UNLIKELY((r = sh_see_head(ep)) < 0))
        return r;
    if (sh_space_of(ep) >= need)
        return (int)sh_space_of(ep);
    r = want_space(ep);
    return r < 0 || (uint32_t)r >= need ? r : 0;
}

/* Publish FIN, DONE or RST. */
void sh_shut(sh_ep *ep, uint64_t flags)
{
    ep->flags = (ep->flags & ~SH_WANT) | flags;
    sh_publish(ep);
    sh_notify_slot(ep->nd, ep->link, ep->peer_slot);
}

/* Publish FIN: nothing more is written. */
void sh_ep_finish(sh_ep *ep)
{
    if (ep->theirs && sh_may_write(ep->nd))
        sh_shut(ep, SH_FIN);
}

/* Published bytes that the peer has not read; 0 when nobody will ever read them. */
uint64_t sh_ep_unsent(sh_ep *ep)
{
    if (!sh_may_write(ep->nd) || !ep->theirs || sh_refresh(ep) < 0 || (ep->tx_last & (SH_DONE | SH_RST)) || sh_see_head(ep) < 0)
        return 0;
    return ep->tail - ep->head_seen;
}

/* Find space for a writer that waits. Returns how many bytes are free; 0: none (WANT is set: suspend); or a status. */
int sh_wait_space(sh_ep *ep, int spin)
{
    int r = sh_writable(ep);

    if (r < 0)
        return r;
    if ((r = sh_see_head(ep)) < 0 || sh_space_of(ep))
        return r < 0 ? r : (int)sh_space_of(ep);
    if ((r = want_space(ep)) != 0)
        return r;
    if (spin) {
        uint64_t now = sh_clock();
        if (!sh_over_at(ep->nd, now)
            && sh_spin_on(ep, &ep->theirs->rx_word, (uint64_t)ep->peer_gen << SH_GEN_SHIFT | ep->head_seen, now) > 0) {
            if ((r = sh_see_head(ep)) < 0)
                return r;
            if (sh_space_of(ep))
                return (int)sh_space_of(ep);
        }
    }
    return 0;
}

/* ---- consumer ---- */

/* Read from the ring that this descriptor of the peer names; it must have at least so many bytes. 0, or SH_VIOLATION. */
int sh_ring_of(sh_ep *ep, uint64_t ring, uint32_t least)
{
    const sh_geometry *g = &ep->nd->g;
    uint64_t off = (ring & 0x3fffffff) * SH_MIN_RING;
    uint32_t log2_bytes = ring >> SH_LOG2_SHIFT & 63;

    if (1ull << (log2_bytes & 63) < SH_MIN_RING || log2_bytes > 30 || 1ull << log2_bytes < least || off < g->arena_off
        || off + (1ull << log2_bytes) > g->section_bytes)
        return SH_VIOLATION;
    ep->rx = sh_section_at(ep->nd->base, g, ep->peer) + off;
    ep->rx_bytes = 1u << log2_bytes;
    ep->rx_epoch = (uint8_t)SH_EPOCH(ring);
    return 0;
}

/* The peer's P names another epoch than before: read on in its larger ring. 0, SH_RESET or SH_VIOLATION. */
static int follow(sh_ep *ep, uint64_t p)
{
    uint32_t was = SH_EPOCH(ep->tx_last), now = (SH_EPOCH(p) - was) & 15;
    uint64_t ring;

    if (now <= ((ep->rx_epoch - was) & 15))
        return 0; /* the ring in use is of that epoch, or of a later one */
    ring = sh_load(&ep->theirs->ring, ep->nd->wc); /* SYNC G */
    if (SH_GEN(ring) != ep->peer_gen && !sh_same_life(ep))
        return SH_RESET;
    if (SH_GEN(ring) != ep->peer_gen || ((SH_EPOCH(ring) - was) & 15) < now || now > SH_EPOCH_LEAD
        || sh_ring_of(ep, ring, 2 * ep->rx_bytes) < 0)
        return SH_VIOLATION;
    ep->rx_grown = 1;
    return 0;
}

/* The peer's slot has another life: was it an opener that gave up before it had seen our ACCEPT? Such a peer wrote nothing, so this is a normal
 * end, unless the link itself has ended. */
static int gave_up(const sh_ep *ep)
{
    const struct sh_link *l = ep->link;

    return ep->accepted && !ep->orphan && (ep->tx_last & ~(SH_FIN | SH_DONE)) == (uint64_t)ep->peer_gen << SH_GEN_SHIFT
        && sh_inc_now(ep->nd, l) == l->peer_inc;
}

/* Take over the peer's P: copied once, checked, and only the copy is used. 0, SH_RESET or SH_VIOLATION. */
int sh_refresh(sh_ep *ep)
{
    uint64_t p = sh_load(&ep->theirs->tx_word, ep->nd->wc), ended; /* SYNC P */
    int r;

    if (p == ep->tx_last)
        return 0;
    if (SH_GEN(p) != ep->peer_gen) {
        if (!gave_up(ep))
            return SH_RESET;
        ep->tx_last |= SH_FIN | SH_DONE;
        ep->link->moved++;
        return 0;
    }
    if (SH_UNLIKELY((p ^ ep->tx_last) & SH_EPOCHS) && (r = follow(ep, p)) < 0)
        return r;
    if (SH_LOW(p) - ep->head > ep->rx_bytes || SH_LOW(p) - ep->head < ep->tail_seen - ep->head
        || ((ended = ep->tx_last & (SH_FIN | SH_DONE)) && ((p & ended) != ended || ((ended & SH_FIN) && SH_LOW(p) != ep->tail_seen))))
        return SH_VIOLATION;
    if (p & SH_RST)
        return SH_RESET;
    if (SH_LIKELY(SH_LOW(p) != ep->tail_seen) || ((p ^ ep->tx_last) & ~SH_IDLE_BITS))
        ep->link->moved++;
    ep->tx_last = p;
    ep->tail_seen = SH_LOW(p);
    return 0;
}

/* What an empty ring means. */
int sh_empty(const sh_ep *ep)
{
    return ep->tx_last & SH_FIN ? SH_EOF : ep->orphan || (ep->tx_last & SH_DONE) ? SH_RESET : SH_EMPTY;
}

int sh_take_plain(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n)
{
    sh_copy_ring(ep, ((struct sh_plain *)to)->to, at, n);
    return (int)n;
}

/* Poll this slot. Returns SH_POLL_* bits; MOVED: since the last poll bytes came, or space that is waited for. */
int sh_poll_at(sh_ep *ep, uint64_t now)
{
    uint32_t tail = ep->tail_seen, head = ep->head_seen;
    int bits = 0, r;

    if (!sh_may_write(ep->nd) || !ep->theirs)
        return 0;
    r = sh_refresh(ep);
    if (r < 0)
        return r == SH_RESET ? SH_POLL_RESET : SH_POLL_BAD;
    if ((ep->flags & SH_WANT) && sh_see_head(ep) < 0) /* else space matters to nobody, and the line of C stays with the peer */
        return SH_POLL_BAD;
    if (ep->tail_seen != ep->head)
        bits |= SH_POLL_DATA;
    if (ep->tx_last & SH_FIN)
        bits |= SH_POLL_FIN;
    if (ep->tx_last & SH_DONE)
        bits |= SH_POLL_DONE;
    if (sh_space_of(ep))
        bits |= SH_POLL_SPACE;
    if (tail != ep->tail_seen || head != ep->head_seen) {
        bits |= SH_POLL_MOVED;
        if (ep->waiting) { /* a longer spin would have caught this: let the window grow */
            uint64_t gap = now - ep->wait_since;
            if (gap < ep->nd->spin_max_ns && 2 * gap > ep->window_ns)
                ep->window_ns = 2 * gap;
        }
        ep->waiting = 0;
    }
    return bits;
}

int sh_poll(sh_ep *ep) { return sh_poll_at(ep, sh_clock()); }

/* Has a writer that waits for space been given some? Whoever acknowledges a toggle must check for space as well as for bytes. Space that is
 * known already counts: sh_see_head() may have been called by somebody who did not wake the writer. */
int sh_space_came(const sh_ep *ep)
{
    return (ep->flags & SH_WANT) && (sh_space_of(ep) || sh_head_moved(ep));
}

/* Acknowledge the slot's toggle before suspending: from here on the peer notifies. 1: something is there after all, read again. 0: suspend. */
int sh_arm(sh_ep *ep)
{
    sh_node *nd = ep->nd;
    int r;

    if (!sh_may_write(nd) || !ep->theirs)
        return 1;
    sh_set_remove(&nd->touched, ep->slot);
    sh_acknowledge(ep);
    sh_fence(nd->wc); /* SYNC R1, SYNC W */
    if (sh_space_came(ep))
        sh_set_add(&nd->ready, ep->slot); /* that is for the writer, not for this reader: the next pass tells it */
    r = sh_refresh(ep);
    if (r < 0 || ep->tail_seen != ep->head || (ep->tx_last & SH_FIN) || ep->orphan)
        return 1;
    if (ep->tx_last & SH_WANT)
        sh_notify_slot(nd, ep->link, ep->peer_slot);
    ep->waiting = 1;
    ep->wait_since = sh_clock();
    return 0;
}

/* At each pass: arm what was read since the last one. Slots with news are polled by the pass after this one, so that a reader that is
 * between two reads is not disturbed. */
void sh_rearm_touched(sh_node *nd)
{
    if (!sh_set_any(&nd->touched))
        return;
    SH_EACH(slot, &nd->touched)
        sh_acknowledge(&nd->eps[slot]);
    sh_fence(nd->wc); /* SYNC R1, SYNC W: one for all of them */
    SH_EACH(slot, &nd->touched) {
        sh_ep *ep = &nd->eps[slot];
        uint64_t p = sh_load(&ep->theirs->tx_word, nd->wc);

        /* FIN and DONE that a read took over are news to a reader that waits for the end, and to a writer */
        if (p != ep->tx_last || ep->tail_seen != ep->head || (p & (SH_FIN | SH_DONE)) || sh_space_came(ep))
            sh_set_add(&nd->later, ep->slot);
        if (!ep->orphan && SH_GEN(p) == ep->peer_gen && (p & SH_WANT))
            sh_notify_slot(nd, ep->link, ep->peer_slot);
        sh_set_remove(&nd->touched, ep->slot);
    }
}
