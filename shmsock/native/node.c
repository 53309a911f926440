/* node.c - a node's links to its peers: bells and toggles in, adoption, messages, slots' life. The pump reads O(peers) words when
 * idle and O(active slots) under load. */
#include "node.h"

#include <errno.h>
#include <stdlib.h>

/* ---- life of a node ---- */

sh_node *sh_node_new(void *base, const sh_geometry *g, uint32_t self, int wc)
{
    sh_node *nd = calloc(1, sizeof *nd);

    if (!nd)
        return NULL;
    nd->links = calloc(g->peers, sizeof *nd->links);
    nd->eps = calloc(g->slots, sizeof *nd->eps);
    if (!nd->links || !nd->eps) {
        sh_node_free(nd);
        return NULL;
    }
    nd->base = base;
    nd->g = *g;
    nd->self = self;
    nd->wc = wc;
    nd->inert = 1; /* until claimed */
    nd->loop_fd = -1;
    nd->words = (g->slots + 63) / 64;
    nd->region_id = sh_load(&((struct sh_header *)base)->region_id, wc);
    nd->claim_at = &((struct sh_section *)sh_section_at(base, g, self))->claim;
    nd->sleeping_at = &((struct sh_section *)sh_section_at(base, g, self))->sleeping;
    for (uint32_t j = 0; j < g->peers; j++) {
        struct sh_link *l = &nd->links[j];
        uint8_t *out = (uint8_t *)sh_pair_at(base, g, self, j), *in = (uint8_t *)sh_pair_at(base, g, j, self);

        l->out = (struct sh_pair *)out;
        l->t_out = (uint64_t *)(out + g->toggle_off);
        l->a_out = (uint64_t *)(out + g->ack_off);
        l->m_out = (struct sh_message *)(out + g->message_off);
        l->in = (struct sh_pair *)in;
        l->t_in = (uint64_t *)(in + g->toggle_off);
        l->a_in = (uint64_t *)(in + g->ack_off);
        l->m_in = (struct sh_message *)(in + g->message_off);
        l->sleeping = &((struct sh_section *)sh_section_at(base, g, j))->sleeping;
    }
    for (uint32_t s = 0; s < g->slots; s++) {
        nd->eps[s].nd = nd;
        nd->eps[s].slot = s;
        nd->eps[s].mine = (struct sh_slot *)(sh_section_at(base, g, self) + g->slot_off) + s;
    }
    return nd;
}

void sh_node_free(sh_node *nd)
{
    if (!nd)
        return;
    free(nd->links);
    free(nd->eps);
    free(nd);
}

/* The section is ours: step every generation past what a former owner left, so that who still holds its slots sees them gone. */
void sh_node_claim(sh_node *nd, uint64_t claim)
{
    nd->claim = claim;
    nd->owner = sh_thread();
    for (uint32_t s = 0; s < nd->g.slots; s++) {
        sh_ep *ep = &nd->eps[s];
        ep->gen = (SH_GEN(sh_peek(&ep->mine->p)) + 1) & SH_GEN_MASK;
        sh_put(&ep->mine->link, 0);
        sh_put(&ep->mine->ring, (uint64_t)ep->gen << SH_GEN_SHIFT);
        sh_put(&ep->mine->p, (uint64_t)ep->gen << SH_GEN_SHIFT);
        sh_put(&ep->mine->c, (uint64_t)ep->gen << SH_GEN_SHIFT);
    }
    nd->sleep = (sh_peek(nd->sleeping_at) + 2) & ~1ull; /* awake, and no sleep that anybody rang a former owner for */
    sh_put(nd->sleeping_at, nd->sleep);
    sh_fence(nd->wc);
    __atomic_store_n(&nd->inert, 0, __ATOMIC_RELEASE);
}

void sh_node_inert(sh_node *nd) { __atomic_store_n(&nd->inert, 1, __ATOMIC_RELEASE); }
int sh_node_is_inert(sh_node *nd) { return !sh_holds(nd); }
void sh_node_own(sh_node *nd) { nd->owner = sh_thread(); }

