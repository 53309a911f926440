/* flood.c - stores into shared memory as fast as can be, for tests/aio/liars.py: what a hostile peer costs others. */
#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct step { /* what to do with one word, each time round */
    volatile uint64_t *word;
    uint64_t how, a, b; /* 0: add a; 1: flip the bits a; 2: a and b in turn; 3: random bits where a has ones, else those of b */
};

enum { ADD, FLIP, TURNS, RANDOM };
enum { SILENT, ONCE_A_SLEEP, ALWAYS }; /* when to ring, by futexes */

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void wake(volatile uint64_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); }

void flood(struct step *steps, int n, volatile uint64_t *rang, volatile uint64_t *sleeping, int rings, double seconds)
{
    uint64_t random = 88172645463325252u, last = 0;
    double end = now() + seconds;

    for (uint64_t round = 0; now() < end; round++) {
        for (struct step *s = steps; s < steps + n; s++) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            switch (s->how) {
            case ADD: *s->word += s->a; break;
            case FLIP: *s->word ^= s->a; break;
            case TURNS: *s->word = round & 1 ? s->a : s->b; break;
            default: *s->word = (random & s->a) | (s->b & ~s->a);
            }
        }
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if (rings == ALWAYS || (rings && (*sleeping & 1) && *sleeping != last)) {
            last = *sleeping;
            if (rings == ONCE_A_SLEEP)
                *rang = last;
            wake(rang);
            wake(sleeping);
        }
        for (volatile int pause = 0; pause < 100; pause++)
            ;
    }
}
