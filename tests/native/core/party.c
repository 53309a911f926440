/* party.c - see party.h. What is done here stands for engine/ and for programs: it calls the core as they do. */
#include "party.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define POISON ASAN_POISON_MEMORY_REGION
#endif
#endif
#ifdef POISON
#define BEYOND (1u << 18) /* further than an index of 16 bits reaches */
#else
#define BEYOND 8
#define POISON(at, bytes) ((void)(at))
#endif

#define PORT 7
#define MOST 20000

_Thread_local uint64_t calls;
static _Thread_local uint8_t data[SH_DATAGRAM_MAX];

/* ---- bytes that tell whose they are ---- */

static uint8_t byte_of(uint32_t section, uint32_t slot, uint32_t gen, uint32_t position)
{
    uint32_t key = (section * 65536 + slot) * 2654435761u + gen * 40503u;

    return (uint8_t)((key >> 13) + position * 7 + (position >> 8) * 13);
}

void put_bytes(const sh_ep *ep, uint32_t position, uint8_t *to, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        to[i] = byte_of(ep->nd->self, ep->slot, ep->gen, position + i);
}

static void check_bytes(struct party *p, const sh_ep *ep, uint32_t position, const uint8_t *got, int64_t n)
{
    p->read += (uint64_t)n;
    for (int64_t i = 0; trusts(p, ep->peer) && i < n; i++)
        expect(got[i] == byte_of(ep->peer, ep->peer_slot, ep->peer_gen, position + (uint32_t)i), "%u reads from %u, slot %u of its, position %u: %02x",
               p->self, ep->peer, ep->peer_slot, position + (uint32_t)i, got[i]);
}

/* ---- lives ---- */

void region_format(uint8_t *base, uint64_t bytes, uint32_t log2_slots, sh_geometry *g)
{
    struct sh_header *h = (struct sh_header *)base;

    *h = (struct sh_header){.magic = SH_MAGIC, .version = SH_VERSION, .region_id = 1ull << 24 | log2_slots << 8 | PARTIES, .region_bytes = bytes};
    expect(!sh_geometry_of(h->region_id, bytes, g), "too small");
}

/* Move it into memory of its own, so that a sanitizer sees who goes beyond it. */
static void *own(struct party *p, const void *from, size_t bytes)
{
    struct piece *x = &p->pieces[p->n_pieces++];

    expect(p->n_pieces <= PIECES, "more pieces");
    x->at = malloc(bytes + BEYOND);
    POISON((uint8_t *)x->at + bytes, BEYOND);
    x->bytes = bytes;
    x->before = NULL;
    return memcpy(x->at, from, bytes);
}

static void own_set(struct party *p, sh_set *set)
{
    for (uint32_t k = 0; k <= set->top; k++)
        set->level[k] = own(p, set->level[k], set->size[k] * sizeof(uint64_t));
}

/* A node is one block of memory. Have each part of it in a block of its own. */
static sh_node *spread(struct party *p, const sh_node *whole)
{
    sh_node *nd = own(p, whole, sizeof *whole);
    struct sh_books *b = nd->books = own(p, nd->books, sizeof *b);
    sh_set *const sets[] = {&nd->open, &nd->ready, &nd->touched, &nd->later, &b->free, &b->outgrown, &b->starved, &b->closing, &b->later, &b->backed};

    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        own_set(p, sets[i]);
    b->by_theirs = own(p, b->by_theirs, sizeof(uint16_t) * nd->g.peers * nd->g.slots);
    b->arena = own(p, b->arena, sizeof *b->arena);
    for (uint32_t k = 0; k < SH_RING_SIZES; k++)
        own_set(p, &b->arena->free[k]);
    nd->eps = own(p, nd->eps, nd->g.slots * sizeof(sh_ep));
    nd->links = own(p, nd->links, nd->g.peers * sizeof(struct sh_link));
    for (uint32_t j = 0; j < nd->g.peers; j++) {
        nd->links[j].t = own(p, nd->links[j].t, nd->words * sizeof(uint64_t));
        nd->links[j].a = own(p, nd->links[j].a, nd->words * sizeof(uint64_t));
    }
    return nd;
}

static void restart(struct party *p, uint32_t peer) { DO(sh_restart(p->nd, peer, p->self << 28 | ++p->life)); }

void party_free(struct party *p)
{
    while (p->n_pieces) {
        free(p->pieces[--p->n_pieces].before);
        free(p->pieces[p->n_pieces].at);
    }
}

