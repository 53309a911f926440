/* pump.c - the pass over what peers said: O(peers) words when idle, O(active slots) under load, however many are open. And when the next pass is due: at once, or
 * when the heartbeat or a doorbell wakes the loop. */
#include "foreign.h"

#define CREDIT_CAP_NS 5000000u /* how long passes may be in vain at a stretch */
#define SAFE_SLOTS 1024        /* slots that one safety poll looks at */
#define AHEAD 16 /* slots whose words are fetched at the same time */
#define SKIP_NS 50000u         /* a pass so soon after the last may be left out */
#define BRIDGE_NS 100000000u   /* for so long after a socket was ready during a spin, one counts as likely to be next */

/* ---- a pass ---- */

/* How much this node said so far. */
static uint64_t said(const sh_node *nd) { return nd->n[SH_N_WRITES] + nd->n[SH_N_NOTIFICATIONS]; }

/* The bytes that are there are going to be read, and most likely answered: have the lines on their way that the peer had last. */
static void foresee(const sh_ep *ep)
{
    sh_prefetch_bytes(ep);
    sh_prefetch_write(&ep->mine->tx_word);
    sh_prefetch_write(ep->tx + (ep->tail & (ep->tx_bytes - 1)));
    sh_prefetch_write(ep->tx + ((ep->tail + SH_LINE) & (ep->tx_bytes - 1)));
}

/* Collect from the peers in the mask `of`, act on their messages, and poll the ready slots. Fills out[] with events (enum sh_event), at most max of
 * them; what does not fit is kept for the next pass. Returns how many. */
static int pass(sh_node *nd, uint64_t *out, int max, uint64_t of, uint64_t now)
{
    int n = 0;

    nd->attention = 0;
    nd->said_ahead = said(nd);
    for (uint32_t k = 0, j = nd->start; k < nd->g.peers; k++, j = j + 1 < nd->g.peers ? j + 1 : 0) {
        struct sh_link *l = &nd->links[j];

        if (!(of >> j & 1))
            continue;
        if (sh_has_news(l)) {
            if (nd->woke)
                sh_suspect_loss(nd, l, now);
            sh_collect(nd, l);
        }
        if (!l->news)
            continue;
        if (n >= max / 2) { /* the rest is for slots */
            nd->attention = 1;
            continue;
        }
        if (l->news & SH_NEWS_TAG) {
            out[n++] = (uint64_t)SH_EV_ADOPT << 24 | j;
            l->news = 0;
        } else if (l->news & SH_NEWS_MAIL) {
            l->news &= ~SH_NEWS_MAIL;
            n += sh_messages(nd, j, out + n, max / 2 - n);
        }
        if (l->news & SH_NEWS_OFFENCE) {
            out[n++] = (uint64_t)l->offences << 32 | SH_EV_OFFENCE << 24 | j;
            l->news &= ~SH_NEWS_OFFENCE;
            l->offences = 0;
        }
    }
    SH_EACH(slot, &nd->later) { /* collected just now, and nobody waits for them */
        if (nd->eps[slot].closing) {
            sh_set_remove(&nd->later, slot);
            sh_ep_closing(&nd->eps[slot], sh_poll_at(&nd->eps[slot], now));
        }
    }
    nd->woke = 0;
    nd->start = nd->start + 1 < nd->g.peers ? nd->start + 1 : 0;
    while (n < max && sh_set_any(&nd->ready)) {
        uint32_t slots[AHEAD], k = 0;

        while (k < AHEAD && n + (int)k < max && sh_set_any(&nd->ready)) { /* round and round, so that no slot is always last */
            int64_t slot = sh_set_next(&nd->ready, nd->next_ready);

            nd->next_ready = slot == SH_NOBODY ? 0 : (uint64_t)slot + 1;
            if (slot == SH_NOBODY)
                continue;
            sh_set_remove(&nd->ready, (uint64_t)slot);
            slots[k++] = (uint32_t)slot;
            if (nd->eps[slot].theirs)
                sh_prefetch(&nd->eps[slot].theirs->tx_word);
        }
        for (uint32_t i = 0; i < k; i++) {
            sh_ep *ep = &nd->eps[slots[i]];
            int bits = sh_poll_at(ep, now);

            if (ep->closing) {
                sh_ep_closing(ep, bits);
                continue;
            }
            if (bits & SH_POLL_DATA)
                foresee(ep);
            out[n++] = (uint64_t)ep->gen << 40 | (uint64_t)bits << 32 | SH_EV_SLOT << 24 | slots[i];
        }
    }
    return n;
}

/* Touched slots that nobody has read since: the pass that follows polls them. */
static void queue_later(sh_node *nd)
{
    SH_EACH(slot, &nd->later) {
        if (!sh_set_has(&nd->touched, slot))
            sh_set_add(&nd->ready, slot);
        sh_set_remove(&nd->later, slot);
    }
}

/* Atomic, as the heartbeat publishes it with the beat. */
static uint64_t count_pump(sh_node *nd)
{
    uint64_t pumps = nd->n[SH_N_PUMPS] + 1;

    __atomic_store_n(&nd->n[SH_N_PUMPS], pumps, __ATOMIC_RELAXED);
    return pumps;
}

