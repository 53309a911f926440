/* arena.c - ring memory of the own section, and storage behind it. Blocks are powers of two; the books are private: for each size a set of the blocks that
 * are free. Two that were one come together again when a larger one is wanted. */
#include "node.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

#define LOG2_MIN ((uint32_t)__builtin_ctz(SH_MIN_RING))

/* ---- blocks ---- */

/* The set of blocks of SH_MIN_RING << k bytes has so many numbers, in an arena of that size. */
static uint64_t blocks(uint64_t bytes, uint32_t k) { return (bytes >> (LOG2_MIN + k)) + 1; }

/* How much memory the books of an arena take. The caller provides it, all zeros. */
uint64_t sh_arena_bytes(uint64_t bytes)
{
    uint64_t total = sizeof(sh_arena);

    for (uint32_t k = 0; k < SH_RING_SIZES; k++)
        total += sh_set_bytes(blocks(bytes, k));
    return total;
}

/* All of it free: so many bytes at that offset of the section, which need not be a power of two. */
sh_arena *sh_arena_new(void *memory, uint64_t offset, uint64_t bytes)
{
    sh_arena *a = memory;

    a->offset = offset;
    a->bytes = a->free_bytes = bytes & ~(uint64_t)(SH_MIN_RING - 1);
    memory = a + 1;
    for (uint32_t k = 0; k < SH_RING_SIZES; k++)
        memory = sh_set_init(&a->free[k], memory, blocks(bytes, k));
    for (uint64_t at = 0, block; at < a->bytes; at += block) {
        uint32_t k = SH_RING_SIZES - 1;

        while ((block = (uint64_t)SH_MIN_RING << k) > a->bytes - at || at & (block - 1))
            k--;
        sh_set_add(&a->free[k], at / block);
    }
    return a;
}

uint64_t sh_arena_free(const sh_arena *a) { return a->free_bytes; }

/* Put together what was one. 0: there is nothing new to be put together. */
static int merge(sh_arena *a)
{
    if (!a->given)
        return 0;
    a->given = 0;
    for (uint32_t k = 0; k + 1 < SH_RING_SIZES; k++)
        SH_EACH(i, &a->free[k])
            if (!(i & 1) && sh_set_has(&a->free[k], (uint64_t)i + 1)) {
                sh_set_remove(&a->free[k], (uint64_t)i);
                sh_set_remove(&a->free[k], (uint64_t)i + 1);
                sh_set_add(&a->free[k + 1], (uint64_t)i / 2);
            }
    return 1;
}

/* Take a block of *bytes, or the largest smaller one that there is: then *bytes is that. Returns its offset in the section; 0: all is in use. */
uint64_t sh_arena_take(sh_arena *a, uint32_t *bytes)
{
    uint32_t size = (uint32_t)__builtin_ctz(*bytes) - LOG2_MIN, k;
    uint64_t at;

    for (;;) {
        for (k = size; k < SH_RING_SIZES && !sh_set_any(&a->free[k]); k++)
            ;
        if (k < SH_RING_SIZES)
            break;
        if (!merge(a) && !size--)
            return 0;
    }
    at = (uint64_t)sh_set_next(&a->free[k], 0);
    sh_set_remove(&a->free[k], at);
    while (k > size) {
        at *= 2;
        sh_set_add(&a->free[--k], at + 1);
    }
    *bytes = SH_MIN_RING << size;
    a->free_bytes -= *bytes;
    return a->offset + at * *bytes;
}

/* Take a block back. */
void sh_arena_give(sh_arena *a, uint64_t offset, uint32_t bytes)
{
    a->free_bytes += bytes;
    a->given = 1;
    sh_set_add(&a->free[(uint32_t)__builtin_ctz(bytes) - LOG2_MIN], (offset - a->offset) / bytes);
}

/* ---- storage ---- */

/* The region is a file with holes, open as fd, and mapped from its beginning: a full disk shall be an error when a slot or a ring is taken, and no SIGBUS
 * later. `falloc`: fallocate(2) is real there. */
void sh_storage(sh_node *nd, int fd, int falloc)
{
    nd->books->storage_fd = fd;
    nd->books->storage_falloc = falloc;
}

/* Where storage was missing last: an offset in the region. */
uint64_t sh_storage_missing(const sh_node *nd) { return nd->books->storage_missing; }

static int allocate(const sh_node *nd, uint64_t at, uint64_t bytes)
{
    const struct sh_books *b = nd->books;
    struct stat file;

    if (fstat(b->storage_fd, &file) || (uint64_t)file.st_size < at + bytes)
        return -1; /* truncated: allocating would make it longer again, behind the culprit's back */
    if (!b->storage_falloc) {
        if (!madvise(nd->base + at, bytes, MADV_POPULATE_WRITE))
            return 0;
        if (errno != EINVAL)
            return -1;
    }
    return posix_fallocate(b->storage_fd, (off_t)at, (off_t)bytes);
}

/* Have storage behind so many bytes of the own section. 0, or SH_NO_STORAGE. */
int sh_back(sh_node *nd, uint64_t offset, uint64_t bytes)
{
    struct sh_books *b = nd->books;
    uint64_t first = offset / SH_STORAGE, last = (offset + bytes - 1) / SH_STORAGE, end;

    if (b->storage_fd < 0)
        return 0;
    while (first <= last && sh_set_has(&b->backed, first))
        first++;
    if (first > last)
        return 0;
    end = (last + 1) * SH_STORAGE < nd->g.section_bytes ? (last + 1) * SH_STORAGE : nd->g.section_bytes;
    b->storage_missing = (uint64_t)(sh_section_at(nd->base, &nd->g, nd->self) - nd->base) + first * SH_STORAGE;
    if (allocate(nd, b->storage_missing, end - first * SH_STORAGE))
        return SH_NO_STORAGE;
    for (; first <= last; first++)
        sh_set_add(&b->backed, first);
    return 0;
}
