/* races.h - included before each file of the core (-include): a pause of a random length comes before each access to shared memory, and each fence: so
 * between any two steps of whatever the core does. With COPIES_MAY_RACE bytes are copied one by one, atomically: where a slot may change hands under a
 * copy, which is then void (rule P), that is no race to tell of; that no wrong byte is used is still seen. */
#ifndef RACES_H
#define RACES_H

#include <stdint.h>

void step(void);

#define sh_load sh_quick_load
#define sh_peek sh_quick_peek
#define sh_store sh_quick_store
#define sh_put sh_quick_put
#define sh_fence sh_quick_fence
#define sh_copy_out sh_quick_copy_out
#define sh_copy_in sh_quick_copy_in
#define sh_cas sh_quick_cas
#include "atomics.h"
#undef sh_load
#undef sh_peek
#undef sh_store
#undef sh_put
#undef sh_fence
#undef sh_copy_out
#undef sh_copy_in
#undef sh_cas

static inline uint64_t sh_load(const uint64_t *p, int wc) { return step(), sh_quick_load(p, wc); }
static inline uint64_t sh_peek(const uint64_t *p) { return step(), sh_quick_peek(p); }
static inline void sh_store(uint64_t *p, uint64_t v, int wc) { step(), sh_quick_store(p, v, wc); }
static inline void sh_put(uint64_t *p, uint64_t v) { step(), sh_quick_put(p, v); }
static inline void sh_fence(int wc) { step(), sh_quick_fence(wc); }
static inline int sh_cas(uint64_t *p, uint64_t old, uint64_t new_) { return step(), sh_quick_cas(p, old, new_); }

static inline void sh_copy_out(void *to, const void *from, uint32_t n)
{
    step();
#ifdef COPIES_MAY_RACE
    for (uint32_t i = 0; i < n; i++)
        __atomic_store_n((uint8_t *)to + i, ((const uint8_t *)from)[i], __ATOMIC_RELAXED);
#else
    sh_quick_copy_out(to, from, n);
#endif
}

static inline void sh_copy_in(void *to, const void *from, uint32_t n)
{
    step();
#ifdef COPIES_MAY_RACE
    for (uint32_t i = 0; i < n; i++)
        ((uint8_t *)to)[i] = __atomic_load_n((const uint8_t *)from + i, __ATOMIC_RELAXED);
#else
    sh_quick_copy_in(to, from, n);
#endif
}

#endif
