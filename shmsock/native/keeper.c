/* keeper.c - one native thread per node, without the GIL and with all signals blocked. It beats ten times a second as long as the
 * section is still ours and rings the loop each time, watches the bells while the loop sleeps, and tells of peers under the same
 * kernel whose lock fell. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LOOK_MIN_NS 20000u

struct sh_keeper {
    sh_node *nd;
    pthread_t thread;
    int event_fd, lock_fd;
    uint64_t beat_ns, cap_ns;
    uint32_t wake;     /* futex: bumped by the owner to end a sleep */
    int armed, stop;   /* atomic */
    uint64_t watched;  /* peers whose section lock lives under this kernel */
    uint64_t unlocked; /* of those: the lock is gone, hence the process */
    uint64_t beat;
};

#define GET(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define SET(x, v) __atomic_store_n(&(x), v, __ATOMIC_RELEASE)

static void ring_owner(sh_keeper *k)
{
    uint64_t one = 1;

    while (write(k->event_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static int bells_differ(const sh_node *nd)
{
    for (uint32_t j = 0; j < nd->g.peers; j++)
        if (!GET(nd->links[j].muted)
            && sh_peek(&nd->links[j].in->bell) != __atomic_load_n(&nd->links[j].last, __ATOMIC_RELAXED))
            return 1;
    return 0;
}

/* Locks are bytes of the region file, one per section, taken by its owner on its own open file description: the kernel drops
 * them when the process dies, however it dies. */
static void look_at_locks(sh_keeper *k)
{
    uint64_t gone = 0;

    for (uint64_t m = GET(k->watched); m; m &= m - 1) {
        struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = __builtin_ctzll(m), .l_len = 1};
        if (fcntl(k->lock_fd, F_OFD_GETLK, &fl) == 0 && fl.l_type == F_UNLCK)
            gone |= m & -m;
    }
    __atomic_fetch_or(&k->unlocked, gone, __ATOMIC_ACQ_REL);
}

static void beat(sh_keeper *k)
{
    sh_node *nd = k->nd;
    struct sh_section *mine = (struct sh_section *)(uintptr_t)nd->claim_at; /* claim is the section's first word */

    if (sh_load(&((struct sh_header *)nd->base)->region_id, nd->wc) != nd->region_id || sh_load(&mine->claim, nd->wc) != nd->claim) {
        if (!__atomic_exchange_n(&nd->inert, 1, __ATOMIC_ACQ_REL))
            ring_owner(k); /* somebody took our section, or zeroed the region: store nothing more, fail the node */
        return;
    }
    sh_put(&mine->pumps, nd->n[SH_N_PUMPS]);
    sh_store(&mine->beat, ++k->beat, nd->wc);
    look_at_locks(k);
    ring_owner(k); /* the loop's only clock: its pump samples peers, and counts, so that others see a loop that stands still */
}

static void sleep_until_woken(sh_keeper *k, uint32_t seen, uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};

    syscall(SYS_futex, &k->wake, FUTEX_WAIT_PRIVATE, seen, &t, NULL, 0);
}

static void *run(void *arg)
{
    sh_keeper *k = arg;
    uint64_t next_beat = sh_clock(), pause_ns = LOOK_MIN_NS;

    prctl(PR_SET_NAME, "shmsock-keeper");
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        uint32_t seen = GET(k->wake);
        uint64_t now = sh_clock(), rest;

        if (GET(k->stop))
            break;
        if (now >= next_beat) {
            beat(k);
            next_beat = now + k->beat_ns;
        }
        rest = next_beat - now;
        if (!GET(k->armed) || GET(k->nd->inert)) {
            pause_ns = LOOK_MIN_NS;
            sleep_until_woken(k, seen, rest);
            continue;
        }
        if (bells_differ(k->nd)) { /* level, not edge: what came before arming is found as well */
            SET(k->armed, 0);
            ring_owner(k);
            continue;
        }
        sleep_until_woken(k, seen, pause_ns < rest ? pause_ns : rest);
        pause_ns += pause_ns / 4;
        if (pause_ns > k->cap_ns)
            pause_ns = k->cap_ns;
    }
    return NULL;
}

sh_keeper *sh_keeper_start(sh_node *nd, int event_fd, int lock_fd, uint64_t beat_ns, uint64_t cap_ns, int *error)
{
    sh_keeper *k = calloc(1, sizeof *k);
    sigset_t all, old;

    *error = ENOMEM;
    if (!k)
        return NULL;
    k->nd = nd;
    k->event_fd = event_fd;
    k->lock_fd = lock_fd;
    k->beat_ns = beat_ns;
    k->cap_ns = cap_ns > LOOK_MIN_NS ? cap_ns : LOOK_MIN_NS;
    k->beat = sh_peek(&((const struct sh_section *)nd->claim_at)->beat);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* a thread inherits the mask: Python's signals stay Python's */
    *error = pthread_create(&k->thread, NULL, run, k);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (*error) {
        free(k);
        return NULL;
    }
    return k;
}

static void wake(sh_keeper *k)
{
    __atomic_add_fetch(&k->wake, 1, __ATOMIC_ACQ_REL);
    syscall(SYS_futex, &k->wake, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* armed: watch the bells and fill the eventfd at the first that differs. Not armed: only beat. */
void sh_keeper_arm(sh_keeper *k, int armed)
{
    if (GET(k->armed) == armed)
        return;
    SET(k->armed, armed);
    if (armed)
        wake(k);
}

void sh_keeper_watch(sh_keeper *k, uint32_t peer, int locked)
{
    if (k->lock_fd < 0)
        return;
    __atomic_fetch_and(&k->unlocked, ~(1ull << peer), __ATOMIC_ACQ_REL);
    if (locked)
        __atomic_fetch_or(&k->watched, 1ull << peer, __ATOMIC_ACQ_REL);
    else
        __atomic_fetch_and(&k->watched, ~(1ull << peer), __ATOMIC_ACQ_REL);
}

uint64_t sh_keeper_unlocked(sh_keeper *k) { return GET(k->unlocked) & GET(k->watched); }

void sh_keeper_stop(sh_keeper *k)
{
    if (!k)
        return;
    SET(k->stop, 1);
    wake(k);
    pthread_join(k->thread, NULL);
    free(k);
}
