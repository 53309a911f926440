/* memory.c - plain access for the cold paths (format, claim, identity), the clock, and where everything lies. */
#include "node.h"

#include <fcntl.h>
#include <time.h>

/* ---- memory for the cold paths ---- */

static uint64_t *word_at(const void *base, uint64_t offset) { return (uint64_t *)((uintptr_t)base + offset); }

uint64_t sh_load64(const void *base, uint64_t offset) { return sh_load(word_at(base, offset), 1); }
void sh_store64(void *base, uint64_t offset, uint64_t value, int wc) { sh_store(word_at(base, offset), value, wc); }
int sh_cas64(void *base, uint64_t offset, uint64_t old, uint64_t value) { return sh_cas(word_at(base, offset), old, value); }
void sh_full_fence(int wc) { sh_fence(wc); }
void sh_read_bytes(const void *base, uint64_t offset, void *to, uint32_t n) { sh_copy_in(to, word_at(base, offset), n); }
void sh_write_bytes(void *base, uint64_t offset, const void *from, uint32_t n) { sh_copy_out(word_at(base, offset), from, n); }

#ifndef SHMSOCK_FAKE_MEMORY
uint64_t sh_clock(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
#endif

/* ---- geometry ---- */

static uint64_t lines(uint64_t bytes) { return (bytes + SH_LINE - 1) & ~(uint64_t)(SH_LINE - 1); }

/* Where everything lies, from the region id and the size alone. SH_NO_REGION: the id makes no sense, or the region is too small. */
int sh_geometry_of(uint64_t region_id, uint64_t region_bytes, sh_geometry *out)
{
    uint32_t peers = region_id & 0xff, log2_slots = (region_id >> 8) & 0xff;
    sh_geometry g = {0};

    if (peers < 1 || peers > SH_MAX_PEERS || log2_slots < 4 || log2_slots > 16 || ((region_id >> 16) & 0xff))
        return SH_NO_REGION;
    if (region_bytes < SH_PAGE)
        return SH_NO_REGION;
    g.peers = peers;
    g.slots = 1u << log2_slots;
    g.section_bytes = (region_bytes - SH_PAGE) / peers & ~(uint64_t)(SH_PAGE - 1);
    g.pair_off = SH_PAGE;
    g.toggle_off = sizeof(struct sh_pair);
    g.ack_off = g.toggle_off + lines(g.slots / 8);
    g.message_off = g.ack_off + lines(g.slots / 8);
    g.messages = g.slots / 128 < SH_MIN_MESSAGES ? SH_MIN_MESSAGES : g.slots / 128 > SH_MAX_MESSAGES ? SH_MAX_MESSAGES : g.slots / 128;
    g.pair_bytes = g.message_off + g.messages * sizeof(struct sh_message);
    g.slot_off = g.pair_off + peers * g.pair_bytes;
    g.arena_off = (g.slot_off + g.slots * sizeof(struct sh_slot) + SH_PAGE - 1) & ~(uint64_t)(SH_PAGE - 1);
    if (g.section_bytes < g.arena_off + 2 * SH_PAGE || g.section_bytes > (uint64_t)SH_MIN_RING << 30)
        return SH_NO_REGION;
    g.arena_bytes = g.section_bytes - g.arena_off;
    *out = g;
    return 0;
}

uint8_t *sh_section_at(const void *base, const sh_geometry *g, uint32_t section)
{
    return (uint8_t *)(uintptr_t)base + SH_PAGE + section * g->section_bytes;
}

struct sh_pair *sh_pair_at(const void *base, const sh_geometry *g, uint32_t of, uint32_t towards)
{
    return (struct sh_pair *)(sh_section_at(base, g, of) + g->pair_off + towards * g->pair_bytes);
}

/* The listener entry for this port of streams, or of datagrams: index << 8 | flags, 0 if there is none. Looks at no more entries
 * than there can be. */
int sh_listen_find(const void *base, const sh_geometry *g, uint32_t section, uint32_t port, int datagram, int wc)
{
    const struct sh_section *s = (const struct sh_section *)sh_section_at(base, g, section);
    uint64_t n = sh_load(&s->listeners, wc);

    for (uint64_t i = 0; i < n && i < SH_LISTENERS; i++) {
        uint64_t e = sh_load(&s->listener[i], wc);
        if ((e & 0xffff) == port && (e >> 16 & SH_LISTEN_USED) && !(e >> 16 & SH_LISTEN_DATAGRAM) == !datagram)
            return (int)(i << 8 | (e >> 16 & 0xff));
    }
    return 0;
}

/* Is nobody there who holds the lock of that section? Locks are bytes of the region file, one per section, taken by its owner on its own open file
 * description: the kernel drops them when the process dies, however it dies. */
int sh_lock_fell(int fd, uint32_t section)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = section, .l_len = 1};

    return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

/* Does the owner of that section, in that life, still listen to the port by that entry (index << 8 | flags)? lock_fd: not if the section's lock fell;
 * negative: that is not known. */
int sh_listen_still(const void *base, const sh_geometry *g, uint32_t section, uint64_t life, uint32_t port, uint32_t entry, int lock_fd, int wc)
{
    const struct sh_section *s = (const struct sh_section *)sh_section_at(base, g, section);

    return sh_load(&s->claim, wc) && sh_load(&s->incarnation, wc) == life && sh_load(&s->state, wc) == SH_STATE_LIVE && entry >> 8 < SH_LISTENERS
        && sh_load(&s->listener[entry >> 8], wc) == ((uint64_t)(entry & 0xff) << 16 | port) && (lock_fd < 0 || !sh_lock_fell(lock_fd, section));
}

/* Survey all sections: load SH_SURVEY words of each into words[]: claim, incarnation, state, doorbell, beat. Returns a mask of the sections where a
 * word other than the beat differs from what words[] held before. */
uint64_t sh_survey(const void *base, const sh_geometry *g, uint64_t *words, int wc)
{
    uint64_t changed = 0;

    for (uint32_t j = 0; j < g->peers; j++, words += SH_SURVEY) {
        const struct sh_section *s = (const struct sh_section *)sh_section_at(base, g, j);
        const uint64_t *const at[SH_SURVEY] = {&s->claim, &s->incarnation, &s->state, &s->doorbell, &s->beat};

        for (int i = 0; i < SH_SURVEY; i++) {
            uint64_t now = sh_load(at[i], wc);
            if (now != words[i] && i != SH_SURVEY_BEAT)
                changed |= 1ull << j;
            words[i] = now;
        }
    }
    return changed;
}
