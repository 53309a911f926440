/* spin.c - waits in C, with the GIL released: busy-polls a word of the peer, for a window that is learnt. */
#include "foreign.h"

#include <sched.h>

#define GATHER_NS 2000u
#define YIELD_NS 1000u /* how long to spin between two calls of sched_yield(), when nobody else ran in the last one */
#define LONG_NS 100000u   /* a yield that takes longer shows that the CPU is wanted by others than our peers */
#define QUICK_NS 10000u   /* how long to spin before a nap, where that pays */
#define SHORT_NS 4000u    /* who waits no longer than this does not nap */
#define NAP_MIN_NS 50000u /* as often as the loop is asked for other descriptors */

/* Would this CPU not come back soon if it was offered to others? Then spins nap instead, if all peers can end a nap. */
int sh_is_crowded(const sh_node *nd, uint64_t now)
{
    return SH_UNLIKELY(now < __atomic_load_n(&nd->crowded_ns, __ATOMIC_RELAXED)) && !__atomic_load_n(&nd->end_no_naps, __ATOMIC_RELAXED);
}

/* Offer this CPU to others. If it does not come back soon, and did not lately either, it is not offered again for 256 times as long: that takes 0.4 % of
 * the time. (Once proves nothing: everybody has something to do now and then.) Returns the clock; the heartbeat calls this, too. */
uint64_t sh_offer(sh_node *nd, uint64_t now)
{
    uint64_t then;

    if (sh_is_crowded(nd, now))
        return now;
    sched_yield();
    then = sh_clock();
    if (then - now > LONG_NS && then - __atomic_exchange_n(&nd->late_ns, then, __ATOMIC_RELAXED) < 512 * (then - now))
        __atomic_store_n(&nd->crowded_ns, then + 256 * (then - now), __ATOMIC_RELAXED);
    return then;
}

/* How long a nap may last: those in vain take a sixteenth of the time. (A short one costs most: the kernel has to set the CPU's timer for it, twice.) */
uint64_t sh_nap_ns(const sh_node *nd, uint64_t now)
{
    uint64_t ns = (now - nd->vain_ns) / 16;

    return ns < NAP_MIN_NS ? NAP_MIN_NS : ns < SH_NAP_MAX_NS ? ns : SH_NAP_MAX_NS;
}

/* Nap until a peer has news. 0: that cannot be, or there were none for too long. */
static int nap(sh_node *nd, uint64_t now)
{
    uint64_t ns = sh_nap_ns(nd, now);

    if (nd->ask_ns < now + NAP_MIN_NS / 2 && sh_asked(nd, now))
        return 0;
    SH_EACH(slot, &nd->touched)
        sh_acknowledge(&nd->eps[slot]);
    sh_fence(nd->wc); /* SYNC R1, SYNC W */
    SH_EACH(slot, &nd->touched) {
        const sh_ep *ep = &nd->eps[slot];

        if (sh_published(ep) || ((ep->tx_last | ep->flags) & SH_WANT)) /* space is told of by those who fall asleep, not here */
            return 0;
    }
    return sh_nap(nd, ns > NAP_MIN_NS ? now + ns : nd->ask_ns);
}

/* Returns the clock; from *yield_at on, yields this CPU before, as on one core the peer could not run otherwise. At each call; or once in
 * YIELD_NS, while nobody else wants the CPU. 0: this wait shall end. */
uint64_t sh_clock_and_yield(sh_node *nd, uint64_t *yield_at, uint64_t end)
{
    uint64_t now = sh_clock(), then;

    if (now < *yield_at)
        return now;
    if (sh_is_crowded(nd, now)) {
        nd->quick = 0;
        return now + SHORT_NS < end && nap(nd, now) ? sh_clock() : 0;
    }
    then = sh_offer(nd, now);
    if ((nd->alone = then - now < YIELD_NS))
        *yield_at = then + YIELD_NS;
    return then;
}

/* When a spin that begins now yields first. */
uint64_t sh_yield_at(sh_node *nd, uint64_t now)
{
    if (sh_is_crowded(nd, now)) /* a nap is next, which costs more than a short spin: if the peer has a CPU of its own, that is mostly enough */
        return nd->quick || nd->n[SH_N_NAPS] % 128 == 127 ? now + QUICK_NS : now;
    return now + (nd->alone ? YIELD_NS : nd->spin_yield_ns);
}

/* Make one step of a spin. Returns the clock; 0: other slots or messages have news, which ends the spin. */
static uint64_t spin_step(sh_node *nd, uint64_t *yield_at, uint64_t end)
{
    for (uint64_t m = nd->known_peers; m; m &= m - 1) {
        struct sh_link *l = &nd->links[__builtin_ctzll(m)];
        if (sh_has_news(l) && sh_collect(nd, l))
            return 0;
    }
    return sh_clock_and_yield(nd, yield_at, end);
}

static int nothing_ready(const sh_node *nd)
{
    return !nd->attention && !sh_set_any(&nd->ready);
}

