/* wake.c - going to sleep, and kicking peers that sleep. A doorbell is a hint: what happened stands in memory, where each pass polls the known
 * peers and each sleep begins by polling all of them. A doorbell that does not come costs time only. */
#include "foreign.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FLOOD 1000           /* times within a second that the doorbell was heard and nothing had moved */
#define DECIDE_NS 100000000u /* a doorbell that did not come within this is lost */

/* preadv2() by its number: glibc has it from 2.26 on, musl from 1.2.5, and a wheel is for older ones, too. */
static ssize_t read_now(int fd, struct iovec *v)
{
    return syscall(SYS_preadv2, fd, v, 1L, -1L, -1L, RWF_NOWAIT); /* at -1: as read() does */
}

/* ---- waking others ---- */

/* All who share an eventfd share its flags: one of them may have made it blocking and filled it, and then the write blocks. The heartbeat sees that
 * with its next beats, and makes room (sh_unstick). The poll() before it suffices where nobody means harm. */
static void kick_eventfd(sh_node *nd, struct sh_link *l)
{
    uint64_t one = 1;
    ssize_t done = 0;
    void *held;

    if (__atomic_load_n(&l->stuck, __ATOMIC_RELAXED))
        return;
    held = sh_let_go(nd);
    __atomic_store_n(&nd->kicking, ++nd->kick_count << 8 | (uint64_t)(l - nd->links), __ATOMIC_RELEASE);
    if (poll(&(struct pollfd){.fd = l->kick_fd, .events = POLLOUT}, 1, 0) == 1)
        done = write(l->kick_fd, &one, sizeof one);
    __atomic_store_n(&nd->kicking, 0, __ATOMIC_SEQ_CST);
    /* Briefly, as the heartbeat does not block there. Once we return, the descriptor may be closed, and its number be another's. */
    while (__atomic_load_n(&nd->unsticking, __ATOMIC_SEQ_CST))
        sched_yield();
    sh_take_back(nd, held);
    (void)done;
}

/* Called by the heartbeat at each beat. If the same kick lasts since the last beat, its eventfd is full and blocking: empty it. `kicking` and
 * `unsticking` keep the descriptor from being closed meanwhile: either we see that the kick has ended, or kick_eventfd() sees us, and waits. */
void sh_unstick(sh_node *nd, uint64_t *seen)
{
    uint64_t kicking = __atomic_load_n(&nd->kicking, __ATOMIC_ACQUIRE), taken;

    if (kicking && kicking == *seen) {
        struct sh_link *l = &nd->links[kicking & 0xff];
        struct iovec v = {.iov_base = &taken, .iov_len = sizeof taken};

        ssize_t got = 0;

        __atomic_store_n(&nd->unsticking, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&nd->kicking, __ATOMIC_SEQ_CST) == kicking) {
            __atomic_store_n(&l->stuck, 1, __ATOMIC_RELAXED);
            got = read_now(l->kick_fd, &v);
        }
        __atomic_store_n(&nd->unsticking, 0, __ATOMIC_RELEASE);
        if (got < 0)
            return; /* somebody else has made room */
    }
    *seen = kicking;
}

