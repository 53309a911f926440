/* ring.c - the way of a byte: write -> ring -> P -> toggle, and look -> ring -> C. One producer, one consumer, two sections.
 *
 * The rules' names (F1, R1, W) are those of LAYOUT.md, "Ordering". Each comment "SYNC X" has its partner of the same name. */
#include "node.h"

#define FLOW_BYTES 4096u    /* smaller pieces than these may gather */

/* ---- telling the peer ---- */

void sh_notify_slot(sh_node *nd, uint32_t peer, uint32_t slot)
{
    struct sh_link *l = &nd->links[peer];
    uint64_t *t = &l->t[SH_WORD(slot)];

    sh_fence(nd->wc); /* SYNC F1: what was published, before the look at A; partner: R1, A before the look at P */
    if ((sh_load(&l->a_in[SH_WORD(slot)], nd->wc) ^ *t) & SH_BIT(slot)) {
        nd->n[SH_N_NOTIFIES_PENDING]++; /* the peer was told and has not looked yet: it will see this too */
        return;
    }
    *t ^= SH_BIT(slot);
    nd->n[SH_N_NOTIFIES]++;
    sh_put(&l->t_out[SH_WORD(slot)], *t);
    sh_notify_peer(nd, l); /* SYNC NOTIFY: toggle before notify_seq; partner: sh_collect */
}

static void publish(sh_ep *ep)
{
    sh_store(&ep->mine->tx_word, sh_tx_word(ep), ep->nd->wc); /* SYNC P: bytes before tail; partner: sh_refresh */
}

/* ---- producer ---- */

/* Take over the consumer's head. It may only grow, and never past what was written. */
int sh_see_head(sh_ep *ep)
{
    uint64_t c = sh_load(&ep->theirs->rx_word, ep->nd->wc);

    if (SH_GEN(c) != ep->peer_gen)
        return 0; /* its P says what happened */
    if (SH_LOW(c) - ep->head_seen > ep->tail - ep->head_seen)
        return SH_VIOLATION;
    ep->moved += ep->head_seen != SH_LOW(c);
    ep->head_seen = SH_LOW(c);
    return 0;
}

static uint32_t space_of(const sh_ep *ep) { return ep->tx_bytes - (ep->tail - ep->head_seen); }

int sh_writable(sh_ep *ep)
{
    uint64_t p;

    if (SH_UNLIKELY(!sh_may_write(ep->nd)))
        return SH_STALE;
    if (SH_UNLIKELY(!ep->theirs || ep->orphan || (ep->flags & (SH_FIN | SH_RST | SH_DONE))))
        return SH_CLOSED;
    /* Its last word, and not what a pass has seen of it: the next pass may be many writes away. */
    p = sh_peek(&ep->theirs->tx_word) ^ (uint64_t)ep->peer_gen << SH_GEN_SHIFT;
    if (SH_UNLIKELY(p & ((uint64_t)SH_GEN_MASK << SH_GEN_SHIFT | SH_DONE | SH_RST)))
        return SH_CLOSED;
    return 0;
}

/* Ask to be told of space, or of more. Returns the space found after asking. */
static int want_space(sh_ep *ep)
{
    int r;

    if (!(ep->flags & SH_WANT)) {
        ep->flags |= SH_WANT;
        publish(ep);
    }
    sh_fence(ep->nd->wc); /* SYNC W: WANT before the look at head; partner: sh_read_end, head before the look at WANT */
    r = sh_see_head(ep);
    return r < 0 ? r : (int)space_of(ep);
}

/* Room for `need` bytes, at best for `wish`: the space there is, 0 when it is less than need (WANT is set then), or a status. */
int sh_room(sh_ep *ep, uint32_t need, uint64_t wish)
{
    int r;

    if (space_of(ep) < wish && SH_UNLIKELY((r = sh_see_head(ep)) < 0))
        return r;
    if (space_of(ep) >= need)
        return (int)space_of(ep);
    r = want_space(ep);
    return r < 0 || (uint32_t)r >= need ? r : 0;
}

