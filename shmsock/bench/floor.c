/* floor.c - the ring alone: what is measured here is the core without Python, the floor under all that shmsock can reach.
 *
 *     floor line CPU CPU SECONDS          round trip of a bare word between two CPUs
 *     floor echo CPU CPU SECONDS RING     round trips of 64 bytes through two rings of RING bytes
 *     floor write CPU CPU SECONDS RING    64 KiB writes one way
 *     floor count NAME                    fixed work in one process, in the function work_NAME (instructions.py)
 *
 * Prints one JSON object. The server is a child on the first CPU, the client is on the second: two nodes that were connected
 * before the fork, in memory that both share. */
#include "atomics.h"
#include "core.h"
#include "layout.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define FEW_SLOTS 8 /* log2 */
#define MANY_SLOTS 16
#define PEERS 16
#define SMALL 64u
#define BLOCK 65536u
#define TRIPS 32           /* of a bare word between two looks at the clock, which takes half as long as one */
#define BUCKETS (1u << 20) /* of a nanosecond each */
#define WARM_UP 0.2        /* of the seconds */

struct end { /* of a connection */
    sh_node *nd;
    sh_ep *ep;
};

static sh_node *nodes[PEERS];
static struct end ends[2];
static uint8_t data[BLOCK];
static uint32_t histogram[BUCKETS], times;
static uint64_t longest;

static void fail(const char *what, long long status)
{
    fprintf(stderr, "floor: %s: status %lld (those below 0 are of enum sh_status)\n", what, status);
    _exit(1);
}

/* ---- two nodes and a connection, without a handshake: both ends are here ---- */

static void *shared(uint64_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        fail("no memory to share", -1);
    return p;
}

static void pump(sh_node *nd)
{
    uint64_t events[PEERS];
    int n = sh_pump(nd, events, PEERS);

    if (n < 0)
        fail("pump", n);
}

/* A slot of each of the first two nodes, connected to the other. */
static void connect_slots(uint32_t ring_bytes, sh_ep *pair[2])
{
    int64_t slots[2];

    for (uint32_t i = 0; i < 2; i++) {
        sh_limits(nodes[i], ring_bytes, ring_bytes, 0, 0);
        if ((slots[i] = sh_ep_new(nodes[i], !i, (int)i, 0)) < 0)
            fail("no slot", slots[i]);
        pair[i] = sh_ep_at(nodes[i], (uint32_t)slots[i]);
    }
    for (uint32_t i = 0; i < 2; i++) {
        int r = sh_ep_open(pair[i], !i, (uint32_t)slots[!i], sh_ep_gen(pair[!i]));
        if (r < 0)
            fail("open", r);
    }
}

/* ends[], and so many connections besides on which nothing is ever said. */
static void connect_ends(uint32_t peers, uint32_t ring_bytes, uint32_t idle)
{
    uint32_t log2_slots = idle ? MANY_SLOTS : FEW_SLOTS;
    uint64_t region_bytes = SH_PAGE + PEERS * (8ull * ring_bytes + (1ull << 20) + (1ull << log2_slots) * (SH_SLOT_SIZE + 2 * SH_MIN_RING));
    uint64_t region_id = 1ull << 24 | log2_slots << 8 | PEERS;
    uint8_t *base = shared(region_bytes);
    sh_geometry g;
    sh_ep *eps[2];
    int r = sh_geometry_of(region_id, region_bytes, &g);

    if (r < 0 || ring_bytes < SH_MIN_RING || ring_bytes > SH_MAX_RING || ring_bytes & (ring_bytes - 1))
        fail("a ring that cannot be", r);
    sh_store64(base, offsetof(struct sh_header, region_id), region_id, 0);
    for (uint32_t i = 0; i < peers; i++) {
        void *memory = calloc(1, sh_node_bytes(&g));

        sh_store64(base, SH_PAGE + i * g.section_bytes + offsetof(struct sh_section, claim), i + 1, 0);
        if (!memory)
            fail("no memory for a node", -1);
        nodes[i] = sh_node_new(memory, base, &g, i, 0);
        sh_node_claim(nodes[i], i + 1);
        sh_node_settings(nodes[i], 1ull << 60, 200000, 1000); /* as the engine, and one turn for all */
        for (uint32_t j = 0; j < PEERS; j++)
            sh_restart(nodes[i], j, 1 + i);
    }
    for (uint32_t i = 0; i < peers; i++)
        for (uint32_t j = 0; j < peers; j++)
            if (!sh_adopt(nodes[i], j))
                fail("adopt", 0);
    for (uint32_t i = 0; i < peers; i++)
        pump(nodes[i]); /* the news of all that */
    while (idle--)
        connect_slots(SH_MIN_RING, eps);
    connect_slots(ring_bytes, eps);
    for (uint32_t i = 0; i < 2; i++)
        ends[i] = (struct end){.nd = nodes[i], .ep = eps[i]};
}

/* ---- bytes: one copy each way, as Python's side makes them ---- */