void party_attach(struct party *p, uint8_t *base, const sh_geometry *g, uint32_t self)
{
    struct sh_section *s = (struct sh_section *)sh_section_at(base, g, self);
    uint64_t claim = (uint64_t)self << 32 | ++p->life, bytes = sh_node_bytes(g);
    uint8_t *memory = calloc(1, bytes);

    p->base = base;
    p->g = *g;
    p->self = self;
    p->late = 0;
    party_free(p);
    p->held = own(p, memory, g->slots);
    p->heart = own(p, memory, sh_heartbeat_bytes());
    expect(sh_cas64(base, (uint64_t)((uint8_t *)s - base), 0, claim), "claimed");
    p->nd = spread(p, sh_node_new(memory, base, g, self, 0));
    free(memory);
    DO(sh_node_claim(p->nd, claim));
    DO(sh_node_settings(p->nd, 500000, 200000, self ? 0 : 20000));
    sh_hot(p->nd, 1000000, 1000, 0);
    DO(sh_limits(p->nd, SH_MIN_RING << self, SH_MIN_RING << 5, 4096, 32));
    sh_others(p->nd, PARTIES - 1);
    sh_here(p->nd, 3);
    for (uint32_t j = 0; j < g->peers; j++) {
        restart(p, j);
        DO(sh_set_wake_out(p->nd, j, SH_WAKE_OUT_FUTEX, -1, 0, 0));
        DO(sh_set_wake_in(p->nd, j, SH_WAKE_IN_FUTEX, 1));
    }
    for (uint32_t i = 0; i < 3; i++) {
        sh_listen(p->nd, i, PORT, i == 1 ? 2 : 0, i == 2);
        sh_listen_serve(p->nd, i, 1);
        sh_put(&s->listener[i], (uint64_t)SH_LISTEN_USED << 16 | PORT);
    }
    sh_put(&s->listener[3], (uint64_t)(SH_LISTEN_USED | SH_LISTEN_DATAGRAM) << 16 | PORT);
    sh_put(&s->listeners, 4);
    sh_put(&s->incarnation, claim);
    sh_store(&s->state, SH_STATE_LIVE, 0);
    start_heart(p);
}

/* ---- what an engine does with events ---- */

static sh_ep *ep_of(const struct party *p, uint32_t slot) { return &p->nd->eps[slot]; }

static void release(struct party *p, uint32_t slot)
{
    p->held[slot] = NOT_HELD;
    DO(sh_ep_release(ep_of(p, slot)));
}

/* The connections with that peer end: open ones are left with what it had sent. */
static void end(struct party *p, uint32_t peer)
{
    for (uint32_t slot = 0; slot < p->nd->books->begun; slot++) {
        sh_ep *ep = ep_of(p, slot);

        if (!p->held[slot] || ep->peer != peer)
            continue;
        if (ep->state != SH_EP_OPEN)
            release(p, slot);
        else if (!ep->orphan) {
            DO(sh_ep_orphan(ep));
            DO(sh_poll(ep));
        }
    }
    DO(sh_end_closing(p->nd, peer));
}

static void adopt(struct party *p, uint32_t peer)
{
    p->late &= ~(1ull << peer);
    end(p, peer);
    DO(sh_adopt(p->nd, peer));
}

static void punish(struct party *p, uint32_t peer)
{
    end(p, peer);
    restart(p, peer);
    p->offences[peer] = 0;
    p->late |= 1ull << peer;
}

static void offence(struct party *p, uint32_t peer, uint32_t more)
{
    expect(!trusts(p, peer), "%u takes %u for a liar", p->self, peer);
    if ((p->offences[peer] += more) >= SH_VIOLATIONS)
        punish(p, peer);
}

static void shut(struct party *p, uint32_t slot, int fin, int rst)
{
    sh_ep *ep = ep_of(p, slot);

    if (ep->state != SH_EP_OPEN || ep->orphan) {
        release(p, slot);
        return;
    }
    p->held[slot] = NOT_HELD;
    DO(sh_ep_close(ep, fin, rst));
}

static void settle(struct party *p, uint32_t slot, int bits)
{
    uint32_t peer = ep_of(p, slot)->peer;

    if (bits & SH_POLL_RESET)
        release(p, slot);
    else if (bits & SH_POLL_BAD) {
        shut(p, slot, 0, 1);
        offence(p, peer, 1);
    } else if ((bits & (SH_POLL_DONE | SH_POLL_FIN)) == (SH_POLL_DONE | SH_POLL_FIN) && !(bits & SH_POLL_DATA))
        release(p, slot);
}

