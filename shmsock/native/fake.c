/* fake.c - memory as lazy as x86 allows, for tests (only with SHMSOCK_FAKE_MEMORY). Every CPU has a store buffer: its own loads
 * see it, others do not until the test drains it, oldest first, or a fence does. A hook may run after any number of accesses,
 * in the middle of whatever the core is doing: that is where a test lets the other side run, or kills this one. */
#ifdef SHMSOCK_FAKE_MEMORY
#include "node.h"

#include <stdlib.h>

#define CPUS 72 /* a peer each, and some to spare */
#define STORES 65536
#define CHUNK 64

struct pending { uint8_t *at; uint32_t n; uint8_t bytes[CHUNK]; };
struct cpu { struct pending *q; uint32_t first, last, end; int cut; }; /* cut: what comes after `end` never reaches memory */

static struct cpu cpus[CPUS];
static int current;
static uint64_t now_ns, away_ns, yield_ns;
static int yields;
static void (*step_hook)(void);
static int step_left;
static char omitted[64];

static void step(void)
{
    if (step_hook && step_left > 0 && --step_left == 0)
        step_hook();
}

static void drain(struct cpu *c, uint32_t stores)
{
    for (; stores && c->first != (c->cut ? c->end : c->last); stores--, c->first++) {
        struct pending *s = &c->q[c->first % STORES];
        memcpy(s->at, s->bytes, s->n);
    }
}

static void push(void *at, const void *from, uint32_t n)
{
    struct cpu *c = &cpus[current];

    if (!c->q)
        c->q = malloc(STORES * sizeof *c->q);
    for (const uint8_t *b = from; n; ) {
        uint32_t m = n < CHUNK ? n : CHUNK;
        if (c->last - c->first == STORES)
            drain(c, 1);
        struct pending *s = &c->q[c->last++ % STORES];
        s->at = at;
        s->n = m;
        memcpy(s->bytes, b, m);
        at = (uint8_t *)at + m;
        b += m;
        n -= m;
    }
}

static void fetch(void *to, const void *from, uint32_t n)
{
    const struct cpu *c = &cpus[current];
    const uint8_t *lo = from, *hi = lo + n;

    memcpy(to, from, n);
    for (uint32_t i = c->first; i != c->last; i++) {
        const struct pending *s = &c->q[i % STORES];
        const uint8_t *a = s->at > lo ? s->at : lo, *b = s->at + s->n < hi ? s->at + s->n : hi;
        if (a < b)
            memcpy((uint8_t *)to + (a - lo), s->bytes + (a - s->at), (size_t)(b - a));
    }
}

uint64_t sh_fake_load(const uint64_t *p) { uint64_t v; step(); fetch(&v, p, sizeof v); return v; }
void sh_fake_store(uint64_t *p, uint64_t v) { step(); push(p, &v, sizeof v); }
void sh_fake_fence(const char *function)
{
    step();
    if (strcmp(function, omitted))
        drain(&cpus[current], UINT32_MAX);
}

void sh_fake_copy_out(void *to, const void *from, uint32_t n) { step(); push(to, from, n); }
void sh_fake_copy_in(void *to, const void *from, uint32_t n) { step(); fetch(to, from, n); }

int sh_fake_cas(uint64_t *p, uint64_t old, uint64_t new_)
{
    uint64_t now;

    sh_fake_fence(""); /* a locked instruction empties the buffer */
    fetch(&now, p, sizeof now);
    if (now != old)
        return 0;
    push(p, &new_, sizeof new_);
    drain(&cpus[current], UINT32_MAX);
    return 1;
}

uint64_t sh_clock(void) { return now_ns + away_ns; }

void sh_fake_reset(void)
{
    for (int i = 0; i < CPUS; i++)
        cpus[i].first = cpus[i].last = cpus[i].cut = 0;
    current = 0;
    omitted[0] = 0;
    step_hook = NULL;
    step_left = 0;
    now_ns = away_ns = yield_ns = 0;
}

void sh_fake_cpu(int cpu) { current = cpu; }
int sh_fake_pending(int cpu) { return (int)((cpus[cpu].cut ? cpus[cpu].end : cpus[cpu].last) - cpus[cpu].first); }
int sh_fake_drain(int cpu, int stores)
{
    uint32_t before = cpus[cpu].first;
    drain(&cpus[cpu], stores < 0 ? UINT32_MAX : (uint32_t)stores);
    return (int)(cpus[cpu].first - before);
}
void sh_fake_hook(void (*hook)(void), int steps) { step_hook = hook; step_left = steps; }
void sh_fake_time(uint64_t ns) { now_ns = ns; }

/* From here on each sched_yield() takes so long. Returns how many there were since the last call. */
int sh_fake_yields(uint64_t ns)
{
    int before = yields;

    yield_ns = ns;
    yields = 0;
    return before;
}

int sh_fake_yield(void)
{
    yields++;
    away_ns += yield_ns;
    return 0;
}

/* From here on nothing that this CPU stores reaches memory: its process dies now, in the middle of whatever it does. */
void sh_fake_cut(int cpu)
{
    if (!cpus[cpu].cut)
        cpus[cpu].end = cpus[cpu].last;
    cpus[cpu].cut = 1;
}

/* It is dead: forget what it did after the cut. What it had stored before is still drained. */
void sh_fake_bury(int cpu)
{
    if (cpus[cpu].cut)
        cpus[cpu].last = cpus[cpu].end;
    cpus[cpu].cut = 0;
}

/* Leave out the fences of one function of the core, to see that the tests miss them. "": none. */
void sh_fake_omit(const char *function)
{
    strncpy(omitted, function, sizeof omitted - 1);
}

/* What the heartbeat compares while the loop sleeps, seen from a CPU of its own. */
int sh_fake_any_notified(sh_node *nd)
{
    for (uint32_t j = 0; j < nd->g.peers; j++)
        if (!nd->links[j].rate_limited && nd->links[j].in->notify_seq != nd->links[j].last)
            return 1;
    return 0;
}
/* The size of the ring that is read. */
uint32_t sh_fake_rx_bytes(sh_ep *ep) { return ep->rx_bytes; }
/* Slots, or bytes of rings, of what that peer opened. */
/* CONNECTs that wait to be sent, or sent again; answers that do; CONNECTs without an answer. */
uint32_t sh_fake_asks(sh_node *nd, uint32_t peer, int which)
{
    uint32_t n = 0;

    for (uint32_t s = 0; which == 0 && s < nd->books->begun; s++)
        n += nd->eps[s].peer == peer && (nd->eps[s].state == SH_EP_WAITS || nd->eps[s].state == SH_EP_LATER);
    return which == 0 ? n : which == 1 ? nd->books->asks[peer].kept : nd->links[peer].asked;
}
uint64_t sh_fake_share(sh_node *nd, uint32_t peer, int bytes) { return bytes ? nd->books->share[peer].bytes : nd->books->share[peer].slots; }
#else
typedef int sh_fake_is_for_tests; /* ISO C wants a declaration */
#endif