static void send_kick(sh_node *nd, struct sh_link *l, uint64_t *word)
{
    ssize_t done = 0;

    if (l->wake_out == SH_WAKE_OUT_FUTEX) { /* the low half, as we are little-endian */
        done = syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        if (!sh_knows_us(l)) /* the peer does not know us yet, so it does not wait for our kicked_for */
            done = syscall(SYS_futex, l->sleep_seq, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    } else if (l->wake_out == SH_WAKE_OUT_EVENTFD)
        kick_eventfd(nd, l);
    else if (l->wake_out == SH_WAKE_OUT_REGISTER) /* else LOST: we have no way to the doorbell that it relies on; kicked_for tells it that we tried */
        done = pwrite(l->kick_fd, &l->kick_value, sizeof l->kick_value, (off_t)l->kick_at);
    (void)done; /* full, or gone: the peer polls before long */
}

/* Kick that peer if it sleeps. One kick per sleep is enough: before it sleeps again it polls everybody, under a new sleep_seq. The futex is
 * kicked_for and not notify_seq: a pass may see notify_seq before the FUTEX_WAKE for it comes, which would then be lost. */
static void kick(sh_node *nd, struct sh_link *l)
{
    uint64_t sleep, *word;

    if (l->wake_out == SH_WAKE_OUT_NONE)
        return;
    sh_fence(nd->wc); /* SYNC F2: notify_seq before the load of sleep_seq; partner: R2, sleep_seq before the loads of notify_seq */
    sleep = sh_sleep_of(nd, l);
    if (!(sleep & SH_SLEEPS) || sleep == l->kicked) {
        nd->n[SH_N_SUPPRESSED]++;
        return;
    }
    l->kicked = sleep; /* SYNC WAKE: no other kick for this sleep; partner: sh_wake_up, which ends it */
    word = sleep & SH_SLEEPS_LONG ? &l->out->kicked_for : &l->out->ended_nap;
    sh_store(word, sleep, nd->wc); /* SYNC KICK, SYNC NAP: the word before its futex; partners: heartbeat.c, run; sh_nap */
    nd->n[sleep & SH_SLEEPS_LONG ? SH_N_KICKS : SH_N_ENDED_NAPS]++;
    send_kick(nd, l, word);
}

/* From here on the peer is kicked in this way; at once, if it was notified while there was none. */
void sh_set_wake_out(sh_node *nd, uint32_t peer, int kind, int fd, uint64_t offset, uint32_t value)
{
    struct sh_link *l = &nd->links[peer];
    int newly = (l->wake_out == SH_WAKE_OUT_NONE || l->wake_out == SH_WAKE_OUT_LOST) && kind != l->wake_out;

    if (fd != l->kick_fd)
        __atomic_store_n(&l->stuck, 0, __ATOMIC_RELAXED);
    l->wake_out = kind;
    l->kick_fd = fd;
    l->kick_at = offset;
    l->kick_value = value;
    if (!newly)
        return;
    l->kicked = 0;
    if (sh_may_write(nd))
        kick(nd, l);
}

void sh_notify_peer(sh_node *nd, struct sh_link *l)
{
    l->count++;
    nd->n[SH_N_NOTIFICATIONS]++;
    sh_store(&l->out->notify_seq, SH_PACK(l->my_inc, l->count), nd->wc);
    kick(nd, l);
}

/* ---- being woken ---- */

static void set_bit(uint64_t *mask, uint32_t peer, int on)
{
    if (on)
        __atomic_fetch_or(mask, 1ull << peer, __ATOMIC_RELAXED);
    else
        __atomic_fetch_and(mask, ~(1ull << peer), __ATOMIC_RELAXED);
}

void sh_know_peer(sh_node *nd, uint32_t peer, int known) { set_bit(&nd->known_peers, peer, known); }

/* Note whether anybody is there, and how that peer wakes us. */
void sh_set_wake_in(sh_node *nd, uint32_t peer, int wake_in, int there)
{
    struct sh_link *l = &nd->links[peer];

    if (l->wake_in == wake_in && l->there == there)
        return; /* keep what was found out about its doorbells */
    l->there = there;
    __atomic_store_n(&l->wake_in, wake_in, __ATOMIC_RELAXED);
    l->missed = 0;
    nd->losses -= l->loss_sleep != 0;
    l->loss_sleep = 0;
    sh_know_peer(nd, peer, there);
    set_bit(&nd->must_poll, peer, there && wake_in == SH_WAKE_IN_NOT);
    set_bit(&nd->end_no_naps, peer, there && wake_in != SH_WAKE_IN_FUTEX);
    set_bit(&nd->by_futex, peer, there && (wake_in & SH_WAKE_IN_FUTEX));
    nd->kick = 1;
}

int sh_must_poll(sh_node *nd, uint32_t peer) { return (__atomic_load_n(&nd->must_poll, __ATOMIC_RELAXED) >> peer) & 1; }

/* Has one of those peers moved its notify_seq since the pump last saw it? */
int sh_any_notified(const sh_node *nd, uint64_t of)
{
    for (uint32_t j = 0; j < nd->g.peers && of >> j; j++)
        if ((of >> j & 1) && sh_peek(&nd->links[j].in->notify_seq) != __atomic_load_n(&nd->links[j].last, __ATOMIC_RELAXED)
            && !sh_rate_limited(&nd->links[j]))
            return 1;
    return 0;
}

static void set_sleep(sh_node *nd, uint64_t sleep)
{
    __atomic_store_n(&nd->sleep, sleep, __ATOMIC_RELEASE); /* before others can kick for it, as the heartbeat compares their kicked_for with it */
    sh_store(nd->sleep_seq_at, sleep, nd->wc);
}

static int wake(sh_node *nd)
{
    int slept = nd->sleep & SH_SLEEPS;

    if (slept)
        set_sleep(nd, (nd->sleep | SH_SLEEPS_LONG) + 1);
    return slept;
}

/* The loop is about to wait, and nothing is owed a pass. 1: wait; a peer with news kicks from here on. 0: somebody was quicker. */
int sh_sleep(sh_node *nd)
{
    if (!sh_may_write(nd))
        return 1; /* the pump reports it (SH_STALE) */
    if (!(nd->sleep & SH_SLEEPS)) {
        nd->slept_received = __atomic_load_n(&nd->n[SH_N_RECEIVED], __ATOMIC_RELAXED);
        set_sleep(nd, nd->sleep | SH_SLEEPS | SH_SLEEPS_LONG);
    }
    sh_fence(nd->wc); /* SYNC R2: sleep_seq before the loads of notify_seq; partner: F2, notify_seq before the load of sleep_seq */
    if (!sh_any_notified(nd, SH_ALL))
        return 1;
    __atomic_store_n(&nd->strangers, 1, __ATOMIC_RELAXED);
    return 0;
}

/* The loop is awake, and a pass follows: peers need not kick. SYNC WAKE: sleep_seq (even), then, before the next sleep, a load of every
 * notify_seq (sh_sleep); partner: kick, once per sleep. */
void sh_wake_up(sh_node *nd)
{
    if ((nd->sleep & SH_SLEEPS) && sh_may_write(nd)) {
        wake(nd);
        nd->woke = 1;
    }
}

#define SYS_FUTEX_WAITV 449

long sh_wait_for_any(const struct sh_waiter *w, uint32_t n, uint64_t until)
{
    struct timespec t = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};

    if (n == 1) /* the older call is quicker; it, too, takes an absolute time */
        return syscall(SYS_futex, w->uaddr, FUTEX_WAIT_BITSET, (uint32_t)w->val, &t, NULL, FUTEX_BITSET_MATCH_ANY);
    return syscall(SYS_FUTEX_WAITV, w, n, 0, &t, CLOCK_MONOTONIC);
}