/* What a read or a write returned. */
static void status(struct party *p, uint32_t slot, int64_t r)
{
    if (r == SH_VIOLATION)
        settle(p, slot, SH_POLL_BAD);
    else if (r == SH_RESET)
        settle(p, slot, SH_POLL_RESET);
}

static void act(struct party *p, const uint64_t *events, int n)
{
    for (int i = 0; i < n; i++) {
        uint32_t kind = events[i] >> 24 & 0xff, what = events[i] & 0xffffff, more = (uint32_t)(events[i] >> 32), slot = what & 0xffff;

        if (kind == SH_EV_ADOPT) {
            expect(what < p->g.peers, "%u", what);
            if (choose(p, 8) == 7)
                p->late |= 1ull << what;
            else
                adopt(p, what);
        } else if (kind == SH_EV_OFFENCE)
            offence(p, what, more);
        else if (kind == SH_EV_ACCEPTED) {
            expect(slot < p->nd->books->begun && !p->held[slot], "%u", slot);
            p->held[slot] = more >> 23 == SH_LISTENERS ? DATAGRAMS : STREAM;
            if (!DO(sh_ep_is_open(ep_of(p, slot)))) {
                if (!ep_of(p, slot)->orphan)
                    DO(sh_ep_orphan(ep_of(p, slot)));
            } else
                settle(p, slot, more & 0x7f);
            if (more >> 23 < SH_LISTENERS && choose(p, 4))
                sh_listen_taken(p->nd, more >> 23);
        } else if (p->held[slot] && ep_of(p, slot)->gen == more >> 8) {
            if (kind == SH_EV_REFUSED)
                release(p, slot);
            else
                settle(p, slot, more & 0xff);
        }
    }
}

void party_pass(struct party *p, int most)
{
    uint64_t out[80];
    int n = DO(sh_pump(p->nd, out, most));

    expect(n <= most, "%d", n);
    act(p, out, n);
}

/* ---- what programs do ---- */

static const uint32_t SIZES[] = {1, 2, 64, 100, 511, 512, 513, 3000, 4096, MOST};
static uint32_t size(struct party *p) { return SIZES[choose(p, sizeof SIZES / sizeof *SIZES)]; }

static void write_some(struct party *p, uint32_t slot)
{
    sh_ep *ep = ep_of(p, slot);
    uint32_t n = size(p), tail = ep->tail;
    int64_t r;

    if (p->held[slot] == DATAGRAMS) {
        int entry = DO(sh_listen_find(p->base, &p->g, ep->peer, PORT, 1, 0));

        n = choose(p, 16) ? n : 1 + SH_DATAGRAM_MAX - choose(p, 2);
        if (n <= SH_DATAGRAM_MAX)
            put_bytes(ep, tail + SH_RECORD_HEADER, data, n);
        r = DO(sh_send(ep, PORT, PORT, (uint32_t)entry, data, n));
        p->written += r == 1 ? n : 0;
    } else {
        put_bytes(ep, tail, data, n);
        r = choose(p, 4) ? DO(sh_write(ep, data, n)) : choose(p, 2) ? DO(sh_write_file(ep, any_fd(), 0, n)) : DO(sh_write_socket(ep, any_fd(), n));
        expect(r <= (int64_t)n, "%ld", (long)r);
        p->written += r > 0 ? (uint64_t)r : 0;
    }
    status(p, slot, r);
}

struct picky { sh_taker taker; int most, whole; }; /* whole: all, or none */

static int take_some(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n)
{
    int most = ((struct picky *)to)->most, some = (int)n < most ? (int)n : most;

    if (((struct picky *)to)->whole && most < (int)n)
        return -1;
    if (some > 0)
        sh_copy_ring(ep, data, at, (uint32_t)some);
    return some;
}

