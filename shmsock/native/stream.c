/* stream.c - what streams ask at each message. Each question has one answer: how many bytes, or a status that says what to do now. Here it is decided
 * whether a read spins, arms or lets the loop turn; how long it spins is decided in spin.c. */
#include "ring.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#define PIECE (1u << 16)      /* bytes that are published, or given back, at a time: the peer copies those meanwhile */
#define FILE_PIECE (1u << 18) /* likewise of a file */

/* ---- reading ---- */

/* How many bytes are there, maybe fewer than min; or SH_RESET, SH_VIOLATION. Polls P only if fewer are known. */
static int64_t poll_bytes(sh_ep *ep, uint32_t min)
{
    int r;

    if (ep->tail_seen - ep->head < min && SH_UNLIKELY((r = sh_refresh(ep)) < 0))
        return r;
    return ep->tail_seen - ep->head;
}

static uint32_t at_most(int64_t n, uint32_t want) { return n < want ? (uint32_t)n : want; }

/* Read what is there, whatever the turn's budget says: 1 to `want` bytes, or a status. SH_EMPTY does not arm. */
int64_t sh_read_some(sh_ep *ep, sh_taker *to, uint32_t want)
{
    int64_t found = sh_available(ep);

    return found > 0 ? sh_take_out(ep, to, 0, at_most(found, want)) : found;
}

/* How many bytes could be read now, or a status. */
int64_t sh_available(sh_ep *ep)
{
    int64_t found;

    if (SH_UNLIKELY(!sh_may_write(ep->nd)))
        return SH_STALE;
    if (SH_UNLIKELY(!ep->theirs))
        return SH_RESET;
    found = poll_bytes(ep, UINT32_MAX);
    return found ? found : sh_empty(ep);
}

/* Busy-poll for at least `min` bytes. Returns what poll_bytes() does, or SH_YIELD. */
static int64_t spin_for(sh_ep *ep, uint32_t min, uint64_t now)
{
    int64_t found;

    do {
        int r;

        if (!now && sh_over_at(ep->nd, now = sh_clock()))
            return SH_YIELD;
        if (ep->tx_last & SH_FIN)
            return ep->tail_seen - ep->head;
        if ((r = sh_spin_on(ep, &ep->theirs->tx_word, ep->tx_last, now)) < 0)
            return r;
        if (!r)
            return ep->tail_seen - ep->head;
        now = 0; /* the clock is read again if there is still something to wait for */
    } while ((found = poll_bytes(ep, min)) >= 0 && found < min);
    return found;
}

/* Only `found` bytes are there, fewer than min: spin for more, or arm. Returns how many bytes are there now, at least min, or sh_read_step()'s status. */
static __attribute__((noinline)) int64_t wait_for(sh_ep *ep, int64_t found, uint32_t min, uint64_t now, int how)
{
    if (how & SH_MAY_SPIN) {
        void *held = sh_let_go(ep->nd);

        if (sh_one_way(ep, min))
            ep->polled_ns = now = sh_gather(ep, now);
        if ((found = poll_bytes(ep, min)) >= 0 && found < min && min <= ep->rx_bytes)
            found = spin_for(ep, min, now);
        sh_take_back(ep->nd, held);
    }
    if (!found) {
        if ((found = sh_empty(ep)) != SH_EMPTY || how & SH_PASS_FOLLOWS || !sh_arm(ep)) /* what is unacknowledged is touched: a pass arms it */
            return found;
        if ((found = sh_available(ep)) == SH_EMPTY)
            return SH_STALE; /* sh_arm() refused: nothing may be touched any more */
    }
    return found >= 0 && found < min ? SH_SLOW : found;
}

/* Read at least `min` and at most `want` bytes. SH_EMPTY: there are none, and the slot is armed: suspend. SH_YIELD: let the loop turn first. SH_SLOW:
 * fewer than min are there, or `to` wants none of them. `how`: SH_MAY_SPIN where nothing else is to be run; SH_YIELDED after SH_YIELD: then bytes that
 * are there are read even if others have used up this turn, too; SH_PASS_FOLLOWS where a pass is scheduled: at SH_EMPTY that is left to arm the slot. */
