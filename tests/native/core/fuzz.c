/* fuzz.c - the core over memory that the fuzzer writes: libFuzzer's target, and a program that makes inputs itself (-DALONE), which is faster.
 *
 * An input is: a mode, a size, a kind of word, and then a program for three parties, mixed with lies. A load that is lied to gets the lie, and memory
 * may keep it. Three modes differ in who may lie:
 *   0  nobody. All bytes arrive, and nobody is taken for a liar.
 *   1  the third party's words, as the others load them, or one kind of them. The first two lose no byte, and take nobody but the third for a liar.
 *   2  every word of everybody, the own section's too.
 *   3  the same, and no load has the same twice: what is loaded is the fuzzer's (the claim word seldom, as it ends all).
 * In all of them: the sanitizers find nothing, who stores stores into the own section, each call ends, and the books agree at the end. */
#include "party.h"

#include <errno.h>
#include <stdarg.h>

#define WORST_LOADS 4000000u /* of one step: more is a loop without a bound */
#define STEPS 3000

struct world {
    uint8_t *base, *before;
    uint64_t bytes;
    sh_geometry g;
    struct party party[PARTIES];
};

static struct world worlds[2], *world;
static struct party *now_runs;
static const uint8_t *at, *end_of_input;
static uint32_t mode, kind_wanted, honest_for, loads, n_last;
static uint64_t old_words[16], noise, lies, inputs, now_ns;
static void *(*beat_run)(void *);
static void *beat_arg;
static uint32_t beats_left;
static _Thread_local int deep;

/* ---- input ---- */

static uint8_t next(void) { return at < end_of_input ? *at++ : 0; }

static uint64_t random64(void)
{
    noise ^= noise << 13;
    noise ^= noise >> 7;
    return noise ^= noise << 17;
}

uint32_t choose(struct party *p, uint32_t below)
{
    uint32_t x = next();

    (void)p;
    if (below > 256)
        x = x << 8 | next();
    return below ? x % below : 0;
}

int trusts(const struct party *p, uint32_t peer) { return mode == 0 || (mode == 1 && p->self < 2 && peer < 2); }

/* ---- lies ---- */

enum kind { K_SECTION, K_NOTIFY_SEQ, K_KICKED, K_LOG, K_OUTBOX, K_INBOX, K_USERS, K_TOGGLES, K_ACKS, K_MESSAGES, K_LINK, K_RING, K_P, K_C, K_ARENA, K_HEADER, KINDS };

/* What kind of word is it, and whose? */
static enum kind kind_of(const void *p, uint32_t *section)
{
    const sh_geometry *g = &world->g;
    uint64_t off = (uint64_t)((const uint8_t *)p - world->base);

    if (off < SH_PAGE)
        return K_HEADER;
    *section = (uint32_t)((off - SH_PAGE) / g->section_bytes);
    off = (off - SH_PAGE) % g->section_bytes;
    if (off < g->pair_off)
        return K_SECTION;
    if (off >= g->arena_off)
        return K_ARENA;
    if (off >= g->slot_off) {
        off = (off - g->slot_off) % sizeof(struct sh_slot);
        return off == SH_SLOT_RING ? K_RING : off == SH_SLOT_TX_WORD ? K_P : off == SH_SLOT_RX_WORD ? K_C : K_LINK;
    }
    off = (off - g->pair_off) % g->pair_bytes;
    if (off >= g->message_off)
        return K_MESSAGES;
    if (off >= g->toggle_off)
        return off >= g->ack_off ? K_ACKS : K_TOGGLES;
    return off == SH_PAIR_NOTIFY_SEQ ? K_NOTIFY_SEQ : off < SH_PAIR_LOG ? K_KICKED : off < SH_PAIR_ENDED_NAP ? K_LOG : off < SH_PAIR_OUTBOX ? K_KICKED
        : off == SH_PAIR_OUTBOX ? K_OUTBOX : off == SH_PAIR_INBOX ? K_INBOX : K_USERS;
}

