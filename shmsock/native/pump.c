/* pump.c - the pass over what peers said: O(peers) words when idle, O(active slots) under load. And when the next pass is due: at once, or
 * when the heartbeat or a doorbell wakes the loop. */
#include "foreign.h"

#define CREDIT_CAP_NS 5000000u /* how long passes may be in vain at a stretch */
#define SKIP_NS 50000u         /* a pass so soon after the last may be left out */

/* ---- a pass ---- */

/* Collect from the peers in the mask `of`, and poll the ready slots. Fills out[] with what a poll of the slot found << 32 | kind << 24 |
 * (slot or peer), at most max of them; what does not fit is kept for the next pass. Returns how many. */
static int pass(sh_node *nd, uint64_t *out, int max, uint64_t of, uint64_t now)
{
    int n = 0;

    nd->attention = 0;
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
        if (n == max) {
            nd->attention = 1;
            continue;
        }
        out[n++] = (uint64_t)(l->news & SH_NEWS_TAG ? SH_EV_ADOPT : SH_EV_MESSAGE) << 24 | j;
        l->unread = !(l->news & SH_NEWS_TAG);
        l->news = 0; /* sh_message_recv's caller reads until there is no more mail */
    }
    nd->woke = 0;
    nd->start = nd->start + 1 < nd->g.peers ? nd->start + 1 : 0;
    for (uint32_t k = 0, w = nd->start % nd->words; k < nd->words && n < max; k++, w = w + 1 < nd->words ? w + 1 : 0) {
        for (; nd->ready[w] && n < max; nd->ready[w] &= nd->ready[w] - 1) {
            uint32_t slot = w * 64 + (uint32_t)__builtin_ctzll(nd->ready[w]);
            out[n++] = (uint64_t)sh_poll_at(&nd->eps[slot], now) << 32 | SH_EV_SLOT << 24 | slot;
        }
    }
    return n;
}

/* Touched slots that nobody has read since: the pass that follows polls them. */
static void queue_later(sh_node *nd)
{
    for (uint32_t w = 0; w < nd->words; w++) {
        nd->ready[w] |= nd->later[w] & ~nd->touched[w];
        nd->later[w] = 0;
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
    queue_later(nd);
    sh_rearm_touched(nd);
    return pass(nd, out, max, of, now);
}

/* Is nothing owed a pass? Then the loop may sleep, once the heartbeat is armed. */
int sh_quiet(sh_node *nd)
{
    uint64_t any = nd->attention;

    for (uint32_t w = 0; w < nd->words; w++)
        any |= nd->ready[w] | nd->later[w] | nd->touched[w];
    return !any;
}

/* The safety poll, which needs no notification. What it finds is made ready; it counts as healed only if a whole period later still no
 * notification has spoken of it (else that was merely on its way). Returns how many links were suspicious. */
int sh_safety(sh_node *nd)
{
    int found = 0;

    if (!sh_may_write(nd))
        return 0;
    for (uint32_t j = 0; j < nd->g.peers; j++) {
        struct sh_link *l = &nd->links[j];
        uint64_t seq = sh_load(&l->in->notify_seq, nd->wc);
        int suspect = 0;

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
        for (uint32_t w = 0; w < nd->words; w++) {
            uint64_t due = nd->ready[w] | nd->later[w] | nd->touched[w];

            if (sh_toggled(nd, l, w) & l->open[w] & ~due)
                suspect = 1;
            for (uint64_t m = l->open[w] & ~due; m; m &= m - 1) {
                sh_ep *ep = &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)];
                /* WANT is published without a notification: it is seen when bytes are read */
                if (((sh_load(&ep->theirs->tx_word, nd->wc) ^ ep->tx_last) & ~SH_WANT)
                    || ((ep->flags & SH_WANT) && sh_head_moved(ep))) {
                    nd->ready[w] |= SH_BIT(ep->slot);
                    suspect = 1;
                }
            }
        }
        if (sh_mail(nd, l) && !(l->news & SH_NEWS_MAIL) && !l->unread) {
            l->news |= SH_NEWS_MAIL;
            nd->attention = 1;
            suspect = 1;
        }
        if (suspect) {
            sh_collect(nd, l);
            l->suspected = 1;
            l->suspect = seq;
            found++;
        }
    }
    return found;
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

/* After a pass: is another to follow at once? 0: no. 1: something is owed a pass, here or (`owed`) by the caller. 2: the pump is hot: something moved
 * lately, and shortly before that as well, and passes in vain have used no more than a quarter of the time. 3: it is hot, but yield this CPU first:
 * the peer that is to answer may need it. */
int sh_stay_hot(sh_node *nd, uint64_t now, int owed)
{
    uint64_t moved = sh_moved(nd), since = now - nd->pumped_ns, credit = nd->credit_ns;
    int hot = now - nd->hit_ns < nd->hot_ns;

    nd->pumped_ns = now;
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
    if (!hot || nd->gap_ns >= nd->hot_ns || !nd->credit_ns || nd->idle_turns >= nd->hot_turns)
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
    for (uint32_t w = 0; w < nd->words; w++) {
        for (uint64_t m = nd->touched[w]; m; m &= m - 1) {
            sh_ep *ep = &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)];
            uint64_t p = sh_peek(&ep->theirs->tx_word);

            sh_prefetch_bytes(ep);
            if (p == ep->tx_last && !sh_space_came(ep))
                continue;
            if (p & SH_WANT) { /* the peer waits for the space of what was read, and must be told of that as well */
                sh_rearm_touched(nd);
                queue_later(nd);
                return 1;
            }
            nd->ready[w] |= SH_BIT(ep->slot);
        }
        found |= nd->ready[w] != 0;
    }
    return found;
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
    for (uint32_t k = 1; now < end && !sh_over_at(nd, now); k++) {
        if (news(nd) && (n = pass(nd, out, max, nd->known_peers, now))) /* 0: the notification spoke of what was read already */
            return n;
        if ((nd->spin_yield_ns || nd->alone) && k % 8) {
            sh_pause();
            continue;
        }
        now = sh_clock_and_yield(nd, &yield_at);
    }
    return 0;
}