int64_t sh_read_step(sh_ep *ep, sh_taker *to, uint32_t want, uint32_t min, int how)
{
    sh_node *nd = ep->nd;
    uint64_t now;
    int64_t found;

    if (SH_UNLIKELY(!sh_may_write(nd)))
        return SH_STALE;
    if (SH_UNLIKELY(!ep->theirs))
        return SH_RESET;
    now = sh_clock();
    if (SH_UNLIKELY(sh_share_is_used(ep, now) || sh_over_at(nd, now))) {
        if (!(how & SH_YIELDED))
            return SH_YIELD;
        /* once is enough: where others use up every turn, neither the end nor fewer bytes than min would be seen */
        found = poll_bytes(ep, min);
        if (found < min && (found < 0 || (found = wait_for(ep, found, min, now, how & ~SH_MAY_SPIN)) < 0))
            return found;
    } else {
        ep->polled_ns = now;
        found = (how & SH_MAY_SPIN) && sh_one_way(ep, min) ? 0 : poll_bytes(ep, min);
        if (SH_UNLIKELY(found < min) && (found < 0 || (found = wait_for(ep, found, min, now, how)) < 0))
            return found;
    }
    return sh_take_out(ep, to, 0, at_most(found, want));
}

/* The first piece gave n: read on while pieces are full, what comes meanwhile as well, as long as the turn may last. What ends it is told by the next
 * read. */
static int64_t read_on(sh_ep *ep, void *to, uint32_t want, int64_t n, int hurry)
{
    int64_t some = n;

    while (some >= (int64_t)PIECE && n < want && !(hurry && sh_over(ep->nd))) {
        struct sh_plain plain = {{sh_take_plain}, (char *)to + n};

        some = sh_read_some(ep, &plain.taker, at_most(PIECE, want - (uint32_t)n));
        n += some > 0 ? some : 0;
    }
    return n;
}

/* The same two into plain memory, in pieces. */
int64_t sh_read(sh_ep *ep, void *to, uint32_t want)
{
    struct sh_plain plain = {{sh_take_plain}, to};

    return read_on(ep, to, want, sh_read_some(ep, &plain.taker, at_most(PIECE, want)), 0);
}

int64_t sh_read_wait(sh_ep *ep, void *to, uint32_t want, uint32_t min, int how)
{
    struct sh_plain plain = {{sh_take_plain}, to};

    return read_on(ep, to, want, sh_read_step(ep, &plain.taker, at_most(min > PIECE ? min : PIECE, want), min, how), 1);
}

#define KEEP_GIL_MAX (1u << 15) /* bytes that are sent without letting other threads run */
#define SENT_MAX (1u << 16)     /* bytes that are copied and sent at a time: the copy stays in the cache */

struct to_socket { sh_taker taker; int fd; };

/* Send what the socket has room for. Not straight from the ring: were this process stopped for so long that the peer takes it for dead, the ring's memory
 * could have another connection's bytes by then, and what was sent cannot be voided as a copy is. */
static int take_to_socket(sh_taker *to, const sh_ep *ep, uint32_t at, uint32_t n)
{
    int fd = ((struct to_socket *)to)->fd;
    void *held = n > KEEP_GIL_MAX ? sh_let_go(ep->nd) : NULL;
    uint32_t sent = 0, piece;
    ssize_t some = 0;

    do {
        uint8_t copy[SENT_MAX];

        piece = n - sent < SENT_MAX ? n - sent : SENT_MAX;
        sh_copy_ring(ep, copy, at + sent, piece);
        sh_acquire(ep->nd->wc);
        if (SH_UNLIKELY(!sh_holds(ep->nd) || !sh_same_life(ep)))
            break; /* as sh_read_end() is going to see */
        some = send(fd, copy, piece, MSG_DONTWAIT | MSG_NOSIGNAL);
        sent += some > 0 ? (uint32_t)some : 0;
    } while (some == (ssize_t)piece && sent < n);
    if (held)
        sh_take_back(ep->nd, held);
    return sent || some >= 0 ? (int)sent : -1;
}

/* Send up to `want` bytes that are there through a socket; what it has no room for stays in the ring. Returns how many; or a status, SH_UNREADABLE: errno
 * says why it takes none, EAGAIN that it is full. */