/* Is one of those peers awake, or about to be, as it was kicked? The others say nothing by themselves. */
static int is_any_awake(const sh_node *nd, uint64_t of)
{
    int awake = 0;

    for (; of; of &= of - 1) {
        const struct sh_link *l = &nd->links[__builtin_ctzll(of)];
        uint64_t sleep = sh_sleep_of(nd, l);

        awake |= !(sleep & SH_SLEEPS) || sleep == l->kicked;
    }
    return awake;
}

/* Sleep, with neither the loop nor the heartbeat, until a known peer kicks us, but not beyond that time. Nothing is owed a pass. 0: the time is over, or
 * no peer is awake. */
int sh_nap(sh_node *nd, uint64_t until)
{
    struct sh_waiter w[SH_MAX_PEERS];
    uint64_t there = 0;
    uint32_t n = 0;
    int woken = 1;

    for (uint64_t m = nd->known_peers; m; m &= m - 1) {
        struct sh_link *l = &nd->links[__builtin_ctzll(m)];

        if (!l->there)
            continue;
        there |= m & -m;
        w[n++] = (struct sh_waiter){.val = SH_LOW(sh_ended_nap(nd, l)), .uaddr = (uintptr_t)&l->in->ended_nap, .flags = SH_WAIT_32};
    }
    if (!is_any_awake(nd, there) || (nd->sleep & SH_SLEEPS) || !sh_may_write(nd))
        return 0;
    nd->n[SH_N_NAPS]++;
    set_sleep(nd, nd->sleep | SH_SLEEPS); /* SYNC NAP: ended_nap before the loads of notify_seq; partner: kick */
    sh_fence(nd->wc); /* SYNC R2: sleep_seq before the loads of notify_seq; partner: F2 */
    if (!sh_any_notified(nd, nd->known_peers))
        woken = sh_wait_for_any(w, n, until) >= 0 || errno == EAGAIN;
    wake(nd);
    if (!woken && !is_any_awake(nd, there))
        nd->vain_ns = sh_clock();
    return woken;
}

