/* link.c - a node, and its links to its peers: what their notify_seq says, how much they may say, and their lives. */
#include "foreign.h"

/* ---- life of a node ---- */

/* How much memory a node takes. The caller provides it, all zeros, and frees it. (A destructor of its own would be called by the collector
 * before those of objects that still use the node.) */
static uint64_t words_of(const sh_geometry *g) { return sh_set_words(g->slots); }

uint64_t sh_node_bytes(const sh_geometry *g)
{
    return sizeof(sh_node) + g->peers * (sizeof(struct sh_link) + 2 * words_of(g) * sizeof(uint64_t)) + 4 * sh_set_bytes(g->slots) + g->slots * sizeof(sh_ep)
        + sh_books_bytes(g);
}

sh_node *sh_node_new(void *memory, void *base, const sh_geometry *g, uint32_t self, int wc)
{
    sh_node *nd = memory;
    struct sh_section *mine = (struct sh_section *)sh_section_at(base, g, self);
    uint64_t *rest;

    nd->links = (struct sh_link *)(nd + 1);
    rest = (uint64_t *)(nd->links + g->peers);
    rest = sh_set_init(&nd->open, rest, g->slots);
    rest = sh_set_init(&nd->ready, rest, g->slots);
    rest = sh_set_init(&nd->touched, rest, g->slots);
    rest = sh_set_init(&nd->later, rest, g->slots);
    nd->base = base;
    nd->g = *g;
    nd->self = self;
    nd->wc = wc;
    nd->inert = 1; /* until claimed */
    nd->loop_fd = -1;
    nd->words = (uint32_t)words_of(g);
    nd->region_id = sh_load(&((struct sh_header *)base)->region_id, wc);
    nd->claim_at = &mine->claim;
    nd->sleep_seq_at = &mine->sleep_seq;
    nd->used_at = &mine->slots_used;
    for (uint32_t j = 0; j < g->peers; j++) {
        struct sh_link *l = &nd->links[j];
        uint8_t *out = (uint8_t *)sh_pair_at(base, g, self, j), *in = (uint8_t *)sh_pair_at(base, g, j, self);

        l->t = rest;
        l->a = l->t + nd->words;
        rest = l->a + nd->words;
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
    nd->eps = (sh_ep *)rest;
    sh_books_init(nd, nd->eps + g->slots);
    return nd;
}

/* The section is ours: step the generation of every slot that a former owner used, so that a peer that still holds it sees it gone. */
void sh_node_claim(sh_node *nd, uint64_t claim)
{
    struct sh_slot *slot = (struct sh_slot *)(sh_section_at(nd->base, &nd->g, nd->self) + nd->g.slot_off);
    uint64_t used = sh_peek(nd->used_at); /* SYNC USED: partner: sh_ep_new */

    nd->claim = claim;
    nd->owner = sh_thread();
    nd->used = used < nd->g.slots ? (uint32_t)used : nd->g.slots;
    for (uint32_t s = 0; s < nd->used; s++, slot++) {
        uint64_t gen = (uint64_t)((SH_GEN(sh_peek(&slot->tx_word)) + 1) & SH_GEN_MASK) << SH_GEN_SHIFT;

        sh_put(&slot->link, 0);
        sh_put(&slot->ring, gen);
        sh_put(&slot->tx_word, gen);
        sh_put(&slot->rx_word, gen);
    }
    nd->sleep = (sh_peek(nd->sleep_seq_at) + 4) & ~3ull; /* awake; and larger than any sleep for which a former owner was kicked */
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

struct found { uint32_t open, acked, ready; }; /* toggles: of slots that are open with the peer; acknowledged; whose slots are ready now */

/* Acknowledge our slot's toggle, if there is one. That of a slot that is not open with this peer is acknowledged, and that is all; that of a touched
 * slot stays as it is, as such slots are polled themselves. */
static void take_toggle(sh_node *nd, struct sh_link *l, uint32_t slot, struct found *f)
{
    uint32_t w = SH_WORD(slot);
    int open = sh_set_has(&nd->open, slot) && nd->eps[slot].link == l;

    if (!(sh_toggled(nd, l, w) & SH_BIT(slot)))
        return;
    if (open && sh_set_has(&nd->touched, slot))
        return; /* and is not counted: it would be again and again, while many are */
    f->open += (uint32_t)open;
    l->a[w] ^= SH_BIT(slot);
    sh_put(&l->a_out[w], l->a[w]);
    f->acked++;
    if (open && nd->eps[slot].closing)
        sh_set_add(&nd->later, slot); /* nobody waits for it: it ends no spin */
    else if (open) {
        sh_set_add(&nd->ready, slot);
        f->ready++;
    }
}

static void take_all_toggles(sh_node *nd, struct sh_link *l, struct found *f)
{
    uint32_t words = (uint32_t)sh_set_words(nd->used);

    sh_caused(nd, l, words / (8 * SH_LOG)); /* two lines of words cost about as much as a poll does, and who notified honestly moved SH_LOG things */
    for (uint32_t w = 0; w < words; w++)
        for (uint64_t m = sh_toggled(nd, l, w); m; m &= m - 1)
            take_toggle(nd, l, w * 64 + (uint32_t)__builtin_ctzll(m), f);
}

/* The slots that the peer notified since its notify_seq was `from`, up to `seq`, by the pair's log. 0: it may have been overwritten. */
static int take_logged(sh_node *nd, struct sh_link *l, uint32_t from, uint32_t seq, struct found *f)
{
    uint32_t slots[SH_LOG], n = 0;

    if (seq - from >= SH_LOG)
        return 0;
    for (uint32_t count = from; count != seq; n++)
        slots[n] = sh_logged(nd, l, ++count);
    if (sh_count_now(nd, l) - from >= SH_LOG) /* SYNC LOG: log before notify_seq; partner: sh_notify_slot */
        return 0;
    while (n--)
        if (slots[n] < nd->used)
            take_toggle(nd, l, slots[n], f);
    return 1;
}

static int collect(sh_node *nd, struct sh_link *l, int all)
{
    uint64_t seq = sh_load(&l->in->notify_seq, nd->wc); /* SYNC NOTIFY: notify_seq before toggles; partner: sh_notify_slot */
    uint32_t from = SH_LOW(l->last);
    struct found f = {0};

    __atomic_store_n(&l->last, seq, __ATOMIC_RELAXED);
    if (SH_HIGH(seq) != l->peer_inc) {
        l->news |= SH_NEWS_TAG;
        nd->attention = 1;
        sh_caused(nd, l, 1);
        return 1;
    }
    if (all || !take_logged(nd, l, from, SH_LOW(seq), &f))
        take_all_toggles(nd, l, &f);
    if (f.acked)
        sh_fence(nd->wc); /* SYNC R1: A before the load of P; partner: F1 */
    if (sh_mail(nd, l)) {
        l->news |= SH_NEWS_MAIL;
        nd->attention = 1;
    }
    sh_caused(nd, l, f.open ? f.open : 1);
    return f.ready || l->news;
}

/* Take over one peer's notify_seq: acknowledge its toggles, and make their open slots ready. It costs what the notifications speak of: their slots are
 * in the pair's log, and if there were too many for that, they share the cost of a look at all toggles. 1: the pump has something to do. */
int sh_collect(sh_node *nd, struct sh_link *l) { return collect(nd, l, 0); }

/* The same, looking at all toggles, be they notified or not. */
int sh_collect_all(sh_node *nd, struct sh_link *l) { return collect(nd, l, 1); }

/* Acknowledge this slot's toggle without polling: the caller fences, and polls then. 1: there was one. */
int sh_acknowledge(sh_ep *ep)
{
    struct sh_link *l = ep->link;
    uint32_t w = SH_WORD(ep->slot);

    if (!((sh_peek(&l->t_in[w]) ^ l->a[w]) & SH_BIT(ep->slot)))
        return 0;
    l->a[w] ^= SH_BIT(ep->slot);
    sh_put(&l->a_out[w], l->a[w]);
    return 1;
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

    SH_EACH(slot, &nd->ready)
        due += nd->eps[slot].link == l;
    l->weigh_at = due + SH_POLLS;
    if (l->polls < l->weigh_at)
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
        l->t[w] = l->a[w] = 0;
        sh_put(&l->t_out[w], 0);
        sh_put(&l->a_out[w], 0);
    }
    sh_put(&l->out->outbox, 0);
    sh_put(&l->out->inbox, 0);
    if (!l->users) /* else count and tag stay: what the peer left is still being read */
        sh_put(&l->out->users, 0);
    l->my_inc = pair_inc;
    l->peer_inc = l->msg_tail = l->msg_head = l->msg_acked = l->asked = nd->books->asks[peer].kept = 0;
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
    l->msg_tail = l->msg_head = l->msg_acked = l->asked = nd->books->asks[peer].kept = 0;
    l->news = l->suspected = l->unread = 0;
    __atomic_store_n(&l->last, notify_seq, __ATOMIC_RELAXED);
    for (uint32_t w = 0; w < nd->words; w++) {
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
