/* link.c - a node, and its links to its peers: what their notify_seq says, how much they may say, and their lives. */
#include "foreign.h"

/* ---- life of a node ---- */

/* How much memory a node takes. The caller provides it, all zeros, and frees it. (A destructor of its own would be called by the collector
 * before those of objects that still use the node.) */
uint64_t sh_node_bytes(const sh_geometry *g)
{
    return sizeof(sh_node) + g->peers * sizeof(struct sh_link) + g->slots * sizeof(sh_ep) + sh_books_bytes(g);
}

sh_node *sh_node_new(void *memory, void *base, const sh_geometry *g, uint32_t self, int wc)
{
    sh_node *nd = memory;

    nd->links = (struct sh_link *)(nd + 1);
    nd->eps = (sh_ep *)(nd->links + g->peers);
    nd->base = base;
    nd->g = *g;
    nd->self = self;
    sh_books_init(nd, nd->eps + g->slots);
    nd->wc = wc;
    nd->inert = 1; /* until claimed */
    nd->loop_fd = -1;
    nd->words = (g->slots + 63) / 64;
    nd->region_id = sh_load(&((struct sh_header *)base)->region_id, wc);
    nd->claim_at = &((struct sh_section *)sh_section_at(base, g, self))->claim;
    nd->sleep_seq_at = &((struct sh_section *)sh_section_at(base, g, self))->sleep_seq;
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
        l->sleep_seq = &((struct sh_section *)sh_section_at(base, g, j))->sleep_seq;
    }
    for (uint32_t s = 0; s < g->slots; s++) {
        nd->eps[s].nd = nd;
        nd->eps[s].slot = s;
        nd->eps[s].mine = (struct sh_slot *)(sh_section_at(base, g, self) + g->slot_off) + s;
    }
    return nd;
}

/* The section is ours: step every generation past what a former owner left, so that a peer that still holds its slots sees them gone. */
void sh_node_claim(sh_node *nd, uint64_t claim)
{
    nd->claim = claim;
    nd->owner = sh_thread();
    for (uint32_t s = 0; s < nd->g.slots; s++) {
        sh_ep *ep = &nd->eps[s];
        ep->gen = (SH_GEN(sh_peek(&ep->mine->tx_word)) + 1) & SH_GEN_MASK;
        sh_put(&ep->mine->link, 0);
        sh_put(&ep->mine->ring, (uint64_t)ep->gen << SH_GEN_SHIFT);
        sh_put(&ep->mine->tx_word, (uint64_t)ep->gen << SH_GEN_SHIFT);
        sh_put(&ep->mine->rx_word, (uint64_t)ep->gen << SH_GEN_SHIFT);
    }
    nd->sleep = (sh_peek(nd->sleep_seq_at) + 2) & ~1ull; /* awake; and larger than any sleep for which a former owner was kicked */
    sh_put(nd->sleep_seq_at, nd->sleep);
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

/* ---- what a peer's notify_seq says ---- */

/* Take over one peer's notify_seq: acknowledge its toggles, and make their open slots ready. 1: the pump has something to do. */
int sh_collect(sh_node *nd, struct sh_link *l)
{
    uint64_t seq = sh_load(&l->in->notify_seq, nd->wc), any = 0; /* SYNC NOTIFY: notify_seq before toggles; partner: sh_notify_slot */
    uint32_t polls = 0;
    int acked = 0;

    __atomic_store_n(&l->last, seq, __ATOMIC_RELAXED);
    if (SH_HIGH(seq) != l->peer_inc) {
        l->news |= SH_NEWS_TAG;
        nd->attention = 1;
        sh_caused(nd, l, 1);
        return 1;
    }
    for (uint32_t w = 0; w < nd->words; w++) {
        uint64_t diff = sh_toggled(nd, l, w), held = diff & nd->touched[w] & l->open[w];

        for (uint64_t m = diff & l->open[w]; m; m &= m - 1)
            polls++;
        if (!(diff &= ~held)) /* touched slots are polled themselves: their toggles stay unacknowledged */
            continue;
        l->a[w] ^= diff;
        sh_put(&l->a_out[w], l->a[w]);
        nd->ready[w] |= diff & l->open[w]; /* toggles of slots that are not open with this peer are acknowledged, and that is all */
        any |= diff & l->open[w];
        acked = 1;
    }
    if (acked)
        sh_fence(nd->wc); /* SYNC R1: A before the load of P; partner: F1 */
    if (sh_mail(nd, l)) {
        l->news |= SH_NEWS_MAIL;
        nd->attention = 1;
    }
    sh_caused(nd, l, polls ? polls : 1);
    return any || l->news;
}

/* Ignore this peer's words until the next safety poll. */
void sh_rate_limit(sh_node *nd, struct sh_link *l)
{
    if (!__atomic_exchange_n(&l->rate_limited, 1, __ATOMIC_ACQ_REL))
        __atomic_fetch_add(&nd->n[SH_N_RATE_LIMITED], 1, __ATOMIC_RELAXED);
}

/* A store costs a peer less than the poll that it causes. So a thousand polls are weighed: did they take more than a second, or did something
 * move? An honest peer moves something before it notifies, but we may see that before the notification, and several moves at once: up to every
 * second poll of such a peer may be in vain. So it is enough if one poll in four is not. */
void sh_weigh(sh_node *nd, struct sh_link *l)
{
    uint64_t now = sh_clock();
    uint32_t due = 0; /* polls that are counted but were not made yet: a pass reports only so many */

    for (uint32_t w = 0; w < nd->words; w++)
        for (uint64_t m = l->open[w]; m; m &= m - 1) {
            sh_ep *ep = &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)];
            due += (nd->ready[w] & SH_BIT(ep->slot)) != 0;
            l->moved += ep->moved;
            ep->moved = 0;
        }
    if (l->polls < due + SH_POLLS)
        return;
    if (now - l->weighed_ns < 1000000000u && l->moved < (l->polls - due) / 4)
        sh_rate_limit(nd, l);
    l->weighed_ns = now;
    l->polls = due;
    l->moved = 0;
}