int64_t sh_read_socket(sh_ep *ep, int fd, uint32_t want)
{
    struct to_socket socket = {{take_to_socket}, fd};
    int64_t sent = sh_read_some(ep, &socket.taker, want);

    return sent == SH_SLOW ? SH_UNREADABLE : sent;
}

/* ---- writing ---- */

/* May n bytes be put into the ring, which may grow for them? 0, or a status. */
static inline int begin_put(sh_ep *ep, uint64_t n)
{
    int r = sh_writable(ep);

    if (SH_UNLIKELY(r < 0))
        return r;
    if (SH_UNLIKELY(sh_space_of(ep) < n) && ep->may_grow) {
        if ((r = sh_see_head(ep)) < 0)
            return r;
        if (sh_space_of(ep) < n)
            sh_grow(ep, n);
    }
    return 0;
}

/* Put n bytes into the ring. Returns how many went in, fewer only when it is full (then WANT is set); or a status. */
int64_t sh_write(sh_ep *ep, const void *data, uint64_t n)
{
    const uint8_t *from = data;
    uint64_t left = n;
    int r = begin_put(ep, n);

    if (SH_UNLIKELY(r < 0))
        return r;
    while (left) {
        uint32_t m;

        if (SH_UNLIKELY((r = sh_room(ep, 1, left)) < 0))
            return r;
        if (!r)
            break;
        m = left < (uint32_t)r ? (uint32_t)left : (uint32_t)r;
        if (m > PIECE)
            m = PIECE;
        sh_stage(ep, 0, from, m);
        sh_commit(ep, m);
        from += m;
        left -= m;
        if (left && SH_UNLIKELY(!sh_may_write(ep->nd)))
            return SH_STALE;
    }
    ep->nd->n[SH_N_WRITES]++;
    ep->nd->n[SH_N_BYTES_OUT] += n - left;
    return (int64_t)(n - left);
}

/* Have the kernel put up to n bytes into the ring: of a file from *at on; of a socket, without `at`, what one recv() gives. */
static int64_t put_from(sh_ep *ep, int fd, const uint64_t *at, uint64_t n)
{
    uint64_t done = 0;
    int r = begin_put(ep, n);

    while (r >= 0 && done < n && (r = sh_room(ep, 1, n - done)) > 0) {
        uint32_t from = ep->tail & (ep->tx_bytes - 1), m = ep->tx_bytes - from;
        ssize_t got;

        if (m > (uint32_t)r)
            m = (uint32_t)r;
        if (m > n - done)
            m = (uint32_t)(n - done);
        if (m > FILE_PIECE)
            m = FILE_PIECE;
        if (at)
            got = pread(fd, ep->tx + from, m, (off_t)(*at + done));
        else
            got = recv(fd, ep->tx + from, m, MSG_DONTWAIT);
        if (got <= 0)
            r = !got ? SH_EOF : errno == EINTR ? 0 : SH_UNREADABLE;
        else if (SH_UNLIKELY(!sh_may_write(ep->nd)))
            r = SH_STALE;
        else {
            sh_commit(ep, (uint32_t)got);
            done += (uint64_t)got;
            if (!at)
                break; /* a reset is told once: by the next call, and not behind bytes */
        }
    }
    ep->nd->n[SH_N_WRITES] += done != 0;
    ep->nd->n[SH_N_BYTES_OUT] += done;
    return r < 0 && (!done || r == SH_STALE) ? r : (int64_t)done;
}

/* The same for what is in a file from `at` on: read straight into the ring. SH_EOF: nothing; SH_UNREADABLE: errno says why not. */
int64_t sh_write_file(sh_ep *ep, int fd, uint64_t at, uint64_t n) { return put_from(ep, fd, &at, n); }

/* The same for what a socket has, now. SH_EOF: its end; SH_UNREADABLE: errno says why not, EAGAIN that there is nothing. */
int64_t sh_write_socket(sh_ep *ep, int fd, uint64_t n) { return put_from(ep, fd, NULL, n); }

/* A drain has nothing to wait for. 1: it may return at once. 0: it lets the loop turn. Seven of eight drains return at once, which keeps a turn near
 * enough to its budget; the eighth only if it is `quick` and budget is left. */
int sh_drain_step(sh_ep *ep, int quick)
{
    return ++ep->drains & 7 || (quick && !sh_over(ep->nd));
}
