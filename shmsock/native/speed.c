/* speed.c - how long memory takes to be read and written, for `shmsock doctor`: what is read is not looked at. */
#include "node.h"

/* Nanoseconds that it takes to load these bytes, so many times over, word by word. */
uint64_t sh_time_reads(const void *base, uint64_t offset, uint64_t bytes, uint32_t times)
{
    const uint64_t *words = (const uint64_t *)((uintptr_t)base + offset);
    uint64_t begin = sh_clock();

    for (uint32_t t = 0; t < times; t++)
        for (uint64_t i = 0; i < bytes / sizeof *words; i++)
            (void)sh_peek(&words[i]);
    return sh_clock() - begin;
}

/* The same for stores, until they have left the core. Only the owner of the bytes may call it. */
uint64_t sh_time_writes(void *base, uint64_t offset, uint64_t bytes, uint32_t times)
{
    uint64_t *words = (uint64_t *)((uintptr_t)base + offset);
    uint64_t begin = sh_clock();

    for (uint32_t t = 0; t < times; t++) {
        for (uint64_t i = 0; i < bytes / sizeof *words; i++)
            sh_put(&words[i], t);
        sh_fence(1);
    }
    return sh_clock() - begin;
}