/* n bytes into the ring, `ahead` of the tail. */
void sh_stage(sh_ep *ep, uint32_t ahead, const void *data, uint32_t n)
{
    uint32_t at = (ep->tail + ahead) & (ep->tx_bytes - 1), first = ep->tx_bytes - at < n ? ep->tx_bytes - at : n;

    sh_copy_out(ep->tx + at, data, first);
    if (first < n)
        sh_copy_out(ep->tx, (const uint8_t *)data + first, n - first);
}

/* The peer may have the n bytes that were put behind the tail. */
void sh_commit(sh_ep *ep, uint32_t n)
{
    ep->nd->moved_space += (ep->flags & SH_WANT) != 0;
    ep->tail += n;
    ep->one_way = ep->one_way > 0 ? -1 : ep->one_way > -SH_ONE_WAY ? ep->one_way - 1 : ep->one_way;
    ep->flags &= ~SH_WANT;
    publish(ep);
    sh_notify_slot(ep->nd, ep->peer, ep->peer_slot);
    if (ep->one_way == -SH_ONE_WAY) /* more is to come: the next fence need not wait for the next line */
        sh_prefetch_write(ep->tx + ((ep->tail + SH_LINE - 1) & (ep->tx_bytes - 1)));
}

/* Put up to n bytes into the ring. Returns how many went in, fewer only when the ring is full (WANT is set then). */
int64_t sh_write_some(sh_ep *ep, const void *data, uint64_t n)
{
    const uint8_t *from = data;
    uint64_t left = n;
    int r = sh_writable(ep);

    if (SH_UNLIKELY(r < 0))
        return r;
    while (left) {
        uint32_t m;

        if (SH_UNLIKELY((r = sh_room(ep, 1, left)) < 0))
            return r;
        if (!r)
            break;
        m = left < (uint32_t)r ? (uint32_t)left : (uint32_t)r;
        if (m > SH_COPY_MAX)
            m = SH_COPY_MAX;
        sh_stage(ep, 0, from, m);
        sh_commit(ep, m);
        from += m;
        left -= m;
        if (left && SH_UNLIKELY(!sh_may_write(ep->nd)))
            return SH_STALE;
    }
    ep->nd->n[SH_N_WRITES]++;
    ep->nd->n[SH_N_BYTES_OUT] += n - left;
    return (int64_t)(n - left);
}

/* FIN, REL, RST. Who says REL looks once, at whether the peer has: returns what sh_poll() does, or 0. */
int sh_ep_shut(sh_ep *ep, int fin, int rel, int rst)
{
    if (!ep->theirs || !sh_may_write(ep->nd))
        return 0;
    ep->flags = (ep->flags & ~SH_WANT) | (fin ? SH_FIN : 0) | (rel ? SH_DONE : 0) | (rst ? SH_RST : 0);
    publish(ep);
    sh_notify_slot(ep->nd, ep->peer, ep->peer_slot);
    return rel ? sh_poll(ep) : 0;
}

/* Bytes published that the peer has not taken; 0 when nobody will ever take them. */
uint64_t sh_ep_unsent(sh_ep *ep)
{
    if (!sh_may_write(ep->nd) || !ep->theirs || sh_refresh(ep) < 0 || (ep->tx_last & (SH_DONE | SH_RST)) || sh_see_head(ep) < 0)
        return 0;
    return ep->tail - ep->head_seen;
}

/* Space for a writer that waits: > 0 bytes free, 0 none (WANT is set and armed: suspend), or a status. */
int sh_wait_space(sh_ep *ep, int spin)
{
    int r = sh_writable(ep);

    if (r < 0)
        return r;
    if ((r = sh_see_head(ep)) < 0 || space_of(ep))
        return r < 0 ? r : (int)space_of(ep);
    if ((r = want_space(ep)) != 0)
        return r;
    if (spin) {
        uint64_t now = sh_clock();
        if (!sh_over_at(ep->nd, now)
            && sh_spin_on(ep, &ep->theirs->rx_word, (uint64_t)ep->peer_gen << SH_GEN_SHIFT | ep->head_seen, now) > 0) {
            if ((r = sh_see_head(ep)) < 0)
                return r;
            if (space_of(ep))
                return (int)space_of(ep);
        }
    }
    return 0;
}