void sh_node_settings(sh_node *nd, uint64_t hold_ns, uint64_t spin_max_ns, uint64_t spin_yield_ns)
{
    nd->hold_ns = hold_ns;
    nd->spin_max_ns = spin_max_ns;
    nd->spin_yield_ns = spin_yield_ns;
}

uint64_t sh_node_counter(sh_node *nd, int which)
{
    return which >= 0 && which < SH_N_COUNTERS ? __atomic_load_n(&nd->n[which], __ATOMIC_RELAXED) : 0;
}

/* ---- the pump ---- */

/* Take in one peer's bell: acknowledge its toggles and keep what is open as ready. 1 when the pump has something to do. */
int sh_collect(sh_node *nd, struct sh_link *l)
{
    uint64_t bell = sh_load(&l->in->bell, nd->wc), box, any = 0; /* SYNC BELL: bell before toggles */
    int acked = 0;

    __atomic_store_n(&l->last, bell, __ATOMIC_RELAXED);
    if (SH_HIGH(bell) != l->peer_inc) {
        l->news |= SH_NEWS_TAG;
        nd->attention = 1;
        return 1;
    }
    for (uint32_t w = 0; w < nd->words; w++) {
        uint64_t diff = sh_load(&l->t_in[w], nd->wc) ^ l->a[w], held = diff & nd->touched[w] & l->open[w];

        if (held)
            l->acknowledged = 1; /* as good as: its slot is looked at itself, and this bell spoke of it */
        if (!(diff &= ~held))
            continue;
        l->a[w] ^= diff;
        sh_put(&l->a_out[w], l->a[w]);
        nd->ready[w] |= diff & l->open[w]; /* toggles of slots that are not open with this peer end here */
        any |= diff & l->open[w];
        acked = 1;
    }
    if (acked)
        sh_fence(nd->wc); /* SYNC R1: A before the look at P; partner: F1 */
    box = sh_load(&l->in->outbox, nd->wc);
    if (SH_HIGH(box) == l->my_inc && SH_LOW(box) != l->msg_head) {
        l->news |= SH_NEWS_MAIL;
        nd->attention = 1;
    }
    return any || l->news;
}

/* A bell that spoke of nothing. Bells cost their listener more than their ringer: a thousand of these in a second, and the peer is heard
 * by the safety look only. */
static void fruitless(struct sh_link *l, uint64_t now)
{
    if (now - l->second_ns > 1000000000u) {
        l->second_ns = now;
        l->fruitless = 0;
    }
    if (++l->fruitless >= 1000)
        __atomic_store_n(&l->muted, 1, __ATOMIC_RELEASE);
}

/* What the bells of `look` and the ready slots have to say. Fills out[] with what a look at the slot found << 32 | kind << 24 | (slot or
 * peer), at most max of them; what does not fit is kept for the next pass. */
int sh_pass(sh_node *nd, uint64_t *out, int max, uint64_t look, uint64_t now)
{
    int n = 0;

    nd->attention = 0;
    for (uint32_t k = 0; k < nd->g.peers; k++) {
        uint32_t j = (nd->start + k) % nd->g.peers;
        struct sh_link *l = &nd->links[j];

        if (!(look >> j & 1))
            continue;
        if (!l->muted && sh_peek(&l->in->bell) != l->last) {
            if (nd->woke)
                sh_doubt(nd, l, now);
            if (!sh_collect(nd, l) && !l->acknowledged)
                fruitless(l, now);
            l->acknowledged = 0;
        }
        if (!l->news)
            continue;
        if (n == max) {
            nd->attention = 1;
            continue;
        }
        out[n++] = (uint64_t)(l->news & SH_NEWS_TAG ? SH_EV_ADOPT : SH_EV_MESSAGE) << 24 | j;
        l->unread = !(l->news & SH_NEWS_TAG);
        l->news = 0; /* what is left unread of the mail is found again by sh_message_recv's caller */
    }
    nd->woke = 0;
    nd->start = (nd->start + 1) % nd->g.peers;
    for (uint32_t k = 0; k < nd->words && n < max; k++) {
        uint32_t w = (nd->start + k) % nd->words;

        for (; nd->ready[w] && n < max; nd->ready[w] &= nd->ready[w] - 1) {
            uint32_t slot = w * 64 + (uint32_t)__builtin_ctzll(nd->ready[w]);
            out[n++] = (uint64_t)sh_look(&nd->eps[slot]) << 32 | SH_EV_SLOT << 24 | slot;
        }
    }
    return n;
}

