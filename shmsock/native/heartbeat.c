/* heartbeat.c - one native thread per node, without the GIL and with all signals blocked. It beats ten times a second (five times,
 * by two, while all is silent) as long as the section is still ours, wakes the sleeping loop when a notify_seq moved or the loop's
 * time has come, and tells of peers under the same kernel whose lock fell. Peers under the same kernel wake it by a futex
 * (kicked_for), those with doorbells wake the loop themselves; only the others are polled. */
#include "foreign.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define POLL_MIN_NS 20000u  /* the shortest pause between two polls */
#define LONG_NS 1000000000u /* silence after which it beats and polls less often */
#define FLOOD 1000          /* kicks for nothing, within a second, that are too many */

struct sh_heartbeat {
    sh_node *nd;
    pthread_t thread;
    int event_fd, lock_fd;
    uint64_t beat_ns, cap_ns;
    int futexes;       /* peers may wake us by futexes */
    uint32_t wake;     /* futex: the owner adds 1 to it to wake this thread */
    int armed, stop;   /* atomic */
    int ended;         /* the thread was joined, or (in a forked child) never existed */
    uint64_t deadline; /* atomic: the first beat after this wakes the loop */
    uint64_t retry;    /* atomic: this moment wakes it */
    uint64_t moved;    /* sh_moved() when the loop last fell asleep */
    int fresh;         /* atomic: something has moved since: poll often at first */
    uint64_t watched;  /* peers whose section lock lives under this kernel */
    uint64_t unlocked; /* of those: the lock is gone, hence the process */
    uint64_t beat, kicking;
    uint32_t beats, vain;
    struct kicks { /* by one peer, in this second */
        uint32_t kicked_for; /* the word as last seen */
        uint32_t changes;    /* of the word: an honest peer changes it once for each of our sleeps at most */
        uint32_t nothing;    /* kicks that ended a sleep while no notify_seq had moved */
    } kicks[SH_MAX_PEERS];
    uint64_t slept; /* our sleep_seq word when this second began */
};

#define GET(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define SET(x, v) __atomic_store_n(&(x), v, __ATOMIC_RELEASE)