/* ---- consumer ---- */

/* A descriptor of the peer: read from the ring there, of at least so many bytes. 0 or SH_VIOLATION. */
int sh_ring_of(sh_ep *ep, uint64_t ring, uint32_t least)
{
    const sh_geometry *g = &ep->nd->g;
    uint64_t off = (ring & 0x3fffffff) * SH_MIN_RING;
    uint32_t log2_bytes = ring >> 30 & 63;

    if (log2_bytes < 12 || log2_bytes > 30 || 1ull << log2_bytes < least || off < g->arena_off
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
        return 0; /* we were quicker */
    ring = sh_load(&ep->theirs->ring, ep->nd->wc); /* SYNC G */
    if (SH_GEN(ring) != ep->peer_gen && SH_GEN(sh_load(&ep->theirs->tx_word, ep->nd->wc)) != ep->peer_gen)
        return SH_RESET;
    if (SH_GEN(ring) != ep->peer_gen || ((SH_EPOCH(ring) - was) & 15) < now || now > SH_EPOCH_LEAD
        || sh_ring_of(ep, ring, 2 * ep->rx_bytes) < 0)
        return SH_VIOLATION;
    ep->followed = 1;
    return 0;
}

/* Its slot is another life's: was that an opener that gave up before it had seen our ACCEPT? It wrote nothing, and that is an end like
 * any other, unless the link itself has ended. */
static int gave_up(const sh_ep *ep)
{
    const struct sh_link *l = &ep->nd->links[ep->peer];

    return ep->accepted && !ep->orphan && (ep->tx_last & ~(SH_FIN | SH_DONE)) == (uint64_t)ep->peer_gen << SH_GEN_SHIFT
        && SH_HIGH(sh_load(&l->in->notify_seq, ep->nd->wc)) == l->peer_inc;
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
        ep->moved++;
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
        ep->moved++;
    ep->tx_last = p;
    ep->tail_seen = SH_LOW(p);
    return 0;
}

/* What an empty ring means. */
static int empty(const sh_ep *ep)
{
    return ep->tx_last & SH_FIN ? SH_EOF : ep->orphan || (ep->tx_last & SH_DONE) ? SH_RESET : SH_EMPTY;
}

static int64_t span(sh_ep *ep, uint32_t n)
{
    ep->reading_gen = ep->gen;
    return (int64_t)(ep->head & (ep->rx_bytes - 1)) << 32 | n;
}

/* What can be read without waiting: offset in the ring << 32 | bytes (they may wrap), or a status. */
int64_t sh_now(sh_ep *ep, uint32_t want)
{
    uint32_t avail;
    int r;

    if (SH_UNLIKELY(!sh_may_write(ep->nd)))
        return SH_STALE;
    if (SH_UNLIKELY(!ep->theirs))
        return SH_RESET;
    if ((r = sh_refresh(ep)) < 0)
        return r;
    avail = ep->tail_seen - ep->head;
    return avail ? span(ep, avail < want ? avail : want) : empty(ep);
}

/* The fast read: at least `min` and at most `want` bytes, spinning for them when `spin` allows. Answers like sh_now;
 * SH_EMPTY also when something but less than min is there. */
int64_t sh_begin(sh_ep *ep, uint32_t want, uint32_t min, int spin)
{
    sh_node *nd = ep->nd;
    uint64_t now;
    uint32_t avail;
    int r;

    if (SH_UNLIKELY(!sh_may_write(nd)))
        return SH_STALE;
    if (SH_UNLIKELY(!ep->theirs))
        return SH_RESET;
    if (sh_over_at(nd, now = sh_clock()))
        return SH_YIELD;
    if (spin && sh_one_way(ep, min))
        now = sh_gather(ep, now);
    ep->polled_ns = now;
    for (;;) {
        avail = ep->tail_seen - ep->head;
        if (avail < min) {
            if (SH_UNLIKELY((r = sh_refresh(ep)) < 0))
                return r;
            avail = ep->tail_seen - ep->head;
        }
        if (avail >= min)
            return span(ep, avail < want ? avail : want);
        if (!now && sh_over_at(nd, now = sh_clock()))
            spin = 0;
        r = spin && !(ep->tx_last & SH_FIN) ? sh_spin_on(ep, &ep->theirs->tx_word, ep->tx_last, now) : 0;
        if (r <= 0)
            return r ? r : avail ? SH_EMPTY : empty(ep);
        now = 0; /* read again when there is something to wait for */
    }
}

/* n bytes were copied out: give their space back. SH_RESET: the slot changed hands meanwhile, the copy is worthless;
 * SH_GROW: so it is, as the reader changed rings. */
int sh_read_end(sh_ep *ep, uint32_t n)
{
    sh_node *nd = ep->nd;
    uint32_t old = ep->head, quarter = ep->rx_bytes / 4;

    if (SH_UNLIKELY(!sh_may_write(nd)))
        return SH_STALE;
    /* Between begin and end Python may have run (a signal handler): this slot may have been released, even taken again. */
    if (SH_UNLIKELY(!ep->theirs || ep->reading_gen != ep->gen))
        return ep->theirs && ep->reading_gen == SH_NOT_READING ? SH_GROW : SH_RESET;
    sh_acquire(nd->wc);
    if (SH_UNLIKELY(SH_GEN(sh_load(&ep->theirs->tx_word, nd->wc)) != ep->peer_gen))
        return SH_RESET;
    ep->head += n;
    ep->one_way = n >= FLOW_BYTES ? 0 : ep->one_way < 0 ? 1 : ep->one_way < SH_ONE_WAY ? ep->one_way + 1 : ep->one_way;
    ep->spun_ns = 0;
    sh_store(&ep->mine->rx_word, (uint64_t)ep->gen << SH_GEN_SHIFT | ep->head, nd->wc);
    nd->touched[SH_WORD(ep->slot)] |= SH_BIT(ep->slot);
    nd->n[SH_N_READS]++;
    nd->n[SH_N_BYTES_IN] += n;
    if (old / quarter != ep->head / quarter) {
        sh_fence(nd->wc); /* SYNC W; a crossing that is not reached is made good by sh_arm and sh_rearm_touched */
        if (!ep->orphan && (sh_load(&ep->theirs->tx_word, nd->wc) & SH_WANT))
            sh_notify_slot(nd, ep->peer, ep->peer_slot);
    }
    return 0;
}

/* Copy n bytes from there in the ring. What they are is decided by the copy alone. */
void sh_copy_ring(const sh_ep *ep, void *to, uint32_t at, uint32_t n)
{
    uint32_t first;

    at &= ep->rx_bytes - 1;
    first = ep->rx_bytes - at < n ? ep->rx_bytes - at : n;
    sh_copy_in(to, ep->rx + at, first);
    if (first < n)
        sh_copy_in((uint8_t *)to + first, ep->rx, n - first);
}

/* The same, and give their space back, and that of a header before them. As sh_read_end. */
int sh_read_out(sh_ep *ep, void *to, uint32_t at, uint32_t n, uint32_t header)
{
    sh_copy_ring(ep, to, at, n);
    return sh_read_end(ep, n + header);
}

/* What is the matter with this slot? Bits SH_POLL_*; MOVED says that bytes came since the last look, or space that is waited for. */
int sh_poll_at(sh_ep *ep, uint64_t now)
{
    uint32_t tail = ep->tail_seen, head = ep->head_seen;
    int bits = 0, r;

    if (!sh_may_write(ep->nd) || !ep->theirs)
        return 0;
    r = sh_refresh(ep);
    if (r < 0)
        return r == SH_RESET ? SH_POLL_RESET : SH_POLL_BAD;
    if ((ep->flags & SH_WANT) && sh_see_head(ep) < 0) /* else nobody asks, and the line stays with the peer */
        return SH_POLL_BAD;
    if (ep->tail_seen != ep->head)
        bits |= SH_POLL_DATA;
    if (ep->tx_last & SH_FIN)
        bits |= SH_POLL_FIN;
    if (ep->tx_last & SH_DONE)
        bits |= SH_POLL_DONE;
    if (space_of(ep))
        bits |= SH_POLL_SPACE;
    if (tail != ep->tail_seen || head != ep->head_seen) {
        bits |= SH_POLL_MOVED;
        if (ep->waiting) { /* a spin would have paid: let the window grow again */
            uint64_t gap = now - ep->wait_since;
            if (gap < ep->nd->spin_max_ns && 2 * gap > ep->window_ns)
                ep->window_ns = 2 * gap;
        }
        ep->waiting = 0;
    }
    return bits;
}

int sh_poll(sh_ep *ep) { return sh_poll_at(ep, sh_clock()); }

/* Acknowledge this slot's toggle without looking: the caller fences and looks. */
int sh_acknowledge(sh_node *nd, sh_ep *ep)
{
    struct sh_link *l = &nd->links[ep->peer];
    uint32_t w = SH_WORD(ep->slot);

    if (!((sh_peek(&l->t_in[w]) ^ l->a[w]) & SH_BIT(ep->slot)))
        return 0;
    l->a[w] ^= SH_BIT(ep->slot);
    sh_put(&l->a_out[w], l->a[w]);
    return 1;
}

/* Has a writer that waits for space been given some? Whoever acknowledges a toggle owes this look as much as the one at P.
 * Space that is known already counts: somebody may have taken the head over and told nobody. */
int sh_space_came(const sh_ep *ep)
{
    return (ep->flags & SH_WANT) && (space_of(ep) || SH_LOW(sh_load(&ep->theirs->rx_word, ep->nd->wc)) != ep->head_seen);
}

/* Before suspending: from here on the peer must tell. 1: something is there after all, look again. 0: suspend. */
int sh_arm(sh_ep *ep)
{
    sh_node *nd = ep->nd;
    int r;

    if (!sh_may_write(nd) || !ep->theirs)
        return 1;
    nd->touched[SH_WORD(ep->slot)] &= ~SH_BIT(ep->slot);
    sh_acknowledge(nd, ep);
    sh_fence(nd->wc); /* SYNC R1, SYNC W */
    if (sh_space_came(ep))
        nd->ready[SH_WORD(ep->slot)] |= SH_BIT(ep->slot); /* not the reader's business, but the toggle spoke of it */
    r = sh_refresh(ep);
    if (r < 0 || ep->tail_seen != ep->head || (ep->tx_last & SH_FIN) || ep->orphan)
        return 1;
    if (ep->tx_last & SH_WANT)
        sh_notify_slot(nd, ep->peer, ep->peer_slot);
    ep->waiting = 1;
    ep->wait_since = sh_clock();
    return 0;
}

/* At every pump: what was read since the last one is armed again. Slots with news are looked at by the pump after this one, so
 * that a reader that is just between two reads is not disturbed. */
void sh_rearm_touched(sh_node *nd)
{
    uint64_t found = 0;

    for (uint32_t w = 0; w < nd->words; w++)
        for (uint64_t m = nd->touched[w]; m; m &= m - 1) {
            sh_acknowledge(nd, &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)]);
            found = 1;
        }
    if (!found)
        return;
    sh_fence(nd->wc); /* SYNC R1, SYNC W: one for all of them */
    for (uint32_t w = 0; w < nd->words; w++) {
        for (uint64_t m = nd->touched[w]; m; m &= m - 1) {
            sh_ep *ep = &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)];
            uint64_t p = sh_load(&ep->theirs->tx_word, nd->wc);

            /* FIN and REL that a read took over are news to whoever waits for the end, or to write */
            if (p != ep->tx_last || ep->tail_seen != ep->head || (p & (SH_FIN | SH_DONE)) || sh_space_came(ep))
                nd->later[w] |= SH_BIT(ep->slot);
            if (!ep->orphan && SH_GEN(p) == ep->peer_gen && (p & SH_WANT))
                sh_notify_slot(nd, ep->peer, ep->peer_slot);
        }
        nd->touched[w] = 0;
    }
}