/* Slots that nobody came back to: the next pass looks at them. */
void sh_take_later(sh_node *nd)
{
    for (uint32_t w = 0; w < nd->words; w++) {
        nd->ready[w] |= nd->later[w] & ~nd->touched[w];
        nd->later[w] = 0;
    }
}

/* One pass, which begins a turn. Returns what sh_pass() does, or SH_STALE. */
int sh_pump(sh_node *nd, uint64_t *out, int max)
{
    uint64_t now, look = SH_ALL;

    if (!sh_may_write(nd))
        return SH_STALE;
    now = sh_turn(nd);
    if (++nd->n[SH_N_PUMPS] % 16 && !nd->attention && !__atomic_load_n(&nd->strangers, __ATOMIC_RELAXED))
        look = nd->known; /* each bell is on a page of its own, and cold ones cost more than all the rest */
    else
        __atomic_store_n(&nd->strangers, 0, __ATOMIC_RELAXED);
    sh_take_later(nd);
    sh_rearm_touched(nd);
    return sh_pass(nd, out, max, look, now);
}

/* Nothing is owed a pass: the loop may sleep, once the keeper (or a doorbell) watches the bells. */
int sh_quiet(sh_node *nd)
{
    uint64_t any = nd->attention;

    for (uint32_t w = 0; w < nd->words; w++)
        any |= nd->ready[w] | nd->later[w] | nd->touched[w];
    return !any;
}

/* The slow look that needs no bell. What it finds is made ready; it counts as healed only if a whole period later still no bell
 * has spoken of it (else the bell was merely on its way). Returns how many links looked suspicious. */
int sh_safety(sh_node *nd)
{
    int found = 0;

    for (uint32_t j = 0; j < nd->g.peers; j++) {
        struct sh_link *l = &nd->links[j];
        uint64_t bell = sh_load(&l->in->bell, nd->wc), box;
        int suspect = 0;

        if (l->muted) {
            __atomic_store_n(&l->muted, 0, __ATOMIC_RELEASE);
            nd->kick = 1;
            l->second_ns = 0;
            sh_collect(nd, l);
            continue;
        }
        if (l->suspected && l->suspect == bell)
            nd->n[SH_N_HEALED]++;
        l->suspected = 0;
        if (!l->peer_inc || bell != l->last)
            continue;
        for (uint32_t w = 0; w < nd->words; w++) {
            uint64_t due = nd->ready[w] | nd->later[w] | nd->touched[w];

            if ((sh_load(&l->t_in[w], nd->wc) ^ l->a[w]) & l->open[w] & ~due)
                suspect = 1;
            for (uint64_t m = l->open[w] & ~due; m; m &= m - 1) {
                sh_ep *ep = &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)];
                /* WANT is published without a bell: it is seen when bytes are taken */
                if (((sh_load(&ep->theirs->p, nd->wc) ^ ep->p_last) & ~SH_WANT)
                    || ((ep->flags & SH_WANT) && SH_LOW(sh_load(&ep->theirs->c, nd->wc)) != ep->head_seen)) {
                    nd->ready[w] |= SH_BIT(ep->slot);
                    suspect = 1;
                }
            }
        }
        box = sh_load(&l->in->outbox, nd->wc);
        if (SH_HIGH(box) == l->my_inc && SH_LOW(box) != l->msg_head && !(l->news & SH_NEWS_MAIL) && !l->unread) {
            l->news |= SH_NEWS_MAIL;
            nd->attention = 1;
            suspect = 1;
        }
        if (suspect) {
            sh_collect(nd, l);
            l->suspected = 1;
            l->suspect = bell;
            found++;
        }
    }
    return found;
}

