/* set.h - sets of small numbers in private memory, such as slots: trees of 64-bit words, each of which says which words below it are not 0. So looking
 * for the next member costs what is there, and not what could be. */
#ifndef SHMSOCK_SET_H
#define SHMSOCK_SET_H

#include <stdint.h>

#define SH_SET_LEVELS 6 /* 2^36 numbers */

typedef struct sh_set {
    uint64_t *level[SH_SET_LEVELS]; /* the members; then words that are not 0; ... ; one word */
    uint64_t size[SH_SET_LEVELS];   /* words of each */
    uint32_t top;
} sh_set;

#define SH_BIT(i) (1ull << ((i) & 63))

static inline uint64_t sh_set_words(uint64_t numbers) { return (numbers + 63) / 64; }

/* How much memory a set of numbers below that takes. */
static inline uint64_t sh_set_bytes(uint64_t numbers)
{
    uint64_t words = 0, n = numbers;

    do
        words += n = sh_set_words(n);
    while (n > 1);
    return words * sizeof(uint64_t);
}

/* An empty set, in so much memory, all zeros. Returns what follows it. */
static inline void *sh_set_init(sh_set *set, void *memory, uint64_t numbers)
{
    uint64_t *at = memory, n = numbers;

    for (uint32_t k = 0;; k++) {
        n = sh_set_words(n);
        set->level[k] = at;
        set->size[k] = n;
        set->top = k;
        at += n;
        if (n <= 1)
            return at;
    }
}

static inline int sh_set_has(const sh_set *set, uint64_t i) { return (set->level[0][i >> 6] >> (i & 63)) & 1; }
static inline int sh_set_any(const sh_set *set) { return set->level[set->top][0] != 0; }

static inline void sh_set_add(sh_set *set, uint64_t i)
{
    uint64_t *w = &set->level[0][i >> 6], was = *w;

    *w = was | SH_BIT(i);
    for (uint32_t k = 1; !was && k <= set->top; k++) { /* else the words above know of it */
        i >>= 6;
        w = &set->level[k][i >> 6];
        was = *w;
        *w = was | SH_BIT(i);
    }
}

static inline void sh_set_remove(sh_set *set, uint64_t i)
{
    uint64_t *w = &set->level[0][i >> 6];

    if (!(*w & SH_BIT(i)))
        return;
    for (uint32_t k = 1; !(*w &= ~SH_BIT(i)) && k <= set->top; k++) {
        i >>= 6;
        w = &set->level[k][i >> 6];
    }
}

#define SH_NOBODY (-1)

/* The smallest number that is not below `from` and whose bit is set on that level; SH_NOBODY: there is none. */
static inline int64_t sh_set_next_on(const sh_set *set, uint32_t level, uint64_t from)
{
    for (uint32_t k = level; k <= set->top; k++, from = (from >> 6) + 1) {
        /* behind the last word: there is none; behind the last number of a word: the level above knows the next word */
        uint64_t rest = from >> 6 < set->size[k] ? set->level[k][from >> 6] & ~0ull << (from & 63) : 0;

        if (!rest)
            continue;
        from = (from & ~63ull) | (uint64_t)__builtin_ctzll(rest);
        while (k-- > level)
            from = from << 6 | (uint64_t)__builtin_ctzll(set->level[k][from]);
        return (int64_t)from;
    }
    return SH_NOBODY;
}

static inline int64_t sh_set_next(const sh_set *set, uint64_t from) { return sh_set_next_on(set, 0, from); }

/* The next word that is not 0. */
static inline int64_t sh_set_next_word(const sh_set *set, uint64_t from)
{
    return set->top ? sh_set_next_on(set, 1, from) : from == 0 && set->level[0][0] ? 0 : SH_NOBODY;
}

/* For each member, which the body may remove: `slot` is the number. Words are looked at as they were when it came to them. */
#define SH_EACH(slot, set) \
    for (int64_t w_ = sh_set_any(set) ? sh_set_next_word(set, 0) : SH_NOBODY; w_ != SH_NOBODY; w_ = sh_set_next_word(set, (uint64_t)w_ + 1)) \
        for (uint64_t m_ = (set)->level[0][w_], slot; m_ && (slot = (uint64_t)w_ << 6 | (uint64_t)__builtin_ctzll(m_), 1); m_ &= m_ - 1)

#endif