static int is_lied_about(const void *p)
{
    uint32_t section = PARTIES;
    enum kind kind = kind_of(p, &section);

    expect(++loads < WORST_LOADS, "no end");
    if (mode == 0 || deep || kind == K_HEADER)
        return 0;
    if (mode == 1 && (section != 2 || now_runs->self == 2 || (kind_wanted < KINDS && kind != kind_wanted)))
        return 0;
    if (kind == K_SECTION && p == now_runs->nd->claim_at)
        return mode > 1 && random64() % 65536 == 0;
    if (mode == 3)
        return random64() % 4 != 0;
    if (honest_for) {
        honest_for--;
        return 0;
    }
    honest_for = next();
    return at < end_of_input;
}

static uint64_t bent(uint64_t v)
{
    uint32_t how = mode == 3 ? (uint32_t)random64() & 0xffff : next(), what = mode == 3 ? (uint32_t)random64() & 0xff : next();
    uint64_t x = 0;

    lies++;
    switch (how % 16) {
    case 0:
        for (int i = 0; i < 8; i++)
            x = x << 8 | (mode == 3 ? random64() & 0xff : next());
        return x;
    case 1:
    case 2:
        return v ^ 1ull << what % 64;
    case 3:
        return v + (int8_t)what;
    case 4:
        return (v & ~0xffffffffull) | (uint32_t)((uint32_t)v + (uint32_t)(int8_t)what);
    case 5:
        return (v & ~0xffffffffull) | (uint32_t)((uint32_t)v + (1u << what % 32));
    case 6:
        return v + ((uint64_t)(int8_t)what << SH_GEN_SHIFT);
    case 7:
        return v + ((uint64_t)what << SH_EPOCH_SHIFT);
    case 8:
        return v ^ (uint64_t)(what & 15) << SH_FIN_BIT;
    case 9:
        return v + ((uint64_t)(int8_t)what << SH_LOG2_SHIFT);
    case 10:
        return v + ((uint64_t)(int8_t)what << 32);
    case 11:
        return what & 1 ? ~0ull : 0;
    case 12:
    case 13: /* what stood somewhere before */
        return old_words[what % 16];
    default:
        return (v & ~0xffffull << what % 4 * 16) | (uint64_t)(mode == 3 ? random64() & 0xffff : choose(NULL, 65536)) << what % 4 * 16;
    }
}

uint64_t lie(const uint64_t *p, uint64_t truth)
{
    uint64_t v;

    old_words[n_last++ % 16] = truth;
    if (!is_lied_about(p))
        return truth;
    v = bent(truth);
    if (v & 1 && mode != 3)
        *(uint64_t *)(uintptr_t)p = v; /* and stays */
    return v;
}

/* What is copied out of an arena lies in one ring. (Tools look at 64 bytes anywhere.) */
static void is_in_a_ring(const uint8_t *from, uint32_t n)
{
    const sh_node *nd = now_runs->nd;

    for (uint32_t slot = 0; slot < nd->books->begun; slot++) {
        const sh_ep *ep = &nd->eps[slot];

        if ((ep->theirs && from >= ep->rx && from + n <= ep->rx + ep->rx_bytes) || (ep->tx && from >= ep->tx && from + n <= ep->tx + ep->tx_bytes))
            return;
    }
    expect(0, "%u copies %u bytes beyond a ring", now_runs->self, n);
}

void lie_in_copy(const void *from, void *copy, uint32_t n)
{
    uint32_t section = 0, where;
    uint64_t v = 0;

    if (n && n != 64 && kind_of(from, &section) == K_ARENA)
        is_in_a_ring(from, n);

    if (n < 4 || (n > 64 && kind_of(from, &section) == K_ARENA) || !is_lied_about(from))
        return;
    where = (mode == 3 ? (uint32_t)random64() % 65536 : choose(NULL, n)) % n & ~3u;
    memcpy(&v, (uint8_t *)copy + where, n - where < 8 ? n - where : 8);
    v = bent(v);
    memcpy((uint8_t *)copy + where, &v, n - where < 8 ? n - where : 8);
}

void may_store(const void *where, uint64_t n)
{
    const uint8_t *section = sh_section_at(world->base, &world->g, now_runs->self), *p = where;

    expect(p >= section && p + n <= section + world->g.section_bytes, "%u stores at %ld of its section", now_runs->self, (long)(p - section));
}