static void read_some(struct party *p, uint32_t slot)
{
    sh_ep *ep = ep_of(p, slot);
    uint32_t want = size(p), head = ep->head, ports;
    struct picky picky = {{take_some}, (int)choose(p, 600) - 1, p->held[slot] == DATAGRAMS};
    int64_t r;

    if (p->held[slot] == DATAGRAMS) {
        r = choose(p, 8) ? DO(sh_recv(ep, data, &ports)) : DO(sh_recv_step(ep, &picky.taker, &ports));
        head += SH_RECORD_HEADER;
        if (r == SH_VIOLATION) /* who asks for records only */
            expect(!trusts(p, ep->peer) || ep->accepted == 0, "%u finds no datagram of %u", p->self, ep->peer);
        if (r == SH_VIOLATION && trusts(p, ep->peer))
            return;
    } else if (choose(p, 4))
        r = choose(p, 2) ? DO(sh_read(ep, data, want)) : DO(sh_read_wait(ep, data, want, 1 + choose(p, want), (int)choose(p, 8)));
    else if (choose(p, 2))
        r = choose(p, 2) ? DO(sh_read_some(ep, &picky.taker, want)) : DO(sh_read_step(ep, &picky.taker, want, 1 + choose(p, want), (int)choose(p, 8)));
    else {
        r = DO(sh_read_socket(ep, any_fd(), want));
        p->read += r > 0 ? (uint64_t)r : 0;
        status(p, slot, r);
        return;
    }
    expect(r <= (int64_t)sizeof data, "%ld", (long)r);
    if (r > 0)
        check_bytes(p, ep, head, data, r);
    status(p, slot, r);
}

static void ask(struct party *p)
{
    uint32_t peer = choose(p, p->g.peers), port = choose(p, 3) ? PORT : choose(p, 8) ? 0 : 500;
    int64_t slot = -1;

    if (choose(p, 4) && DO(sh_adopted(p->nd, peer)) == 1)
        slot = DO(sh_connect(p->nd, peer, port, 9));
    else {
        const struct sh_section *s = (const struct sh_section *)sh_section_at(p->base, &p->g, peer);
        int entry = DO(sh_listen_find(p->base, &p->g, peer, port, 0, 0));

        slot = DO(sh_connect_again(p->nd, peer, sh_load(&s->incarnation, 0), port, (uint32_t)entry, 9));
    }
    if (slot < 0)
        return;
    expect(!p->held[slot], "%ld", (long)slot);
    p->held[slot] = port ? STREAM : DATAGRAMS;
    if (choose(p, 2))
        DO(sh_spin_for_mail(p->nd, peer));
}

/* A pass in the same turn, as a read that waits makes it. */
static void more(struct party *p)
{
    uint64_t out[16], now = sh_clock();
    int n;

    if (choose(p, 2))
        DO(sh_pumped_just_now(p->nd, now));
    n = DO(sh_pump_more(p->nd, out, 16, now, 1000 * choose(p, 50)));
    act(p, out, n);
    DO(sh_stay_hot(p->nd, now, (int)choose(p, 2)));
    DO(sh_over(p->nd));
}

static void sleep_or_not(struct party *p)
{
    if (!DO(sh_quiet(p->nd)))
        return;
    if (choose(p, 2)) {
        if (DO(sh_heartbeat_arm(p->heart, (int)choose(p, 2))))
            wait_for_heart(p);
        DO(sh_heartbeat_heard(p->heart));
    } else
        DO(sh_sleep(p->nd));
    DO(sh_turn(p->nd));
}

static void of_wakes(struct party *p)
{
    uint32_t peer = choose(p, p->g.peers);

    switch (choose(p, 6)) {
    case 0:
        DO(sh_set_wake_out(p->nd, peer, (int)choose(p, 5), any_fd(), 0, 1));
        break;
    case 1:
        DO(sh_set_wake_in(p->nd, peer, (int)choose(p, 4), (int)choose(p, 2)));
        break;
    case 2:
        DO(sh_received(p->nd, choose(p, 3)));
        break;
    case 3:
        DO(sh_hear(p->nd, any_fd()));
        break;
    case 4:
        DO(sh_lost(p->nd));
        break;
    default:
        DO(sh_must_poll(p->nd, peer));
        DO(sh_heartbeat_watch(p->heart, peer, (int)choose(p, 2)));
    }
}

static void of_tools(struct party *p)
{
    uint64_t words[SH_SURVEY * PARTIES] = {0}, offset = choose(p, 65536) * 8u % (SH_PAGE + p->g.section_bytes * p->g.peers - 64);
    uint32_t peer = choose(p, p->g.peers);
    sh_geometry g;

    switch (choose(p, 8)) {
    case 0:
        DO(sh_survey(p->base, &p->g, words, 0));
        break;
    case 1:
        DO(sh_listen_still(p->base, &p->g, peer, choose(p, 2), PORT, choose(p, 65536), (int)choose(p, 3) - 1, 0));
        break;
    case 2:
        DO(sh_load64(p->base, offset));
        if (may_drop()) /* else nobody copies what others store meanwhile */
            DO(sh_read_bytes(p->base, offset, data, 64));
        break;
    case 3:
        DO(sh_time_reads(p->base, offset & ~63ull, 64, 2));
        break;
    case 4:
        DO(sh_geometry_of(choose(p, 65536) | (uint64_t)choose(p, 256) << 16, (uint64_t)choose(p, 65536) << choose(p, 24), &g));
        break;
    case 5:
        DO(sh_knock(p->base, &p->g, peer));
        DO(sh_futex_works(p->base, SH_PAGE + SH_SECTION_SLEEP_SEQ));
        break;
    case 6:
        DO(sh_inspect(p->nd, peer));
        break;
    default:
        for (uint32_t i = 0; i < SH_N_COUNTERS + 1; i++)
            DO(sh_node_counter(p->nd, sh_shown(i)));
    }
}