/* That peer's identity has changed: may the caller read it? 0: later, as the peer is rate-limited. */
int sh_inspect(sh_node *nd, uint32_t peer)
{
    struct sh_link *l = &nd->links[peer];

    if (!sh_rate_limited(l))
        sh_caused(nd, l, 1);
    return !sh_rate_limited(l);
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
    if (!l->users) /* else count and tag stay: what the peer left is still being read */
        sh_put(&l->out->users, 0);
    l->my_inc = pair_inc;
    l->peer_inc = l->msg_tail = l->msg_head = l->msg_acked = l->asked = 0;
    l->news = l->suspected = l->unread = 0;
    l->count = SH_LOW(sh_peek(&l->out->notify_seq)); /* continue the count, so that both halves of the word change */
    sh_notify_peer(nd, l); /* last: whoever sees the tag sees the cleared words */
    sh_fence(nd->wc);
    /* no notify_seq has the tag 0 and the count all ones: the next pump takes this for a change */
    __atomic_store_n(&l->last, 0xffffffffull, __ATOMIC_RELAXED);
}

/* Adopt the pair_inc that the peer's notify_seq carries now. The caller has ended the pair's connections. Returns it; 0: no peer. */
uint32_t sh_adopt(sh_node *nd, uint32_t peer)
{
    struct sh_link *l = &nd->links[peer];
    uint64_t notify_seq;

    if (!sh_may_write(nd))
        return 0;
    notify_seq = sh_load(&l->in->notify_seq, nd->wc);
    l->peer_inc = SH_HIGH(notify_seq);
    l->moved++;
    sh_know_peer(nd, peer, 1);
    l->users_tag = l->peer_inc;
    l->msg_tail = l->msg_head = l->msg_acked = l->asked = 0;
    l->news = l->suspected = l->unread = 0;
    __atomic_store_n(&l->last, notify_seq, __ATOMIC_RELAXED);
    for (uint32_t w = 0; w < nd->words; w++) {
        l->open[w] = 0;
        l->a[w] = sh_load(&l->t_in[w], nd->wc);
        sh_put(&l->a_out[w], l->a[w]);
    }
    sh_put(&l->out->users, SH_PACK(l->users_tag, l->users));
    sh_store(&l->out->outbox, SH_PACK(l->peer_inc, 0), nd->wc);
    sh_store(&l->out->inbox, SH_PACK(l->peer_inc, 0), nd->wc);
    sh_fence(nd->wc);
    sh_notify_peer(nd, l);
    /* poll everything, regardless of bits and notify_seq */
    if (sh_mail(nd, l)) {
        l->news |= SH_NEWS_MAIL;
        nd->attention = 1;
    }
    return l->peer_inc;
}

/* 1: the link is as it was adopted. 0: notify_seq carries another pair_inc, which tells a restart from a violation. SH_EMPTY: none was adopted. */
int sh_adopted(sh_node *nd, uint32_t peer)
{
    const struct sh_link *l = &nd->links[peer];

    if (!sh_may_write(nd))
        return SH_STALE;
    return l->peer_inc ? sh_inc_now(nd, l) == l->peer_inc : SH_EMPTY;
}
