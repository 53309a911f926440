/* atomics.h - the only place where shared memory is touched and where ordering is spelled.
 *
 * `wc` says that the mapping is write-combining (BAR2 through resource2_wc): there stores may leave the core in any order until
 * an sfence, loads may be hoisted unless an lfence stands between, and a locked instruction (what gcc makes of a C11
 * seq_cst fence) does not order the write-combining buffers the way mfence does. On write-back memory x86 needs none of these
 * and the branches on `wc` predict perfectly.
 *
 * With SHMSOCK_FAKE_MEMORY each access goes through a per-CPU store buffer that the tests drain when they please
 * (fake.c): the same core then runs over memory that is as lazy as x86 allows. */
#ifndef SHMSOCK_ATOMICS_H
#define SHMSOCK_ATOMICS_H

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

/* sh_prefetch is for reading, sh_prefetch_write for writing. In assembly, as compilers drop calls of functions that do nothing but __builtin_prefetch. */
#if defined(__x86_64__)
static inline void sh_pause(void) { __builtin_ia32_pause(); }
static inline void sh_prefetch(const void *p) { __asm__ __volatile__("prefetcht0 %0" : : "m"(*(const char *)p)); }
static inline void sh_prefetch_write(const void *p) { __asm__ __volatile__("prefetchw %0" : : "m"(*(const char *)p)); }
static inline void sh_load_fence(void) { __asm__ __volatile__("lfence" ::: "memory"); }
static inline void sh_store_fence(void) { __asm__ __volatile__("sfence" ::: "memory"); }
static inline void sh_hard_fence(void) { __asm__ __volatile__("mfence; lfence" ::: "memory"); }
#elif defined(__aarch64__)
/* BAR2 is mapped as normal non-cacheable memory there: dmb orders it, dsb waits for the writes to leave the core. */
static inline void sh_pause(void) { __asm__ __volatile__("yield" ::: "memory"); }
static inline void sh_prefetch(const void *p) { __asm__ __volatile__("prfm pldl1keep, [%0]" : : "r"(p)); }
static inline void sh_prefetch_write(const void *p) { __asm__ __volatile__("prfm pstl1keep, [%0]" : : "r"(p)); }
static inline void sh_load_fence(void) { __asm__ __volatile__("dmb ld" ::: "memory"); }
static inline void sh_store_fence(void) { __asm__ __volatile__("dsb st" ::: "memory"); }
static inline void sh_hard_fence(void) { __asm__ __volatile__("dsb sy" ::: "memory"); }
#else
#error "shmsock knows the memory order of x86-64 and arm64 only"
#endif

#ifdef SHMSOCK_FAKE_MEMORY

uint64_t sh_fake_load(const uint64_t *p);
void sh_fake_store(uint64_t *p, uint64_t v);
void sh_fake_fence(const char *function);
void sh_fake_copy_out(void *to, const void *from, uint32_t n);
void sh_fake_copy_in(void *to, const void *from, uint32_t n);
int sh_fake_cas(uint64_t *p, uint64_t old, uint64_t new_);
int sh_fake_yield(void);
#define sched_yield sh_fake_yield
static inline uint64_t sh_load(const uint64_t *p, int wc) { (void)wc; return sh_fake_load(p); }
static inline uint64_t sh_peek(const uint64_t *p) { return sh_fake_load(p); }
static inline void sh_store(uint64_t *p, uint64_t v, int wc) { (void)wc; sh_fake_store(p, v); }
static inline void sh_put(uint64_t *p, uint64_t v) { sh_fake_store(p, v); }
#define sh_fence(wc) ((void)(wc), sh_fake_fence(__func__))
static inline void sh_acquire(int wc) { (void)wc; }
static inline void sh_copy_out(void *to, const void *from, uint32_t n) { sh_fake_copy_out(to, from, n); }
static inline void sh_copy_in(void *to, const void *from, uint32_t n) { sh_fake_copy_in(to, from, n); }
static inline int sh_cas(uint64_t *p, uint64_t old, uint64_t new_) { return sh_fake_cas(p, old, new_); }

#else

/* Load with acquire: nothing after it is done before it. Pairs with sh_store. */
static inline uint64_t sh_load(const uint64_t *p, int wc)
{
    uint64_t v = atomic_load_explicit((const _Atomic uint64_t *)p, memory_order_acquire);
    if (__builtin_expect(wc, 0))
        sh_load_fence();
    return v;
}

/* Load without ordering: for words that are only compared, and loaded again by sh_load when they differ. */
static inline uint64_t sh_peek(const uint64_t *p)
{
    return atomic_load_explicit((const _Atomic uint64_t *)p, memory_order_relaxed);
}

/* Store with release: whoever sees it sees everything before it. Pairs with sh_load. */
static inline void sh_store(uint64_t *p, uint64_t v, int wc)
{
    if (__builtin_expect(wc, 0))
        sh_store_fence();
    atomic_store_explicit((_Atomic uint64_t *)p, v, memory_order_release);
    if (__builtin_expect(wc, 0))
        sh_store_fence(); /* a final store must not wait in the combining buffer */
}

/* Store without ordering: the caller fences or publishes with sh_store afterwards. */
static inline void sh_put(uint64_t *p, uint64_t v)
{
    atomic_store_explicit((_Atomic uint64_t *)p, v, memory_order_relaxed);
}

/* Full fence: my stores before it are visible before my loads after it are done (the store-buffer hazard of F1, R1, W). */
static inline void sh_fence(int wc)
{
    if (__builtin_expect(wc, 0))
        sh_hard_fence();
    else
        atomic_thread_fence(memory_order_seq_cst);
}

/* Orders the bytes copied out before the loads after it. */
static inline void sh_acquire(int wc)
{
    atomic_thread_fence(memory_order_acquire);
    if (__builtin_expect(wc, 0))
        sh_load_fence();
}

static inline void sh_copy_out(void *to, const void *from, uint32_t n) { memcpy(to, from, n); } /* private -> region */
/* region -> private; once: the compiler may not take a field from the region again instead of from the copy */
static inline void sh_copy_in(void *to, const void *from, uint32_t n)
{
    memcpy(to, from, n);
    __asm__ __volatile__("" ::: "memory");
}

static inline int sh_cas(uint64_t *p, uint64_t old, uint64_t new_)
{
    return atomic_compare_exchange_strong((_Atomic uint64_t *)p, &old, new_);
}

#endif
#endif
