/* turn.c - turns of the loop: their budget, and whether the pump comes again at once or the loop may sleep. */
#include "node.h"

#include <poll.h>

#define CREDIT_CAP_NS 5000000u
#define SKIP_NS 50000u
#define ASK_NS 50000u /* a question is a system call */

static void ask_later(sh_node *nd, uint64_t now)
{
    nd->ask_ns = nd->loop_fd < 0 || now + ASK_NS > nd->turn_end_ns ? nd->turn_end_ns : now + ASK_NS;
}

/* A new loop turn begins: its budget. Returns the clock. */
uint64_t sh_turn(sh_node *nd)
{
    uint64_t now = sh_clock();

    nd->turn_end_ns = now + nd->hold_ns;
    ask_later(nd, now);
    sh_wake_up(nd); /* a pump follows in this turn: nobody need ring */
    return now;
}

/* Is its budget used up, or is one of the loop's other descriptors ready? Those it sees only between its turns. */
int sh_asked(sh_node *nd, uint64_t now)
{
    if (!nd->ask_ns || now >= nd->turn_end_ns)
        return 1;
    ask_later(nd, now);
    if (poll(&(struct pollfd){.fd = nd->loop_fd, .events = POLLIN}, 1, 0) == 1)
        nd->ask_ns = 0;
    return !nd->ask_ns;
}

int sh_over(sh_node *nd) { return sh_over_at(nd, sh_clock()); }

void sh_loop(sh_node *nd, int fd) { nd->loop_fd = fd; }

/* When the engine wants a pass at the latest, whatever happens or not. */
void sh_due(sh_node *nd, uint64_t at_ns) { nd->due_ns = at_ns; }

/* The pump runs hot for hot_ns behind what moved, at most hot_turns turns in vain. */
void sh_hot(sh_node *nd, uint64_t hot_ns, uint64_t hot_turns, int one_cpu)
{
    nd->hot_ns = hot_ns;
    nd->hot_turns = hot_turns;
    nd->one_cpu = one_cpu;
    nd->pumped_ns = nd->hit_ns = sh_clock();
    nd->gap_ns = UINT64_MAX;
    nd->credit_ns = CREDIT_CAP_NS;
}

/* What peers moved so far: bytes, messages, and space where it was waited for. Hotness is earned by it. Own writes earn none: the question
 * and its answer are no two things in a row. */
uint64_t sh_moved(sh_node *nd) { return nd->n[SH_N_READS] + nd->moved_messages + nd->moved_space; }

/* A pass so soon after the last may be left out by who looks at its ring itself: what it acknowledged, the peer would have to tell anew. */
int sh_pumped_just_now(sh_node *nd, uint64_t now) { return now - nd->pumped_ns < SKIP_NS; }

/* After a pass: come again at once? 1: something is owed, here or (`owed`) by the caller. 2: yes, as bytes moved, they moved shortly before
 * as well, and looking in vain has not used more than a quarter of the time. 3: the same, but give this CPU away first, as whoever is to
 * answer may need it. */
int sh_stay_hot(sh_node *nd, uint64_t now, int owed)
{
    uint64_t moved = sh_moved(nd), since = now - nd->pumped_ns, credit = nd->credit_ns;
    int hot = now - nd->hit_ns < nd->hot_ns;

    nd->pumped_ns = now;
    if (moved != nd->hit_moved) {
        nd->hit_moved = moved;
        nd->gap_ns = now - nd->hit_ns;
        nd->hit_ns = now;
        nd->idle_turns = 0;
        credit += since;
        hot = nd->hot_ns > 0;
    } else {
        nd->idle_turns++;
        credit = !hot ? credit + since / 4 : credit > since ? credit - since : 0;
    }
    nd->credit_ns = credit < CREDIT_CAP_NS ? credit : CREDIT_CAP_NS;
    if (!hot || nd->gap_ns >= nd->hot_ns || !nd->credit_ns || nd->idle_turns >= nd->hot_turns)
        return owed || !sh_quiet(nd);
    return nd->idle_turns || nd->one_cpu ? 3 : 2;
}

/* Did a bell move, or one of the slots that were read since the last pump? The toggles of those are still unacknowledged, so that the peer
 * need not tell of more: they are looked at themselves. */
static int news(sh_node *nd)
{
    int found = nd->attention;

    for (uint64_t m = nd->known_peers; m; m &= m - 1) {
        struct sh_link *l = &nd->links[__builtin_ctzll(m)];
        found |= sh_peek(&l->in->notify_seq) != l->last && !sh_rate_limited(l);
    }
    for (uint32_t w = 0; w < nd->words; w++) {
        for (uint64_t m = nd->touched[w]; m; m &= m - 1) {
            sh_ep *ep = &nd->eps[w * 64 + (uint32_t)__builtin_ctzll(m)];
            uint64_t p = sh_peek(&ep->theirs->tx_word);

            sh_prefetch_bytes(ep);
            if (p == ep->tx_last && !sh_space_came(ep))
                continue;
            if (p & SH_WANT) { /* it waits for what was taken: it has to be told of that as well */
                sh_rearm_touched(nd);
                sh_queue_later(nd);
                return 1;
            }
            nd->ready[w] |= SH_BIT(ep->slot);
        }
        found |= nd->ready[w] != 0;
    }
    return found;
}

/* Another pass in the same turn, when there is nothing else to be run: busy-polls for up to ns, from `now` on. Returns what sh_pump() does;
 * 0: nothing came, or the budget of the turn is used up. */
int sh_pump_more(sh_node *nd, uint64_t *out, int max, uint64_t now, uint64_t ns)
{
    uint64_t end = now + ns, yield_at = sh_yield_at(nd, now);
    int n;

    if (!sh_may_write(nd))
        return SH_STALE;
    sh_queue_later(nd); /* nobody is about to read them, else that would be run first */
    for (uint32_t k = 1; now < end && !sh_over_at(nd, now); k++) {
        if (news(nd) && (n = sh_pass(nd, out, max, nd->known_peers, now))) /* a bell of what was read already says nothing */
            return n;
        if ((nd->spin_yield_ns || nd->alone) && k % 8) {
            sh_pause();
            continue;
        }
        now = sh_clock_and_yield(nd, &yield_at);
    }
    return 0;
}