static void of_listeners(struct party *p)
{
    uint32_t index = choose(p, 8), port = choose(p, 3) ? PORT : choose(p, 2) * 1000;

    if (choose(p, 2))
        sh_listen(p->nd, index, port, choose(p, 3), (int)choose(p, 2));
    sh_listen_serve(p->nd, index, (int)choose(p, 4));
    if (DO(sh_listen_pending(p->nd, index)))
        sh_listen_taken(p->nd, index);
}

static void with_slot(struct party *p, uint32_t what)
{
    uint32_t begun = p->nd->books->begun, slot = begun ? choose(p, begun) : 0;
    sh_ep *ep = ep_of(p, slot);
    int64_t r = 0;

    if (!begun || !p->held[slot])
        return;
    switch (what) {
    case 0 ... 5:
        write_some(p, slot);
        break;
    case 6 ... 11:
        read_some(p, slot);
        break;
    case 12:
        DO(sh_arm(ep));
        break;
    case 13:
        if (ep->state == SH_EP_OPEN && !choose(p, 4))
            DO(sh_ep_finish(ep));
        break;
    case 14:
        if (!choose(p, 4))
            shut(p, slot, (int)choose(p, 2), (int)choose(p, 4) == 3);
        break;
    case 15:
        r = DO(sh_wait_space(ep, (int)choose(p, 2)));
        status(p, slot, r);
        break;
    case 16:
        r = DO(sh_poll(ep));
        settle(p, slot, (int)r);
        break;
    case 17:
        r = DO(sh_ep_unsent(ep));
        expect(r <= (int64_t)ep->tx_bytes, "%ld", (long)r);
        expect(p->held[slot] == STREAM || DO(sh_unread(ep)) <= ep->tx_bytes / SH_RECORD_HEADER, "more than there can be");
        break;
    case 18:
        DO(sh_available(ep));
        DO(sh_drain_step(ep, (int)choose(p, 2)));
        break;
    default:
        for (uint32_t i = 0; i < 3; i++)
            DO(sh_ep_ring(ep, i));
    }
}

/* The section has another owner: is it still read by that one? (engine/layout.py: is_read_by) */
int is_read(const struct party *p, uint32_t reader)
{
    const struct sh_pair *there = sh_pair_at(p->base, &p->g, p->self, reader), *back = sh_pair_at(p->base, &p->g, reader, p->self);
    uint32_t tag = SH_HIGH(sh_load(&there->notify_seq, 0)), mine = SH_HIGH(sh_load(&back->notify_seq, 0));
    uint64_t sent = sh_load(&there->outbox, 0), taken = sh_load(&back->inbox, 0), users;

    if (SH_HIGH(sent) == mine && SH_LOW(sent) != (SH_HIGH(taken) == tag ? SH_LOW(taken) : 0))
        return 1;
    users = sh_load(&back->users, 0);
    return SH_LOW(users) && SH_HIGH(users) == tag;
}

static void of_links(struct party *p)
{
    uint32_t peer = choose(p, p->g.peers);

    switch (may_drop() ? choose(p, 8) : 2 + choose(p, 6)) {
    case 0: /* drop */
        end(p, peer);
        restart(p, peer);
        adopt(p, peer);
        break;
    case 1:
        punish(p, peer);
        break;
    case 2:
        DO(sh_notify(p->nd, peer, choose(p, p->g.slots)));
        break;
    case 3:
        if (DO(sh_adopted(p->nd, peer)) == 0 || DO(sh_adopted(p->nd, peer)) == SH_EMPTY)
            adopt(p, peer);
        break;
    default:
        for (uint32_t j = 0; j < p->g.peers; j++)
            if (p->late >> j & 1)
                adopt(p, j);
    }
}