/* Our doorbell was written `times` times since it was last heard. 1: too often nothing had moved when it was heard: do not listen to it for a while. */
int sh_received(sh_node *nd, uint64_t times)
{
    uint64_t now;

    if (!sh_may_write(nd))
        return 0;
    __atomic_fetch_add(&nd->n[SH_N_RECEIVED], times, __ATOMIC_RELAXED);
    for (uint32_t j = 0; j < nd->g.peers; j++) { /* a peer whose doorbells were lost, and whose kicked_for names this sleep: they arrive again */
        struct sh_link *l = &nd->links[j];
        if (l->missed && sh_kicked_for(nd, l) == nd->sleep) {
            l->missed = 0;
            set_bit(&nd->must_poll, j, 0);
        }
    }
    __atomic_store_n(&nd->strangers, 1, __ATOMIC_RELAXED); /* a doorbell does not say whose it was */
    if (sh_any_notified(nd, SH_ALL))
        return 0;
    __atomic_fetch_add(&nd->n[SH_N_SPURIOUS], times, __ATOMIC_RELAXED);
    now = sh_clock();
    if (now - nd->flood_ns > 1000000000u) {
        nd->flood_ns = now;
        nd->flood = 0;
    }
    return ++nd->flood >= FLOOD;
}

/* Empty an eventfd, without waiting, even if others that share it made it blocking. Returns what was in it. */
uint64_t sh_drain(int fd)
{
    uint64_t times = 0;
    struct iovec v = {.iov_base = &times, .iov_len = sizeof times};
    ssize_t got = read_now(fd, &v);

    if (got < 0 && errno == EOPNOTSUPP && poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, 0) == 1) /* before Linux 5.8 */
        got = read(fd, &times, sizeof times);
    return got == (ssize_t)sizeof times ? times : 0;
}

/* Empty our doorbell's eventfd. Returns what sh_received() does. */
int sh_hear(sh_node *nd, int fd)
{
    uint64_t times = sh_drain(fd);

    return times ? sh_received(nd, times) : 0;
}

/* ---- doorbells that do not come ---- */

/* Does the peer's kicked_for name that sleep? It names another before long, so it is loaded at each occasion. */
static void says_it_kicked(const sh_node *nd, struct sh_link *l)
{
    l->loss_kicked |= sh_kicked_for(nd, l) == l->loss_sleep;
}

/* A pass found a notify_seq that moved while we slept. If no kick has come by now, one may have been lost. sh_lost() decides that later, as the
 * peer may be about to kick, or may have seen us awake. */
void sh_suspect_loss(sh_node *nd, struct sh_link *l, uint64_t now)
{
    if ((l->wake_in & SH_WAKE_IN_DOORBELL) && !l->loss_sleep && __atomic_load_n(&nd->n[SH_N_RECEIVED], __ATOMIC_RELAXED) == nd->slept_received) {
        nd->losses++;
        l->loss_sleep = nd->sleep - 1;
        l->loss_ns = now;
        l->loss_received = nd->slept_received;
        l->loss_kicked = 0;
        says_it_kicked(nd, l);
    }
}

/* Decide about losses that are old enough; the caller has drained all doorbells. If the peer's kicked_for named that sleep and nothing came, the
 * doorbell is lost, and the peer is polled until one arrives. Returns a mask of the peers whose doorbells are newly found to be lost. */
uint64_t sh_lost(sh_node *nd)
{
    uint64_t now = sh_clock(), lost = 0;

    if (!sh_may_write(nd))
        return 0;
    for (uint32_t j = 0; nd->losses && j < nd->g.peers; j++) {
        struct sh_link *l = &nd->links[j];

        if (!l->loss_sleep)
            continue;
        says_it_kicked(nd, l);
        if (now - l->loss_ns < DECIDE_NS)
            continue;
        if (l->loss_kicked) {
            int came = __atomic_load_n(&nd->n[SH_N_RECEIVED], __ATOMIC_RELAXED) != l->loss_received;

            if (!came && !l->missed) {
                nd->n[SH_N_HEALED]++;
                lost |= 1ull << j;
            }
            l->missed = !came;
            set_bit(&nd->must_poll, j, !came);
        }
        l->loss_sleep = 0;
        nd->losses--;
    }
    return lost;
}