/* ---- links: attach, drop, adopt (LAYOUT.md, "Lives of a pair") ---- */

void sh_restart(sh_node *nd, uint32_t peer, uint32_t pair_inc)
{
    struct sh_link *l = &nd->links[peer];

    if (!sh_may_write(nd))
        return;
    for (uint32_t w = 0; w < nd->words; w++) {
        l->t[w] = l->a[w] = l->open[w] = 0;
        sh_put(&l->t_out[w], 0);
        sh_put(&l->a_out[w], 0);
    }
    sh_put(&l->out->outbox, 0);
    sh_put(&l->out->inbox, 0);
    sh_put(&l->out->users, 0);
    l->my_inc = pair_inc;
    l->peer_inc = l->msg_tail = l->msg_head = 0;
    l->news = l->suspected = l->unread = 0;
    l->count = SH_LOW(sh_peek(&l->out->bell)); /* goes on from there, so that no half of the word stays as it was */
    sh_ring_bell(nd, l); /* last: who sees the tag sees the cleared words */
    sh_fence(nd->wc);
    /* no bell has the tag 0 and the count all ones: the next pump takes this for a change */
    __atomic_store_n(&l->last, 0xffffffffull, __ATOMIC_RELAXED);
}

/* Adopt the pair_inc that the peer's bell carries now. The caller has ended the pair's connections. Returns it; 0: no peer. */
uint32_t sh_adopt(sh_node *nd, uint32_t peer)
{
    struct sh_link *l = &nd->links[peer];
    uint64_t bell = sh_load(&l->in->bell, nd->wc);

    if (!sh_may_write(nd))
        return 0;
    l->peer_inc = SH_HIGH(bell);
    sh_know(nd, peer, 1);
    l->msg_tail = l->msg_head = 0;
    l->news = l->suspected = l->unread = 0;
    __atomic_store_n(&l->last, bell, __ATOMIC_RELAXED);
    for (uint32_t w = 0; w < nd->words; w++) {
        l->open[w] = 0;
        l->a[w] = sh_load(&l->t_in[w], nd->wc);
        sh_put(&l->a_out[w], l->a[w]);
    }
    sh_put(&l->out->users, SH_PACK(l->peer_inc, 0));
    sh_store(&l->out->outbox, SH_PACK(l->peer_inc, 0), nd->wc);
    sh_store(&l->out->inbox, SH_PACK(l->peer_inc, 0), nd->wc);
    sh_fence(nd->wc);
    sh_ring_bell(nd, l);
    /* look at everything, regardless of bits and bell */
    if (SH_HIGH(sh_load(&l->in->outbox, nd->wc)) == l->my_inc) {
        l->news |= SH_NEWS_MAIL;
        nd->attention = 1;
    }
    return l->peer_inc;
}

uint32_t sh_peer_inc(sh_node *nd, uint32_t peer) { return nd->links[peer].peer_inc; }

/* Does the bell carry another pair_inc than the adopted one? Decides between a restart and a violation. */
int sh_tag_changed(sh_node *nd, uint32_t peer)
{
    return sh_may_write(nd) && SH_HIGH(sh_load(&nd->links[peer].in->bell, nd->wc)) != nd->links[peer].peer_inc;
}

/* Publish how many connections may still read this peer's rings: its section is not reused while this is not 0. */
void sh_users(sh_node *nd, uint32_t peer, uint32_t count)
{
    if (sh_may_write(nd))
        sh_store(&nd->links[peer].out->users, SH_PACK(nd->links[peer].peer_inc, count), nd->wc);
}

/* ---- messages ---- */