static void wake_owner(sh_heartbeat *k)
{
    uint64_t one = 1;

    __atomic_store_n(&k->nd->beaten, 1, __ATOMIC_RELAXED);
    while (write(k->event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* Returns whether a lock fell. */
static int poll_locks(sh_heartbeat *k)
{
    uint64_t gone = 0;

    for (uint64_t m = GET(k->watched); m; m &= m - 1)
        if (sh_lock_fell(k->lock_fd, (uint32_t)__builtin_ctzll(m)))
            gone |= m & -m;
    __atomic_fetch_or(&k->unlocked, gone, __ATOMIC_ACQ_REL);
    return gone != 0;
}

/* Counters that people and tools may want of a node, behind the bytes in and out: modulo 2^32, as their line has no room for more. */
static const uint8_t SHOWN[] = {SH_N_READS, SH_N_WRITES, SH_N_SPIN_HITS, SH_N_SPIN_MISSES, SH_N_KICKS, SH_N_RECEIVED, SH_N_SPURIOUS, SH_N_HEALED};
static_assert(sizeof SHOWN == 2 * (SH_COUNTS - 2), "two in each word behind the first two");

/* Which counter (SH_N_*) stands there among the words of 32 bits behind the first two words; -1: none does. */
int sh_shown(uint32_t i) { return i < sizeof SHOWN ? SHOWN[i] : -1; }

static uint64_t counted(sh_node *nd, int which) { return __atomic_load_n(&nd->n[which], __ATOMIC_RELAXED); }

/* `tenths` of a second have passed since the last beat. */
static void beat(sh_heartbeat *k, uint64_t now, uint64_t tenths)
{
    sh_node *nd = k->nd;
    struct sh_section *mine = (struct sh_section *)(uintptr_t)nd->claim_at; /* claim is the section's first word */

    if (sh_load(&((struct sh_header *)nd->base)->region_id, nd->wc) != nd->region_id || sh_load(&mine->claim, nd->wc) != nd->claim) {
        if (!__atomic_exchange_n(&nd->inert, 1, __ATOMIC_ACQ_REL))
            wake_owner(k); /* somebody took our section, or zeroed the region: store nothing more, fail the node */
        return;
    }
    sh_unstick(nd, &k->kicking);
    sh_put(&mine->pumps, counted(nd, SH_N_PUMPS));
    sh_put(&mine->counts[0], counted(nd, SH_N_BYTES_IN));
    sh_put(&mine->counts[1], counted(nd, SH_N_BYTES_OUT));
    for (int i = 2; i < SH_COUNTS; i++)
        sh_put(&mine->counts[i], SH_PACK(counted(nd, SHOWN[2 * i - 3]), counted(nd, SHOWN[2 * i - 4])));
    sh_store(&mine->beat, k->beat += tenths, nd->wc);
    if (poll_locks(k) || !GET(k->armed) || now >= GET(k->deadline))
        wake_owner(k); /* the loop's only clock: by it the pump samples peers, and is counted, so that others see a loop that stands still */
}

/* ---- kicks by futex ---- */

#define WAIT_PRIVATE 128u

static void count(sh_heartbeat *k, int which) { __atomic_fetch_add(&k->nd->n[which], 1, __ATOMIC_RELAXED); }

/* Can words of the region be waited for? 0; or SH_NO_FUTEX: before Linux 5.16, in a container that forbids it, or in memory of a device. */
int sh_futex_works(void *base, uint64_t offset)
{
    uint64_t word = (uint64_t)(uintptr_t)base + offset;
    struct sh_waiter w = {.val = __atomic_load_n((const uint32_t *)(uintptr_t)word, __ATOMIC_RELAXED) + 1u, .uaddr = word, .flags = SH_WAIT_32};

    return sh_wait_for_any(&w, 1, sh_clock() + 1) == 0 || errno == EAGAIN || errno == ETIMEDOUT ? 0 : SH_NO_FUTEX;
}

/* Wake the heartbeat of that section's owner, as somebody who has no section: it looks whose lock fell. */
void sh_knock(void *base, const sh_geometry *g, uint32_t section)
{
    syscall(SYS_futex, &((struct sh_section *)sh_section_at(base, g, section))->sleep_seq, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Fill in what to wait for: the owner's wake, the own sleep_seq word, by which strangers wake us, and the kicked_for of others as it is now. */
static uint32_t load_kicks(sh_heartbeat *k, uint32_t seen, struct sh_waiter *w)
{
    uint32_t n = 2, sleeps = (uint32_t)(GET(k->nd->sleep) - k->slept) / 4;

    w[0] = (struct sh_waiter){.val = seen, .uaddr = (uintptr_t)&k->wake, .flags = SH_WAIT_32 | WAIT_PRIVATE};
    w[1] = (struct sh_waiter){.val = SH_LOW(sh_peek(k->nd->sleep_seq_at)), .uaddr = (uintptr_t)k->nd->sleep_seq_at, .flags = SH_WAIT_32};
    for (uint64_t m = GET(k->nd->by_futex); k->futexes && m; m &= m - 1) {
        struct sh_link *l = &k->nd->links[__builtin_ctzll(m)];
        struct kicks *r = &k->kicks[__builtin_ctzll(m)];
        uint32_t kicked_for;

        if (sh_rate_limited(l))
            continue;
        kicked_for = SH_LOW(sh_kicked_for(k->nd, l));
        r->changes += kicked_for != r->kicked_for;
        r->kicked_for = kicked_for;
        if (r->changes > sleeps + FLOOD / 2) /* before it makes vain reach FLOOD, after which nobody could wake us */
            sh_rate_limit(k->nd, l);
        w[n++] = (struct sh_waiter){.val = kicked_for, .uaddr = (uintptr_t)&l->in->kicked_for, .flags = SH_WAIT_32};
    }
    return n;
}

/* Has anybody kicked for this sleep, by the values in w? Each such kick is counted as received; that of a peer with a doorbell only if its
 * kicked_for is the word that woke us (`woke`), as it may have stored that and then written the doorbell. A peer that kicks for nothing a
 * thousand times a second is rate-limited until the next safety poll. */
static int kicked_for_this(sh_heartbeat *k, const struct sh_waiter *w, uint32_t n, uint64_t woke)
{
    uint32_t sleep = SH_LOW(GET(k->nd->sleep));
    int found = 0;

    for (uint32_t i = 2; i < n; i++) {
        if (w[i].val != sleep)
            continue;
        found = 1;
        for (uint32_t j = 0; j < k->nd->g.peers; j++) {
            struct sh_link *l = &k->nd->links[j];
            if ((uintptr_t)&l->in->kicked_for != w[i].uaddr || ((GET(l->wake_in) & SH_WAKE_IN_DOORBELL) && woke != w[i].uaddr))
                continue;
            count(k, SH_N_RECEIVED);
            if (sh_any_notified(k->nd, 1ull << j))
                continue;
            count(k, SH_N_SPURIOUS);
            if (++k->kicks[j].nothing >= FLOOD)
                sh_rate_limit(k->nd, l);
        }
    }
    return found;
}

/* Sleep until that time, until the owner wakes us, or until a peer kicks us by a futex. Returns the word that did. */
static uint64_t sleep_until(sh_heartbeat *k, const struct sh_waiter *w, uint32_t n, uint64_t until)
{
    struct timespec t = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};

    if (k->futexes) {
        long woken = sh_wait_for_any(w, n, until);
        k->vain += woken != 0 && (woken > 0 || errno != ETIMEDOUT); /* a peer woke us: in vain, unless something is found */
        if (woken == 1 && poll_locks(k)) /* a knock, maybe (sh_knock) */
            wake_owner(k);
        return woken > 0 ? w[woken].uaddr : 0;
    }
    syscall(SYS_futex, &k->wake, FUTEX_WAIT_BITSET_PRIVATE, w[0].val, &t, NULL, FUTEX_BITSET_MATCH_ANY); /* its clock is absolute */
    return 0;
}

static void new_second(sh_heartbeat *k)
{
    k->vain = 0;
    k->slept = GET(k->nd->sleep);
    for (uint32_t j = 0; j < SH_MAX_PEERS; j++)
        k->kicks[j].changes = k->kicks[j].nothing = 0;
}

static void *run(void *arg)
{
    sh_heartbeat *k = arg;
    uint64_t next_beat = sh_clock(), pause_ns = POLL_MIN_NS, since = next_beat, woke = 0, tenths = 1;
    int stranger = 0, found;

    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        struct sh_waiter w[2 + SH_MAX_PEERS];
        uint32_t seen = GET(k->wake), n;
        uint64_t now = sh_clock(), until, cap;

        if (GET(k->stop))
            break;
        if (now >= next_beat) {
            beat(k, now, tenths);
            /* Silent for a second, and all who could speak can kick us: beat half as often. In an emulated guest each wake costs 0.04 % of a CPU. */
            tenths = GET(k->armed) && GET(k->deadline) > now + 2 * k->beat_ns && now - since > LONG_NS && !GET(k->nd->must_poll) ? 2 : 1;
            next_beat = now + tenths * k->beat_ns;
            stranger = 1; /* poll strangers with each beat, as one that cannot kick yet is found by nothing else */
            if (++k->beats % 10 == 0)
                new_second(k);
        }
        /* SYNC KICK: kicked_for of others before armed and sleep; partner: send_kick, kicked_for before the futex. The loop does not wake us when it
         * falls asleep. But a peer that kicks for a sleep has seen that sleep: so either we see it here, too, or kicked_for is no longer as in w,
         * and the kernel does not let us wait. */
        n = load_kicks(k, seen, w);
        if (k->vain >= FLOOD) { /* woken in vain too often: for the rest of this second only the owner wakes us, and we poll */
            n = 1;
            stranger = 1;
        }
        if (!GET(k->armed) || GET(k->nd->inert)) {
            woke = sleep_until(k, w, n, next_beat);
            stranger |= woke == (uintptr_t)k->nd->sleep_seq_at;
            continue;
        }
        found = (now >= GET(k->retry)) | kicked_for_this(k, w, n, woke) | sh_any_notified(k->nd, GET(k->nd->known_peers)); /* a level, not an edge: this finds what came before arming, too */
        /* A stranger's wake of sleep_seq is lost if we were not waiting just then, be it for having been woken by another. */
        if (!found && (stranger || k->futexes) && sh_any_notified(k->nd, SH_ALL)) {
            SET(k->nd->strangers, 1);
            found = 1;
        }
        stranger = 0;
        if (found) {
            since = now;
            k->vain = 0;
            SET(k->armed, 0);
            wake_owner(k);
            sh_offer(k->nd, sh_clock()); /* on one CPU: whoever kicked us waits for the loop, not for this thread */
            continue;
        }
        until = n == 1 && now + k->cap_ns < next_beat ? now + k->cap_ns : next_beat;
        if (GET(k->nd->must_poll)) {
            if (__atomic_exchange_n(&k->fresh, 0, __ATOMIC_ACQ_REL))
                pause_ns = POLL_MIN_NS;
            until = now + pause_ns < until ? now + pause_ns : until;
            pause_ns += pause_ns / 4;
            cap = now - since > LONG_NS ? 4 * k->cap_ns : k->cap_ns; /* after a second of silence a peer's first word may wait a bit longer */
            if (pause_ns > cap)
                pause_ns = cap;
        }
        if (GET(k->retry) < until)
            until = GET(k->retry);
        woke = sleep_until(k, w, n, until);
        stranger = woke == (uintptr_t)k->nd->sleep_seq_at;
    }
    return NULL;
}

/* How much memory a heartbeat takes. The caller provides it, all zeros, as for a node. */
uint64_t sh_heartbeat_bytes(void) { return sizeof(sh_heartbeat); }

/* Start the thread. 0, or SH_NO_THREAD. */
int sh_heartbeat_start(sh_heartbeat *k, sh_node *nd, int event_fd, int lock_fd, uint64_t beat_ns, uint64_t cap_ns, int futexes)
{
    sigset_t all, old;
    int error;

    k->nd = nd;
    k->event_fd = event_fd;
    k->lock_fd = lock_fd;
    k->beat_ns = beat_ns;
    k->futexes = futexes;
    k->cap_ns = cap_ns > POLL_MIN_NS ? cap_ns : POLL_MIN_NS;
    k->beat = sh_peek(&((const struct sh_section *)nd->claim_at)->beat);
    k->slept = nd->sleep;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* a thread inherits the mask: Python's signals stay Python's */
    error = pthread_create(&k->thread, NULL, run, k);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (!error)
        pthread_setname_np(k->thread, "shmsock-beat"); /* 15 characters at most */
    return error ? SH_NO_THREAD : 0;
}

static void wake(sh_heartbeat *k)
{
    __atomic_add_fetch(&k->wake, 1, __ATOMIC_ACQ_REL);
    syscall(SYS_futex, &k->wake, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* The loop is about to wait, and nothing is owed a pass. 1: wait; the eventfd is filled when a notify_seq differs, and by the first
 * beat at or after due_ns (`hurry`: by the next). 0: somebody was quicker, pump again. It arms before R2 loads, as the heartbeat must watch all that
 * changes after these loads. */
int sh_heartbeat_arm(sh_heartbeat *k, int hurry)
{
    uint64_t moved = sh_moved(k->nd);

    if (moved != k->moved) {
        k->moved = moved;
        SET(k->fresh, 1);
    }
    SET(k->deadline, hurry ? 0 : k->nd->due_ns);
    SET(k->retry, k->nd->retry_ns);
    SET(k->armed, 1);
    if (!sh_sleep(k->nd)) {
        SET(k->armed, 0);
        return 0;
    }
    if (GET(k->nd->must_poll) || k->nd->kick || k->nd->retry_ns != UINT64_MAX)
        wake(k); /* it sleeps until the next beat, but is to poll more often, or to watch others */
    k->nd->kick = 0;
    return 1;
}

/* Empty the eventfd, before the pass and never after it: what comes in between must fill it again. Returns SH_HEARD_*: what else is due. */
int sh_heartbeat_heard(sh_heartbeat *k)
{
    if (!k->ended)
        sh_drain(k->event_fd);
    __atomic_store_n(&k->nd->beaten, 0, __ATOMIC_RELAXED);
    return (sh_heartbeat_unlocked(k) ? SH_HEARD_LOCK : 0) | (k->nd->losses ? SH_HEARD_SUSPECTED_LOSS : 0);
}

void sh_heartbeat_watch(sh_heartbeat *k, uint32_t peer, int locked)
{
    if (k->lock_fd < 0)
        return;
    __atomic_fetch_and(&k->unlocked, ~(1ull << peer), __ATOMIC_ACQ_REL);
    if (locked)
        __atomic_fetch_or(&k->watched, 1ull << peer, __ATOMIC_ACQ_REL);
    else
        __atomic_fetch_and(&k->watched, ~(1ull << peer), __ATOMIC_ACQ_REL);
}

uint64_t sh_heartbeat_unlocked(sh_heartbeat *k) { return GET(k->unlocked) & GET(k->watched); }

/* End the thread; `join` is 0 in a forked child, which has none. The eventfd is the caller's again, and later calls do nothing. */
void sh_heartbeat_stop(sh_heartbeat *k, int join)
{
    if (k->ended)
        return;
    k->ended = 1;
    if (join) {
        SET(k->stop, 1);
        wake(k);
        pthread_join(k->thread, NULL);
    }
    k->event_fd = k->lock_fd = -1;
}