/* Do bytes come seldom, and is the peer, which was kicked, still waking? That takes longer than our own sleep and wakeup. */
static int has_to_wake(const sh_node *nd, const struct sh_link *l, uint64_t now)
{
    return now - nd->hit_ns > nd->spin_max_ns && (l->kicked & SH_SLEEPS_LONG) && sh_peek(l->sleep_seq) == l->kicked;
}

/* A spin was in vain: the next is half as long. But now and then one is of full length again: where waking is slow, no wait without a spin is
 * short enough for sh_poll_at() to learn from. */
static void missed(sh_ep *ep, uint64_t window)
{
    ep->spun_ns = 0;
    ep->nd->n[SH_N_SPIN_MISSES]++;
    if (++ep->misses >= 16u << ep->patience) { /* ever less often, as a full spin costs most */
        ep->misses = 0;
        ep->patience += ep->patience < 6;
        ep->window_ns = ep->nd->spin_max_ns;
    } else
        ep->window_ns = window / 2 > 2000 ? window / 2 : 2000;
}

/* Busy-poll one word of the peer (its P or C) until it is no longer `seen`. 1: it is not. 0: suspend. SH_YIELD: the turn's
 * budget ended the spin before its window did: let the loop turn, and use the rest of the window then. */
int sh_spin_on(sh_ep *ep, const uint64_t *word, uint64_t seen, uint64_t now)
{
    sh_node *nd = ep->nd;
    uint64_t window = ep->window_ns < nd->spin_max_ns ? ep->window_ns : nd->spin_max_ns;
    uint64_t start = now, end = now + window - ep->spun_ns, yield_at;
    uint32_t k;

    if (!window || ep->orphan || ep->peer == nd->self || !nothing_ready(nd) || has_to_wake(nd, ep->link, now))
        return 0;
    if (ep->spun_ns >= window) {
        missed(ep, window);
        return 0;
    }
    yield_at = sh_yield_at(nd, now);
    sh_set_add(&nd->touched, ep->slot); /* this slot is polled: its toggle may stay unacknowledged */
    for (k = 1; !((sh_peek(word) ^ seen) & ~SH_IDLE_BITS); k++) {
        sh_prefetch_bytes(ep);
        if ((nd->spin_yield_ns || nd->alone) && k % 8) {
            sh_pause();
            continue;
        }
        now = spin_step(nd, &yield_at, end);
        if ((sh_peek(word) ^ seen) & ~SH_IDLE_BITS)
            break;
        if (!now)
            return 0;
        if (now >= end) {
            missed(ep, window);
            return 0;
        }
        if (sh_over_at(nd, now)) {
            ep->spun_ns += now - start;
            return SH_YIELD;
        }
    }
    nd->quick |= k > 1 && now < yield_at;
    ep->spun_ns = 0;
    ep->misses = ep->patience = 0;
    if (now - start > 4 * GATHER_NS)
        ep->one_way = 0;
    nd->n[SH_N_SPIN_HITS]++;
    ep->window_ns = window * 2 < nd->spin_max_ns ? window * 2 : nd->spin_max_ns;
    return 1;
}

/* Busy-poll for a message of that peer: the answer to a CONNECT comes within microseconds where its loop is awake. 1: there are some, for
 * sh_message_recv(). 0: they are left to the pump. A spin in vain makes the next one shorter, but for every 16th. */
int sh_spin_for_mail(sh_node *nd, uint32_t peer)
{
    struct sh_link *l = &nd->links[peer];
    uint64_t now = sh_clock(), end = now + (nd->spin_max_ns >> (l->mail_misses % 16 < 6 ? l->mail_misses % 16 : 6)), yield_at = sh_yield_at(nd, now);

    if (!sh_may_write(nd) || peer == nd->self || !nd->spin_max_ns || sh_over_at(nd, now) || has_to_wake(nd, l, now))
        return 0;
    for (uint32_t k = 1; nothing_ready(nd); k++) {
        sh_pause();
        if (k % 8 && !sh_has_news(l))
            continue;
        now = spin_step(nd, &yield_at, end);
        if (l->news == SH_NEWS_MAIL) {
            l->news = 0;
            l->mail_misses = 0;
            nd->attention = 0;
            for (uint64_t m = nd->known_peers; m; m &= m - 1)
                nd->attention |= nd->links[__builtin_ctzll(m)].news != 0;
            return 1;
        }
        if (!now || now >= end || sh_over_at(nd, now))
            break;
    }
    l->mail_misses += now >= end;
    return 0;
}

/* Bytes flow one way, in small pieces: polling P for each of them takes its line away from the writer each time, which slows down both sides.
 * So wait until some have gathered. Returns the clock. */
uint64_t sh_gather(sh_ep *ep, uint64_t now)
{
    uint64_t until = ep->polled_ns + GATHER_NS;

    for (int k = 0; k < 200 && now < until && nothing_ready(ep->nd); k++) { /* bounded, whatever the clock says */
        for (int i = 0; i < 4; i++)
            sh_pause();
        now = sh_clock();
    }
    return now;
}