/* ---- the kernel, as it pleases ---- */

static void called(void)
{
    if (beats_left && --beats_left == 0 && !deep) {
        deep++;
        sh_heartbeat_stop(beat_arg, 1);
        deep--;
    }
}

int fake_clock_gettime(clockid_t clock, struct timespec *t)
{
    (void)clock;
    now_ns += 150;
    t->tv_sec = (time_t)(now_ns / 1000000000u);
    t->tv_nsec = (long)(now_ns % 1000000000u);
    return 0;
}

int fake_sched_yield(void) { return now_ns += next() == 255 ? 200000 : 900, 0; }

int fake_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    (void)timeout;
    (void)n;
    return fds->revents = next() % 4 ? 0 : fds->events, fds->revents != 0;
}

/* Waits and wakes of futexes; the core makes no other call in this way. */
long fake_syscall(long number, ...)
{
    uint32_t how = next(), n = 1;
    va_list more;

    va_start(more, number);
    if (number != SYS_futex) {
        (void)va_arg(more, void *);
        n = va_arg(more, uint32_t);
    }
    va_end(more);
    called();
    now_ns += how * 10000u;
    errno = how & 1 ? ETIMEDOUT : EAGAIN;
    return how % 4 == 3 ? (long)(how / 4 % n) : -1;
}

ssize_t fake_write(int fd, const void *from, size_t n)
{
    (void)fd;
    (void)from;
    called();
    if (next() == 255) {
        errno = EINTR;
        return -1;
    }
    return (ssize_t)n;
}

ssize_t fake_read(int fd, void *to, size_t n)
{
    (void)fd;
    memset(to, 1, n);
    return (ssize_t)n;
}

ssize_t fake_pwrite(int fd, const void *from, size_t n, off_t where)
{
    (void)fd;
    (void)from;
    (void)where;
    return (ssize_t)n;
}

/* The bytes that the ring is to have where they go. */
static ssize_t give(void *to, size_t n)
{
    sh_node *nd = now_runs->nd;

    may_store(to, n);
    if (next() % 16 == 1) {
        errno = next() % 2 ? EINTR : EAGAIN;
        return next() % 2 ? -1 : 0;
    }
    if (next() % 4 == 1)
        n = n / 2 + 1;
    for (uint32_t slot = 0; slot < nd->books->begun; slot++) {
        const sh_ep *ep = &nd->eps[slot];

        if (ep->state == SH_EP_OPEN && (uint8_t *)to >= ep->tx && (uint8_t *)to < ep->tx + ep->tx_bytes)
            put_bytes(ep, ep->tail, to, (uint32_t)n);
    }
    return (ssize_t)n;
}

ssize_t fake_pread(int fd, void *to, size_t n, off_t where)
{
    (void)fd;
    (void)where;
    return give(to, n);
}

ssize_t fake_recv(int fd, void *to, size_t n, int flags)
{
    (void)fd;
    (void)flags;
    return give(to, n);
}

ssize_t fake_send(int fd, const void *from, size_t n, int flags)
{
    uint32_t how = next();
    uint64_t sum = 0;

    (void)fd;
    (void)flags;
    for (size_t i = 0; i < n; i += 64) /* a sanitizer looks whether it may be read */
        sum += ((const uint8_t *)from)[i];
    noise += sum;
    errno = EAGAIN;
    return how % 8 == 1 ? -1 : how % 8 == 2 ? (ssize_t)(n / 2) : (ssize_t)n;
}

ssize_t fake_preadv2(int fd, const struct iovec *v, int n, off_t where, int flags)
{
    uint32_t how = next();

    (void)fd;
    (void)n;
    (void)where;
    (void)flags;
    memset(v->iov_base, how / 4 % 2, v->iov_len);
    errno = how % 2 ? EOPNOTSUPP : EAGAIN;
    return how % 4 < 2 ? (ssize_t)v->iov_len : -1;
}

int fake_fcntl(int fd, int command, struct flock *lock)
{
    (void)command;
    lock->l_type = next() % 4 == 1 ? F_UNLCK : F_WRLCK;
    return fd < 0 ? -1 : 0;
}