static void put(struct end *e, const void *bytes, uint32_t n)
{
    for (uint32_t done = 0; done < n;) {
        int64_t r = sh_write(e->ep, (const uint8_t *)bytes + done, n - done);

        if (r < 0)
            fail("write", r);
        done += (uint32_t)r;
        while (done < n && (r = sh_wait_space(e->ep, 1)) <= 0)
            if (r < 0)
                fail("space", r);
    }
}

/* At least `min` and at most `want` bytes; 0 at the end. */
static uint32_t take(struct end *e, uint8_t *to, uint32_t want, uint32_t min)
{
    int64_t n;

    do
        if ((n = sh_read_wait(e->ep, to, want, min, SH_MAY_SPIN)) > 0)
            return (uint32_t)n;
    while (n == SH_EMPTY || n == SH_YIELD || n == SH_SLOW);
    if (n == SH_EOF)
        return 0;
    fail("read", n);
    return 0;
}

/* ---- two processes ---- */

static void bereaved(int number)
{
    int status;

    (void)number;
    if (waitpid(-1, &status, WNOHANG) > 0 && status)
        _exit(1); /* the server has said why */
}

static void pin(const char *cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((unsigned)atoi(cpu), &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        fail("cannot run on that CPU", atoi(cpu));
}

/* 1 in the client. Neither outlives the other. */
static int divide(const char *server_cpu, const char *client_cpu)
{
    pid_t client = getpid(), server;

    signal(SIGCHLD, bereaved);
    server = fork();
    if (server < 0)
        fail("fork", server);
    pin(server ? client_cpu : server_cpu);
    if (server)
        return 1;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != client)
        _exit(1);
    return 0;
}

static void join(void)
{
    int status;

    signal(SIGCHLD, SIG_DFL);
    if (wait(&status) > 0 && status)
        _exit(1);
}

static uint64_t ns(double seconds) { return (uint64_t)(seconds * 1e9); }

static void note(uint64_t took)
{
    histogram[took < BUCKETS ? took : BUCKETS - 1]++;
    times++;
    longest = took > longest ? took : longest;
}

/* Nanoseconds that all but `beyond` in a thousand stayed below. */
static double percentile(uint32_t beyond)
{
    uint64_t left = (uint64_t)times * beyond / 1000, seen = 0;
    uint32_t k = BUCKETS - 1;

    while (k && (seen += histogram[k]) <= left)
        k--;
    return k == BUCKETS - 1 ? (double)longest : k;
}

/* One writer to a line, as in a region. */
static void line_server(const uint64_t *ask, uint64_t *answer)
{
    for (uint64_t n = 1; sh_load(ask, 0) != UINT64_MAX;)
        if (sh_load(ask, 0) == n)
            sh_store(answer, n++, 0);
}

static void line_client(uint64_t *ask, const uint64_t *answer, double seconds)
{
    uint64_t n = 0, now = sh_clock(), start, warm = now + ns(seconds * WARM_UP), end = warm + ns(seconds);

    while (now < end || !times) {
        start = now;
        for (uint32_t k = 0; k < TRIPS; k++) {
            sh_store(ask, ++n, 0);
            while (sh_load(answer, 0) != n)
                ;
        }
        now = sh_clock();
        if (start >= warm)
            note(now - start);
    }
    sh_store(ask, UINT64_MAX, 0);
    printf("{\"p50_ns\": %.1f}\n", percentile(500) / TRIPS);
}

static void echo_server(struct end *e)
{
    static uint8_t got[BLOCK];

    for (uint32_t n; (n = take(e, got, BLOCK, 1));)
        put(e, got, n);
}

static void echo_client(struct end *e, double seconds)
{
    uint8_t back[SMALL];
    uint64_t now = sh_clock(), start, warm = now + ns(seconds * WARM_UP), end = warm + ns(seconds);

    while (now < end || !times) {
        start = now;
        put(e, data, SMALL);
        if (take(e, back, SMALL, SMALL) != SMALL)
            fail("end of the echo", 0);
        now = sh_clock();
        if (start >= warm)
            note(now - start);
    }
    if (memcmp(back, data, SMALL))
        fail("the echo differs from what was sent", 0);
    sh_ep_finish(e->ep);
    printf("{\"count\": %u, \"p50_us\": %.3f, \"p99_us\": %.3f, \"p999_us\": %.3f, \"max_us\": %.3f}\n", times,
           percentile(500) / 1e3, percentile(10) / 1e3, percentile(1) / 1e3, (double)longest / 1e3);
}

/* Counts, and says how much it was when no more comes. */
static void write_server(struct end *e)
{
    static uint8_t got[BLOCK];
    uint64_t count = 0;

    for (uint32_t n; (n = take(e, got, BLOCK, 1));)
        count += n;
    put(e, &count, sizeof count);
}