/* 0, -EAGAIN when the ring is full, -ENOTCONN before adoption, SH_VIOLATION when the peer's head is impossible. */
int sh_message_send(sh_node *nd, uint32_t peer, const sh_note *m)
{
    struct sh_link *l = &nd->links[peer];
    struct sh_message out = {
        .src_inc = l->my_inc, .dst_inc = l->peer_inc, .seq = l->msg_tail, .kind = (uint8_t)m->kind, .reason = (uint8_t)m->reason,
        .slot = (uint16_t)m->slot, .dst_slot = (uint16_t)m->dst_slot, .gen = m->gen, .dst_gen = m->dst_gen,
        .port = (uint16_t)m->port, .src_port = (uint16_t)m->src_port,
    };
    uint64_t box;
    uint32_t head;

    if (!sh_may_write(nd))
        return SH_STALE;
    if (!l->peer_inc)
        return -ENOTCONN;
    box = sh_load(&l->in->inbox, nd->wc);
    head = SH_HIGH(box) == l->my_inc ? SH_LOW(box) : 0; /* under a foreign tag it counts another life's messages */
    if (l->msg_tail - head > SH_MESSAGES)
        return SH_VIOLATION;
    if (l->msg_tail - head == SH_MESSAGES)
        return -EAGAIN;
    sh_copy_out(&l->m_out[l->msg_tail % SH_MESSAGES], &out, sizeof out);
    l->msg_tail++;
    sh_store(&l->out->outbox, SH_PACK(l->peer_inc, l->msg_tail), nd->wc);
    sh_ring_bell(nd, l);
    return 0;
}

/* 1 and *m filled, 0 for none, SH_VIOLATION for what cannot be (the caller looks at the tag again: a restart explains it). */
int sh_message_recv(sh_node *nd, uint32_t peer, sh_note *m)
{
    struct sh_link *l = &nd->links[peer];
    struct sh_message in;
    uint64_t box;

    if (!sh_may_write(nd))
        return SH_STALE;
    l->unread = 0;
    box = sh_load(&l->in->outbox, nd->wc);
    if (!l->peer_inc || SH_HIGH(box) != l->my_inc || SH_LOW(box) == l->msg_head)
        return 0;
    if (SH_LOW(box) - l->msg_head > SH_MESSAGES)
        return SH_VIOLATION;
    sh_copy_in(&in, &l->m_in[l->msg_head % SH_MESSAGES], sizeof in);
    if (in.src_inc != l->peer_inc || in.dst_inc != l->my_inc || in.seq != l->msg_head || in.kind < SH_CONNECT
        || in.kind > SH_REFUSE || in.slot >= nd->g.slots || in.dst_slot >= nd->g.slots || in.gen > SH_GEN_MASK
        || in.dst_gen > SH_GEN_MASK)
        return SH_VIOLATION;
    *m = (sh_note){.kind = in.kind, .reason = in.reason, .slot = in.slot, .dst_slot = in.dst_slot, .gen = in.gen,
                   .dst_gen = in.dst_gen, .port = in.port, .src_port = in.src_port};
    l->msg_head++;
    l->unread = 1;
    l->acknowledged = 1; /* its bell may come only now */
    nd->moved_messages++;
    sh_store(&l->out->inbox, SH_PACK(l->peer_inc, l->msg_head), nd->wc);
    return 1;
}

/* ---- slots ---- */

sh_ep *sh_ep_at(sh_node *nd, uint32_t slot) { return slot < nd->g.slots ? &nd->eps[slot] : NULL; }
uint32_t sh_ep_gen(sh_ep *ep) { return ep->gen; }

/* FREE -> taken: publish the ring (offset in the section, bytes: a power of two) under the current generation. */
void sh_ep_take(sh_ep *ep, uint64_t ring_off, uint32_t ring_bytes, int accepted)
{
    sh_node *nd = ep->nd;

    ep->tx = sh_section_at(nd->base, &nd->g, nd->self) + ring_off;
    ep->tx_bytes = ring_bytes;
    ep->tail = ep->head_seen = ep->head = ep->tail_seen = 0;
    ep->flags = 0;
    ep->theirs = NULL;
    ep->orphan = ep->waiting = 0;
    ep->accepted = accepted != 0;
    ep->may_grow = ep->outgrown = ep->followed = 0;
    ep->window_ns = 50000;
    ep->spun_ns = 0;
    ep->flow = 0;
    ep->misses = ep->patience = 0;
    sh_put(&ep->mine->ring, sh_ring_word(ep, ring_off));
    sh_put(&ep->mine->c, (uint64_t)ep->gen << SH_GEN_SHIFT);
    sh_store(&ep->mine->p, (uint64_t)ep->gen << SH_GEN_SHIFT, nd->wc);
}

