/* races.c - three parties, a thread and a heartbeat each, over one mapping, under ThreadSanitizer: SECONDS SEED. A party may leave, and claim its section
 * anew once nobody reads it; no byte is lost, misread or another's, and nobody takes anybody for a liar. With COPIES_MAY_RACE that is all. Without it
 * nobody lets go of what others may be copying, and ThreadSanitizer sees the copies too.
 *
 * SECONDS SEED scribble, under AddressSanitizer: one more thread writes what it likes, where it likes. */
#include "party.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

static uint8_t *base;
static uint64_t bytes, until, seed;
static sh_geometry g;
static struct party parties[PARTIES];
static int scribbles;
static uint64_t all_calls, all_read, all_lives, scribbled, steps;
static pthread_barrier_t meet;
static _Thread_local uint64_t noise, my_steps;

static uint64_t random64(void)
{
    if (!noise)
        noise = seed * 0x9e3779b97f4a7c15ull + (uintptr_t)&noise;
    noise ^= noise << 13;
    noise ^= noise >> 7;
    return noise ^= noise << 17;
}

void step(void)
{
    uint64_t r = random64();

    my_steps++;
    if (r % 64 == 0)
        sched_yield();
    else if (r % 16384 == 1)
        usleep(r >> 40 & 255);
    else if (r % 8 == 2)
        for (uint64_t i = r >> 20 & 127; i; i--)
            sh_pause();
}

uint32_t choose(struct party *p, uint32_t below)
{
    (void)p;
    return below ? (uint32_t)(random64() >> 20) % below : 0;
}

int trusts(const struct party *p, uint32_t peer) { return (void)p, (void)peer, !scribbles; }
#ifdef COPIES_MAY_RACE
int may_drop(void) { return 1; }
#else
int may_drop(void) { return 0; }
#endif
int any_fd(void) { return -1; }

void start_heart(struct party *p)
{
    p->event_fd = eventfd(0, EFD_NONBLOCK);
    memset(p->heart, 0, sh_heartbeat_bytes());
    expect(!sh_heartbeat_start(p->heart, p->nd, p->event_fd, -1, 20000000, 1000000, 1), "no thread");
}

static void stop_heart(struct party *p)
{
    sh_heartbeat_stop(p->heart, 1);
    close(p->event_fd);
}

void wait_for_heart(struct party *p) { poll(&(struct pollfd){.fd = p->event_fd, .events = POLLIN}, 1, 40); }
void beat_once(struct party *p) { (void)p; }

static void rounds(struct party *p, int n)
{
    for (int i = 0; i < n; i++) {
        sh_safety(p->nd);
        party_pass(p, 80);
        party_drain(p);
        sched_yield();
    }
}

#ifdef COPIES_MAY_RACE
/* Leave, and begin another life in the same section as soon as nobody reads it. */
static void live_again(struct party *p)
{
    struct sh_section *s = (struct sh_section *)sh_section_at(base, &g, p->self);

    sh_store(&s->state, SH_STATE_LEFT, 0);
    sh_node_inert(p->nd);
    stop_heart(p);
    sh_store(&s->claim, 0, 0);
    for (uint32_t j = 0; j < PARTIES; j++)
        while (j != p->self && is_read(p, j) && sh_clock() < until)
            sched_yield();
    party_attach(p, base, &g, p->self);
    __atomic_fetch_add(&all_lives, 1, __ATOMIC_RELAXED);
}
#endif

static void *live(void *arg)
{
    struct party *p = arg;

    party_attach(p, base, &g, (uint32_t)(p - parties));
    pthread_barrier_wait(&meet);
    while (sh_clock() < until) {
        if (sh_node_is_inert(p->nd)) { /* the scribbler hit the claim word */
            sh_store((uint64_t *)(uintptr_t)p->nd->claim_at, p->nd->claim, 0);
            sh_node_own(p->nd);
        }
        party_step(p);
#ifdef COPIES_MAY_RACE
        if (random64() % 20000 == 0 && !scribbles)
            live_again(p);
#endif
    }
    if (!scribbles) {
        rounds(p, 100);
        pthread_barrier_wait(&meet);
        rounds(p, 100);
        pthread_barrier_wait(&meet);
        rounds(p, 100);
        party_audit(p);
        pthread_barrier_wait(&meet);
    }
    stop_heart(p);
    __atomic_fetch_add(&all_calls, calls, __ATOMIC_RELAXED);
    __atomic_fetch_add(&all_read, p->read, __ATOMIC_RELAXED);
    __atomic_fetch_add(&steps, my_steps, __ATOMIC_RELAXED);
    return NULL;
}

static void *scribble(void *arg)
{
    uint64_t *words = (uint64_t *)base, old;

    while (sh_clock() < until) {
        uint64_t i = random64() % (bytes / 8 - SH_PAGE / 8) + SH_PAGE / 8, r = random64();

        if (r % 4) /* those that matter */
            i = SH_PAGE / 8 + r / 4 % PARTIES * (g.section_bytes / 8) + r / 64 % (g.arena_off / 8);
        if ((i - SH_PAGE / 8) % (g.section_bytes / 8) == 0)
            continue;
        old = __atomic_load_n(&words[i], __ATOMIC_RELAXED);
        old = r >> 60 < 5 ? random64() : r >> 60 < 9 ? old ^ 1ull << (r >> 40 & 63) : r >> 60 < 12 ? old + (r >> 32 & 255) - 128 : old + (1ull << SH_GEN_SHIFT);
        __atomic_store_n(&words[i], old, __ATOMIC_RELAXED);
        scribbled++;
        if (r % 32 == 0)
            usleep(1);
    }
    return arg;
}

int main(int argc, char **argv)
{
    pthread_t threads[PARTIES + 1];
    int n = PARTIES;

    expect(argc > 2, "SECONDS SEED [scribble]");
    seed = strtoull(argv[2], NULL, 0);
    scribbles = argc > 3;
    until = sh_clock() + strtoull(argv[1], NULL, 0) * 1000000000u;
    bytes = SH_PAGE + PARTIES * (256 << 10);
    base = aligned_alloc(SH_PAGE, bytes);
    memset(base, 0, bytes);
    region_format(base, bytes, 7, &g);
    pthread_barrier_init(&meet, NULL, PARTIES);
    for (int i = 0; i < PARTIES; i++)
        pthread_create(&threads[i], NULL, live, &parties[i]);
    if (scribbles)
        pthread_create(&threads[n++], NULL, scribble, NULL);
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    printf("calls of the core: %lu, steps of theirs: %lu, bytes read: %lu, lives: %lu, words scribbled: %lu\n", (unsigned long)all_calls,
           (unsigned long)steps, (unsigned long)all_read, (unsigned long)(PARTIES + all_lives), (unsigned long)scribbled);
    return 0;
}