/* Make a pass that begins a turn. Returns what pass() does, or SH_STALE. */
int sh_pump(sh_node *nd, uint64_t *out, int max)
{
    uint64_t now, of = SH_ALL;

    if (!sh_may_write(nd))
        return SH_STALE;
    now = sh_turn(nd);
    if (count_pump(nd) % 16 && !nd->attention && !__atomic_load_n(&nd->strangers, __ATOMIC_RELAXED))
        of = nd->known_peers; /* each notify_seq is on a page of its own, and loading cold ones would cost more than all the rest */
    else
        __atomic_store_n(&nd->strangers, 0, __ATOMIC_RELAXED);
    sh_ask_again(nd, now);
    queue_later(nd);
    sh_rearm_touched(nd);
    return pass(nd, out, max, of, now);
}

/* Is nothing owed a pass? Then the loop may sleep, once the heartbeat is armed. */
int sh_quiet(sh_node *nd)
{
    return !nd->attention && !sh_set_any(&nd->ready) && !sh_set_any(&nd->later) && !sh_set_any(&nd->touched);
}

static int is_due(const sh_node *nd, uint64_t slot)
{
    return sh_set_has(&nd->ready, slot) || sh_set_has(&nd->later, slot) || sh_set_has(&nd->touched, slot);
}

/* Has anything happened to this slot of which nobody told? WANT is published without a notification: it is seen when bytes are read. */
static int is_suspicious(sh_node *nd, const sh_ep *ep)
{
    if (((sh_load(&ep->theirs->tx_word, nd->wc) ^ ep->tx_last) & ~SH_WANT) || ((ep->flags & SH_WANT) && sh_head_moved(ep))) {
        sh_set_add(&nd->ready, ep->slot);
        return 1;
    }
    return (sh_toggled(nd, ep->link, SH_WORD(ep->slot)) & SH_BIT(ep->slot)) != 0;
}

/* The safety poll, which needs no notification. What it finds is made ready; it counts as healed only if a whole period later still no
 * notification has spoken of it (else that was merely on its way). Returns how many links were suspicious. */
int sh_safety(sh_node *nd)
{
    uint64_t quiet = 0, suspects = 0;
    int64_t slot;

    if (!sh_may_write(nd))
        return 0;
    for (uint32_t j = 0; j < nd->g.peers; j++) {
        struct sh_link *l = &nd->links[j];
        uint64_t seq = sh_load(&l->in->notify_seq, nd->wc);

        if (sh_rate_limited(l)) {
            __atomic_store_n(&l->rate_limited, 0, __ATOMIC_RELEASE);
            nd->kick = 1;
            l->weighed_ns = sh_clock();
            l->polls = l->moved = 0;
            sh_collect(nd, l);
            continue;
        }
        if (l->suspected && l->suspect == seq)
            nd->n[SH_N_HEALED]++;
        l->suspected = 0;
        if (!l->peer_inc || seq != l->last)
            continue;
        quiet |= 1ull << j;
        if (sh_mail(nd, l) && !(l->news & SH_NEWS_MAIL) && !l->unread) {
            l->news |= SH_NEWS_MAIL;
            nd->attention = 1;
            suspects |= 1ull << j;
        }
    }
    slot = sh_set_next(&nd->open, nd->next_safe);
    for (int k = 0; k < SAFE_SLOTS && slot != SH_NOBODY; k++, slot = sh_set_next(&nd->open, (uint64_t)slot + 1)) {
        const sh_ep *ep = &nd->eps[slot];

        if (quiet >> ep->peer & 1 && !is_due(nd, (uint64_t)slot) && is_suspicious(nd, ep))
            suspects |= 1ull << ep->peer;
    }
    nd->next_safe = slot == SH_NOBODY ? 0 : (uint64_t)slot;
    for (uint64_t m = suspects; m; m &= m - 1) {
        struct sh_link *l = &nd->links[__builtin_ctzll(m)];

        sh_collect_all(nd, l);
        l->suspected = 1;
        l->suspect = l->last;
    }
    return __builtin_popcountll(suspects);
}

/* ---- when the next one comes ---- */

/* The engine wants a pass at that time, even if nothing happens until then. */
void sh_due(sh_node *nd, uint64_t at_ns) { nd->due_ns = at_ns; }

/* The pump stays hot for hot_ns after something moved, and for hot_turns passes in vain at most. */
void sh_hot(sh_node *nd, uint64_t hot_ns, uint64_t hot_turns, int one_cpu)
{
    nd->hot_ns = hot_ns;
    nd->hot_turns = hot_turns;
    nd->one_cpu = one_cpu;
    nd->pumped_ns = nd->hit_ns = sh_clock();
    nd->gap_ns = UINT64_MAX;
    nd->credit_ns = CREDIT_CAP_NS;
}

/* How much peers moved so far: bytes, messages, and space where it was waited for. That keeps the pump hot. Own writes do not count: one request
 * and its reply shall not make the pump hot. */