static void write_client(struct end *e, double seconds)
{
    uint64_t start = sh_clock(), end = start + ns(seconds), count = 0, received;

    for (; !count || sh_clock() < end; count += BLOCK)
        put(e, data, BLOCK);
    sh_ep_finish(e->ep);
    if (take(e, (uint8_t *)&received, sizeof received, sizeof received) != sizeof received || received != count)
        fail("bytes that were not received", (long long)(count - received));
    printf("{\"bytes\": %llu, \"mb_s\": %.1f}\n", (unsigned long long)count, (double)count * 1e3 / (double)(sh_clock() - start));
}

/* ---- fixed work: looked at by its instructions, which the state of the machine does not change ---- */

/* Both sides find what they look for: the way of busy-polling ends, which tell each other nothing. */
static void work_echo(uint32_t n)
{
    uint8_t got[SMALL];

    while (n--)
        for (int k = 0; k < 2; k++) {
            put(&ends[k], data, SMALL);
            take(&ends[!k], got, SMALL, SMALL);
        }
}

/* The way of ends that wait for their loop: told, pumped, and armed again. */
static void work_pumped_echo(uint32_t n)
{
    uint8_t got[SMALL];

    while (n--)
        for (int k = 0; k < 2; k++) {
            put(&ends[k], data, SMALL);
            pump(ends[!k].nd);
            take(&ends[!k], got, SMALL, SMALL);
            sh_arm(ends[!k].ep);
        }
}

/* The same beside connections on which nothing is said: it does not depend on how many these are. */
static void work_beside_10(uint32_t n) { work_pumped_echo(n); }
static void work_beside_1000(uint32_t n) { work_pumped_echo(n); }
static void work_beside_30000(uint32_t n) { work_pumped_echo(n); }

static void work_write(uint32_t n)
{
    static uint8_t got[BLOCK];

    while (n--) {
        put(&ends[0], data, BLOCK);
        take(&ends[1], got, BLOCK, BLOCK);
    }
}

static void work_idle_pump(uint32_t n)
{
    while (n--)
        pump(nodes[0]);
}

/* A loop that waits, and a peer that wakes it by a futex. */
static void work_wake(uint32_t n)
{
    uint8_t got[SMALL];

    while (n--) {
        if (!sh_sleep(nodes[0]))
            fail("sleep", 0);
        put(&ends[1], data, SMALL);
        pump(nodes[0]);
        take(&ends[0], got, SMALL, SMALL);
        sh_arm(ends[0].ep);
    }
}

#define TEXT(x) #x
#define NUMBER(x) TEXT(x)
#ifdef __clang__
#define COMPILER "clang " NUMBER(__clang_major__)
#else
#define COMPILER "gcc " NUMBER(__GNUC__)
#endif

static const struct {
    const char *name;
    void (*work)(uint32_t n); /* called by address, so that each is a function that a profiler sees */
    uint32_t n, idle;
} works[] = {
    {"echo", work_echo, 1000, 0},
    {"pumped_echo", work_pumped_echo, 1000, 0},
    {"beside_10", work_beside_10, 30000, 10}, /* so many that the calls made by connecting are few among them */
    {"beside_1000", work_beside_1000, 30000, 1000},
    {"beside_30000", work_beside_30000, 30000, 30000},
    {"write", work_write, 100, 0},
    {"idle_pump", work_idle_pump, 1000, 0},
    {"wake", work_wake, 1000, 0},
};

static void count(const char *name)
{
    size_t i = 0;

    while (i < sizeof works / sizeof *works && strcmp(works[i].name, name))
        i++;
    if (i == sizeof works / sizeof *works)
        fail("no such work", -1);
    connect_ends(PEERS, 1u << 20, works[i].idle);
    sh_set_wake_out(nodes[1], 0, SH_WAKE_OUT_FUTEX, -1, 0, 0);
    works[i].work(works[i].n);
    printf("{\"times\": %u, \"compiler\": \"" COMPILER "\"}\n", works[i].n);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    double seconds = argc > 4 ? atof(argv[4]) : 0;

    for (uint32_t i = 0; i < BLOCK; i++)
        data[i] = (uint8_t)(i * 7 + i / 256);
    if (argc == 3 && !strcmp(what, "count")) {
        count(argv[2]);
        return 0;
    }
    if (argc == 5 && !strcmp(what, "line")) {
        uint64_t *words = shared(SH_PAGE);
        if (!divide(argv[2], argv[3])) {
            line_server(words, words + SH_LINE / sizeof *words);
            return 0;
        }
        line_client(words, words + SH_LINE / sizeof *words, seconds);
    } else if (argc == 6 && (!strcmp(what, "echo") || !strcmp(what, "write"))) {
        connect_ends(2, (uint32_t)atol(argv[5]), 0);
        if (!divide(argv[2], argv[3])) {
            sh_node_own(nodes[1]);
            (*what == 'e' ? echo_server : write_server)(&ends[1]);
            return 0;
        }
        (*what == 'e' ? echo_client : write_client)(&ends[0], seconds);
    } else
        fail("arguments", argc);
    join();
    return 0;
}