static void of_settings(struct party *p)
{
    switch (choose(p, 8)) {
    case 0:
        DO(sh_limits(p->nd, SH_MIN_RING << choose(p, 4), SH_MIN_RING << choose(p, 8), SH_MIN_RING << choose(p, 9), choose(p, 200)));
        break;
    case 1:
        DO(sh_node_settings(p->nd, 1000 * choose(p, 500), 1000 * choose(p, 200), choose(p, 2) * 20000));
        break;
    case 2:
        DO(sh_loop(p->nd, any_fd()));
        break;
    case 3:
        DO(sh_due(p->nd, choose(p, 2) * sh_clock()));
        break;
    case 4:
        DO(sh_hot(p->nd, choose(p, 2) * 1000000, choose(p, 300), (int)choose(p, 2)));
        DO(sh_is_next(p->nd, sh_clock()));
        break;
    case 5:
        sh_storage(p->nd, any_fd(), (int)choose(p, 2));
        DO(sh_storage_missing(p->nd));
        break;
    case 6:
        DO(sh_others(p->nd, choose(p, 64)));
        break;
    default:
        sh_here(p->nd, choose(p, 8));
        expect(DO(sh_ep_at(p->nd, p->g.slots)) == NULL, "a slot too many");
    }
}

void party_step(struct party *p)
{
    uint32_t what = choose(p, 64);

    if (what < 28)
        with_slot(p, what);
    else if (what < 40)
        party_pass(p, choose(p, 4) ? 80 : 4 + (int)choose(p, 20));
    else if (what < 44)
        more(p);
    else if (what < 50)
        ask(p);
    else if (what == 50)
        DO(sh_safety(p->nd));
    else if (what == 51)
        DO(sh_sweep(p->nd));
    else if (what < 54)
        sleep_or_not(p);
    else if (what == 54)
        of_wakes(p);
    else if (what == 55)
        of_tools(p);
    else if (what == 56)
        of_listeners(p);
    else if (what < 59)
        of_links(p);
    else if (what == 59)
        of_settings(p);
    else if (what < 62)
        beat_once(p);
    else
        DO(sh_safety(p->nd));
}

/* Read all that is there. */
void party_drain(struct party *p)
{
    for (uint32_t slot = 0; slot < p->nd->books->begun; slot++) {
        sh_ep *ep = ep_of(p, slot);
        uint32_t head, ports;
        int64_t r;

        while (p->held[slot] && ep->state == SH_EP_OPEN) {
            head = ep->head;
            if (p->held[slot] == STREAM)
                r = sh_read(ep, data, sizeof data);
            else {
                r = sh_recv(ep, data, &ports);
                head += SH_RECORD_HEADER;
            }
            if (r < 0)
                break;
            check_bytes(p, ep, head, data, r);
        }
    }
}

/* Do the books agree with what is held? */
void party_audit(const struct party *p)
{
    const sh_node *nd = p->nd;
    uint64_t rings = 0, users[PARTIES] = {0}, used = 0;

    for (uint32_t slot = 0; slot < nd->books->begun; slot++) {
        const sh_ep *ep = ep_of(p, slot);

        if (ep->state == SH_EP_FREE) {
            expect(!p->held[slot], "%u", slot);
            continue;
        }
        expect(p->held[slot] || ep->closing, "slot %u is lost", slot);
        expect(ep->tail - ep->head_seen <= ep->tx_bytes, "slot %u: more than there is room for", slot);
        used++;
        rings += ep->tx_bytes;
        for (uint32_t i = 0; i < ep->outgrown; i++)
            rings += 1ull << (ep->former[i] & (SH_MIN_RING - 1));
        if (!ep->theirs)
            continue;
        users[ep->peer]++;
        expect(ep->tail_seen - ep->head <= ep->rx_bytes, "slot %u: more than there is", slot);
        expect(ep->rx >= sh_section_at(p->base, &p->g, ep->peer) + p->g.arena_off
                   && ep->rx + ep->rx_bytes <= sh_section_at(p->base, &p->g, ep->peer) + p->g.section_bytes, "slot %u: a ring elsewhere", slot);
    }
    expect(used == nd->books->used, "%lu slots", (unsigned long)used);
    expect(rings + nd->books->arena->free_bytes == nd->books->arena->bytes, "%lu bytes of rings", (unsigned long)rings);
    for (uint32_t j = 0; j < p->g.peers; j++)
        expect(users[j] == nd->links[j].users, "%lu users of %u", (unsigned long)users[j], j);
}