uint64_t sh_moved(sh_node *nd) { return nd->n[SH_N_READS] + nd->moved_messages + nd->moved_space; }

/* Was the last pass less than 50 us ago? A caller that polls its own ring may leave one out: a pass would acknowledge its toggle, and the peer
 * would have to notify again. */
int sh_pumped_just_now(sh_node *nd, uint64_t now) { return now - nd->pumped_ns < SKIP_NS; }

static void spoke(sh_node *nd, int own)
{
    uint8_t *next = &nd->own_next[nd->own_last];

    *next = (uint8_t)(own ? *next + (*next < 3) : *next - (*next > 0));
    nd->own_last = (uint8_t)own;
}

/* Learn who speaks after whom: peers, who moved something or not in the last pass, or this node, before and after it. */
static void learn(sh_node *nd, int moved)
{
    uint64_t now = said(nd), before = moved ? nd->said_ahead : now;

    if (before != nd->said)
        spoke(nd, 1);
    if (moved)
        spoke(nd, 0);
    if (now != before)
        spoke(nd, 1);
    nd->said = now;
}

/* Is it most likely for this node to speak next, and are there sockets that would have it speak? A bridge waits for peers and for sockets in turn, and a spin
 * for peers while a socket is next only keeps the program behind that socket from the CPU. */
int sh_is_next(const sh_node *nd, uint64_t now) { return nd->own_next[nd->own_last] > 1 && now - nd->ready_ns < BRIDGE_NS; }

/* After a pass: is another to follow at once? 0: no. 1: something is owed a pass, here or (`owed`) by the caller. 2: the pump is hot: something moved
 * lately, and shortly before that as well, and passes in vain have used no more than a quarter of the time. 3: it is hot, but yield this CPU first:
 * the peer that is to answer may need it. */
int sh_stay_hot(sh_node *nd, uint64_t now, int owed)
{
    uint64_t moved = sh_moved(nd), since = now - nd->pumped_ns, credit = nd->credit_ns;
    int hot = now - nd->hit_ns < nd->hot_ns;

    nd->pumped_ns = now;
    learn(nd, moved != nd->hit_moved);
    if (moved != nd->hit_moved) {
        nd->hit_moved = moved;
        nd->gap_ns = now - nd->hit_ns;
        nd->hit_ns = now;
        nd->idle_turns = 0;
        credit += since;
        hot = nd->hot_ns > 0;
    } else {
        nd->idle_turns++;
        credit = !hot ? credit + since / 4 : credit > since ? credit - since : 0;
    }
    nd->credit_ns = credit < CREDIT_CAP_NS ? credit : CREDIT_CAP_NS;
    if (!hot || sh_is_next(nd, now) || nd->gap_ns >= nd->hot_ns || !nd->credit_ns || nd->idle_turns >= nd->hot_turns)
        return owed || !sh_quiet(nd);
    return nd->idle_turns || nd->one_cpu ? 3 : 2;
}

/* Did a notify_seq move, or one of the slots that were read since the last pass? The toggles of those are still unacknowledged, so their peer
 * need not notify of more, and they are polled themselves. */
static int news(sh_node *nd)
{
    int found = nd->attention;

    for (uint64_t m = nd->known_peers; m; m &= m - 1) {
        struct sh_link *l = &nd->links[__builtin_ctzll(m)];
        found |= sh_has_news(l);
    }
    SH_EACH(slot, &nd->touched) {
        sh_ep *ep = &nd->eps[slot];
        uint64_t p = sh_peek(&ep->theirs->tx_word);

        sh_prefetch_bytes(ep);
        if (p == ep->tx_last && !sh_space_came(ep))
            continue;
        if (p & SH_WANT) { /* the peer waits for the space of what was read, and must be told of that as well */
            sh_rearm_touched(nd);
            queue_later(nd);
            return 1;
        }
        sh_set_add(&nd->ready, ep->slot);
    }
    return found || sh_set_any(&nd->ready);
}

/* Make another pass in the same turn, when nothing else is to be run: busy-poll for up to ns, from `now` on. Returns what sh_pump() does;
 * 0: nothing came, or the budget of the turn is used up. */
int sh_pump_more(sh_node *nd, uint64_t *out, int max, uint64_t now, uint64_t ns)
{
    uint64_t end = now + ns, yield_at = sh_yield_at(nd, now);
    int n;

    if (!sh_may_write(nd))
        return SH_STALE;
    queue_later(nd); /* no task is about to read them, or it would run first */
    for (uint32_t k = 1; now && now < end && !sh_over_at(nd, now); k++) {
        if (news(nd) && (n = pass(nd, out, max, nd->known_peers, now))) { /* 0: the notification spoke of what was read already */
            nd->quick |= k > 1 && now < yield_at;
            return n;
        }
        if ((nd->spin_yield_ns || nd->alone) && k % 8) {
            sh_pause();
            continue;
        }
        now = sh_clock_and_yield(nd, &yield_at, end);
    }
    return (!now || now >= end) && news(nd) ? pass(nd, out, max, nd->known_peers, sh_clock()) : 0;
}