/* taken -> OPEN with that slot of that peer. Its descriptor is read once and checked; who accepted may have grown its ring already.
 * *ring_off is an offset in the region.
 * 0, SH_RESET when the slot is not of that generation (any more), SH_VIOLATION when the descriptor is impossible. */
int sh_ep_open(sh_ep *ep, uint32_t peer, uint32_t peer_slot, uint32_t peer_gen, uint64_t *ring_off, uint32_t *ring_bytes)
{
    sh_node *nd = ep->nd;
    const sh_geometry *g = &nd->g;
    uint8_t *section = sh_section_at(nd->base, g, peer);
    const struct sh_slot *theirs = (const struct sh_slot *)(section + g->slot_off) + peer_slot;
    uint64_t ring = sh_load(&theirs->ring, nd->wc), p = sh_load(&theirs->p, nd->wc);

    if (SH_GEN(p) != peer_gen || SH_GEN(ring) != peer_gen)
        return SH_RESET;
    ep->peer = peer;
    if ((ep->accepted ? SH_EPOCH(ring) : SH_EPOCH(ring) > SH_EPOCH_LEAD) || sh_ring_of(ep, ring, 0) < 0)
        return SH_VIOLATION;
    ep->peer_slot = peer_slot;
    ep->peer_gen = peer_gen;
    ep->p_last = (uint64_t)peer_gen << SH_GEN_SHIFT;
    ep->theirs = theirs;
    nd->links[peer].open[SH_WORD(ep->slot)] |= SH_BIT(ep->slot);
    sh_put(&ep->mine->link, (uint64_t)ep->gen << SH_GEN_SHIFT | (uint64_t)peer << 32 | (uint64_t)peer_slot << 16 | 1u << 8);
    *ring_off = (uint64_t)(ep->rx - nd->base);
    *ring_bytes = ep->rx_bytes;
    return 0;
}

/* The peer is gone, or this link was restarted: no toggles, no writes; what was published may be read. */
void sh_ep_orphan(sh_ep *ep)
{
    ep->orphan = 1;
    ep->nd->links[ep->peer].open[SH_WORD(ep->slot)] &= ~SH_BIT(ep->slot);
}

/* -> FREE: one store ends this generation, for both directions. Slot and ring may be reused after the fence. */
void sh_ep_release(sh_ep *ep, int notify)
{
    sh_node *nd = ep->nd;
    uint32_t w = SH_WORD(ep->slot);
    uint64_t keep = ~SH_BIT(ep->slot);

    if (!sh_may_write(nd))
        return;
    ep->gen = (ep->gen + 1) & SH_GEN_MASK;
    sh_store(&ep->mine->p, (uint64_t)ep->gen << SH_GEN_SHIFT, nd->wc);
    sh_put(&ep->mine->link, 0);
    if (ep->theirs && (nd->touched[w] & ~keep))
        sh_acknowledge(nd, ep); /* a spin may have taken the bell and left the toggle: the slot's next user would never be told */
    sh_fence(nd->wc);
    if (ep->theirs) {
        nd->links[ep->peer].open[w] &= keep;
        /* Who was told REL waits for nothing more, and who has released needs no news: a bell for these would speak of nothing. */
        if (notify && !ep->orphan && !(ep->flags & SH_REL) && SH_GEN(sh_load(&ep->theirs->p, nd->wc)) == ep->peer_gen)
            sh_notify_slot(nd, ep->peer, ep->peer_slot);
    }
    nd->ready[w] &= keep;
    nd->later[w] &= keep;
    nd->touched[w] &= keep;
    ep->theirs = NULL;
}