int fake_fstat(int fd, struct stat *s)
{
    (void)fd;
    s->st_size = next() % 16 == 1 ? SH_PAGE : (off_t)world->bytes;
    return next() % 16 == 1 ? -1 : 0;
}

int fake_madvise(void *where, size_t n, int advice)
{
    (void)advice;
    expect((uint8_t *)where >= world->base && (uint8_t *)where + n <= world->base + world->bytes, "beyond the region");
    errno = next() % 2 ? EINVAL : EFAULT;
    return next() % 4 == 1 ? -1 : 0;
}

int fake_posix_fallocate(int fd, off_t where, off_t n)
{
    (void)fd;
    expect(where >= 0 && where + n <= (off_t)world->bytes, "beyond the region");
    return next() % 4 == 1 ? ENOSPC : 0;
}

int fake_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *arg)
{
    (void)a;
    *t = 0;
    beat_run = run;
    beat_arg = arg;
    return next() == 255;
}

int fake_pthread_join(pthread_t t, void **result) { return (void)t, (void)result, 0; }
int fake_pthread_setname_np(pthread_t t, const char *name) { return (void)t, (void)name, 0; }
int fake_pthread_sigmask(int how, const sigset_t *set, sigset_t *old) { return (void)how, (void)set, (void)old, 0; }
int fake_prctl(int what, unsigned long value) { return (void)what, (void)value, 0; }

int may_drop(void) { return 1; }
int any_fd(void) { return (int)(next() % 4) - 1; }
void wait_for_heart(struct party *p) { (void)p; }

void start_heart(struct party *p)
{
    memset(p->heart, 0, sh_heartbeat_bytes());
    DO(sh_heartbeat_start(p->heart, p->nd, 1, (int)choose(p, 2) - 1, 100000000, 1000000, (int)choose(p, 2)));
}

/* Let the heartbeat's thread run for a while, here, and then be another. */
void beat_once(struct party *p)
{
    start_heart(p);
    if (choose(p, 2) && DO(sh_quiet(p->nd)))
        DO(sh_heartbeat_arm(p->heart, (int)choose(p, 2)));
    beats_left = 1 + choose(p, 40);
    beat_run(beat_arg);
    beats_left = 0;
    start_heart(p);
}

/* ---- worlds ---- */

static void make(struct world *w, uint32_t log2_slots, uint64_t section_bytes)
{
    w->bytes = SH_PAGE + PARTIES * section_bytes;
    w->base = aligned_alloc(SH_PAGE, w->bytes);
    w->before = malloc(w->bytes);
    memset(w->base, 0, w->bytes);
    world = w;
    mode = 0;
    region_format(w->base, w->bytes, log2_slots, &w->g);
    for (uint32_t i = 0; i < PARTIES; i++)
        party_attach(now_runs = &w->party[i], w->base, &w->g, i);
    for (int round = 0; round < 4; round++)
        for (uint32_t i = 0; i < PARTIES; i++)
            party_pass(now_runs = &w->party[i], 80);
    memcpy(w->before, w->base, w->bytes);
    for (uint32_t i = 0; i < PARTIES; i++)
        for (uint32_t k = 0; k < w->party[i].n_pieces; k++) {
            struct piece *x = &w->party[i].pieces[k];
            x->before = memcpy(malloc(x->bytes ? x->bytes : 1), x->at, x->bytes);
        }
}

static void restore(struct world *w)
{
    memcpy(w->base, w->before, w->bytes);
    for (uint32_t i = 0; i < PARTIES; i++) {
        struct party *p = &w->party[i];

        for (uint32_t k = 0; k < p->n_pieces; k++) {
            struct piece *x = &p->pieces[k];
            struct sh_books *b = x->at, *before = x->before;

            if (x->at != p->nd->books) {
                memcpy(x->at, x->before, x->bytes);
                continue;
            }
            /* megabytes, of which little is used */
            memcpy(b, before, offsetof(struct sh_books, asks));
            memset(b->asks, 0, offsetof(struct sh_queue, answer));
            for (uint32_t j = 0; j < PARTIES; j++)
                memset(&b->asks[j], 0, offsetof(struct sh_queue, answer));
            memcpy(&b->later, &before->later, offsetof(struct sh_books, port) - offsetof(struct sh_books, later));
            for (uint32_t port = 0; port < 1024; port++)
                b->port[port] = before->port[port];
            memcpy(&b->by_theirs, &before->by_theirs, sizeof *b - offsetof(struct sh_books, by_theirs));
        }
        p->late = 0;
        memset(p->offences, 0, sizeof p->offences);
    }
}

/* The lies are over. What the honest ones wrote arrives. */
static void end_well(void)
{
    uint32_t was = mode;

    for (int round = 0; mode < 2 && round < 40; round++) {
        for (uint32_t i = 0; i < (was ? 2 : PARTIES); i++) {
            struct party *p = now_runs = &world->party[i];

            loads = 0;
            if (round == 5)
                for (uint32_t j = 0; j < PARTIES; j++)
                    if (p->late >> j & 1 && trusts(p, j))
                        sh_restart(p->nd, j, p->self << 28 | ++p->life), sh_adopt(p->nd, j);
            sh_safety(p->nd);
            party_pass(p, 80);
            party_drain(p);
        }
        now_ns += 100000000;
    }
    for (uint32_t i = 0; i < PARTIES; i++) {
        now_runs = &world->party[i];
        if (mode < 2 && (i < 2 || !mode))
            party_audit(now_runs);
    }
    for (uint32_t slot = 0; mode < 2 && slot < world->g.slots; slot++) {
        const sh_ep *ep = &world->party[0].nd->eps[slot], *other;

        if (ep->state != SH_EP_OPEN || ep->orphan || ep->peer != 1 || !world->party[0].held[slot])
            continue;
        other = &world->party[1].nd->eps[ep->peer_slot];
        if (other->state != SH_EP_OPEN || other->orphan || !world->party[1].held[ep->peer_slot] || other->gen != ep->peer_gen || other->peer != 0 || other->peer_slot != slot)
            continue;
        expect(ep->tail == other->head && other->tail == ep->head, "bytes were lost: %u of %u, %u of %u", other->head, ep->tail, ep->head, other->tail);
    }
}

static void run(const uint8_t *input, size_t n)
{
    at = input;
    end_of_input = input + n;
    mode = next() % 4;
    world = &worlds[next() % 2];
    kind_wanted = next() % (2 * KINDS);
    noise = 88172645463325252ull + ((uint64_t)next() << 8) + next();
    honest_for = 20;
    now_ns = 1000000000;
    restore(world);
    inputs++;
    for (int i = 0; i < STEPS && at < end_of_input; i++) {
        loads = 0;
        now_runs = &world->party[choose(NULL, PARTIES)];
        party_step(now_runs);
        if (next() == 7)
            now_ns += 1000000ull * next() * next();
    }
    at = end_of_input;
    loads = 0;
    honest_for = UINT32_MAX;
    end_well();
}

static void tell(void) { printf("inputs: %lu, calls of the core: %lu, lies: %lu\n", (unsigned long)inputs, (unsigned long)calls, (unsigned long)lies); }

static void begin(void)
{
    make(&worlds[0], 4, 64 << 10);
    make(&worlds[1], 7, 256 << 10);
    calls = lies = 0;
}

#ifndef ALONE
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    begin();
    atexit(tell);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n)
{
    run(input, n);
    return 0;
}
#else
/* SEED MILLIONS: so many calls of the core, by inputs of its own. SEED 0 INPUT: that one input again. */
int main(int argc, char **argv)
{
    static uint8_t input[1 << 13];
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1, most = argc > 2 ? strtoull(argv[2], NULL, 0) * 1000000 : 1000000;

    begin();
    for (uint64_t i = argc > 3 ? strtoull(argv[3], NULL, 0) : 0;; i++) {
        uint64_t x = (seed << 32) + i * 0x9e3779b97f4a7c15ull + 1;

        for (size_t k = 0; k < sizeof input; k += 8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            memcpy(input + k, &x, 8);
        }
        input[0] = (uint8_t)i;
        run(input, sizeof input);
        if (argc > 3 || calls >= most)
            break;
        if (inputs % 65536 == 0) {
            tell();
            fflush(stdout);
        }
    }
    tell();
    return 0;
}
#endif
